"""Loading, blocks, views, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import nn

from reconkit import models
from reconkit.config import ConfigError


def test_tiny_needs_nothing_and_is_always_the_same() -> None:
    state = torch.get_rng_state()
    (a, tokenizer), (b, _) = models.load_model("tiny"), models.load_model("tiny")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert len(models.blocks(a)[1]) == 4 and a.config.hidden_size == 64 and not a.training
    text = "Ünïcode and\nlines."
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_what_was_asked_for_whatever_was_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    models.save_model(*models.load_model("tiny", dtype=torch.bfloat16), tmp_path / "saved")
    model, _ = models.load_model(str(tmp_path / "saved"), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("name", ["no-such-model", "./missing", "missing.gguf", "a/b/c", ""])
def test_a_name_that_no_source_knows_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(ConfigError, match=r"smollm2-135m \(offline\)"):
        models.load_model(name)


def test_a_hub_that_cannot_be_asked_is_said() -> None:
    with pytest.raises(ConfigError, match="hub cannot be asked"):
        models.load_model("nobody/no-such-model")


def test_a_folder_without_a_model_and_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config.json"):
        models.load_model(str(tmp_path))
    models.save_model(*models.load_model("tiny"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        models.load_model(str(tmp_path / "m"))


def test_a_device_that_is_not_there() -> None:
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(ConfigError, match="does not have"):
        models.load_model("tiny", device=missing)


@pytest.mark.parametrize("name", families.ALL)
def test_blocks_and_views_of_every_family(name: str) -> None:
    model = families.build(name)
    where, layers = models.blocks(model)
    assert len(layers) == 3 and dict(model.named_modules())[where] is layers
    views, dense = models.weight_views(layers[0])
    assert len({v.name for v in views}) == len(views) >= 4
    assert any(v.attention for v in views) and any(not v.attention for v in views)
    held = {id(p) for p in layers[0].parameters() if p.ndim >= 2}
    named = {id(v.parameter) for v in views} | {id(p) for n, p in layers[0].named_parameters() if n in dense}
    assert held == named, "every matrix is either a view or named as left dense"
    assert all(v.get().data_ptr() == v.stored().data_ptr() for v in views)


def test_conv1d_is_seen_as_out_in_and_experts_one_by_one() -> None:
    block = models.blocks(families.build("gpt2 (Conv1D)"))[1][0]
    shapes = {v.name: tuple(v.get().shape) for v in models.weight_views(block)[0]}
    assert shapes == {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}
    views, dense = models.weight_views(models.blocks(families.build("mixtral (experts)"))[1][0])
    assert sum(v.index is not None for v in views) == 2 * 4 and any("gate" in name or "router" in name for name in dense)


def test_largest_inputs_are_those_of_the_parts_matrices() -> None:
    expected = {"attention": 32, "feed-forward": 128, "all": 128}
    assert models.largest_inputs(families.build("gpt2 (Conv1D)")) == expected, "c_proj of the feed-forward part has 4 x 32 inputs"


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="no list of decoder blocks"):
        models.blocks(nn.Sequential(nn.Linear(2, 2)))


def test_saving_replaces_a_model_and_nothing_else(tmp_path: Path) -> None:
    pair = models.load_model("tiny")
    folder = models.save_model(*pair, tmp_path / "m")
    models.save_model(*pair, folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"], "nothing is left beside it"
    other = tmp_path / "letters"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a model"):
        models.save_model(*pair, other)
    assert (other / "mine.txt").read_text() == "mine"


def test_a_write_that_breaks_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = models.load_model("tiny")
    models.save_model(model, tokenizer, tmp_path / "m")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        models.save_model(model, tokenizer, tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    assert models.load_model(str(tmp_path / "m"))[0].config.hidden_size == 64


def test_identity_changes_with_the_files(tmp_path: Path) -> None:
    models.save_model(*models.load_model("tiny"), tmp_path / "m")
    first = models.identity(str(tmp_path / "m"))
    assert first == models.identity(str(tmp_path / "m"))
    (tmp_path / "m" / "config.json").write_text((tmp_path / "m" / "config.json").read_text() + "\n")
    assert models.identity(str(tmp_path / "m")) != first
    assert models.identity("facebook/opt-125m") == "facebook/opt-125m"


@pytest.mark.assets
@pytest.mark.slow
def test_the_offline_model_is_a_plain_float_model_that_writes_english(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = models.load_model("smollm2-135m")
    assert len(models.blocks(model)[1]) == 30 and model.config.hidden_size == 576
    assert {p.dtype for p in model.parameters()} == {torch.float32} and type(model.model.layers[0].mlp.up_proj) is nn.Linear
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    written = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in written
    models.save_model(model, tokenizer, tmp_path / "copy")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model(ids).logits)

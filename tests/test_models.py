"""Loading, blocks, views, saving."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
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


@pytest.mark.parametrize(("name", "meant"), [("smolm2-135m", "smollm2-135m"), ("SmolLM2-135M", "smollm2-135m"), ("tinny", "tiny")])
def test_a_name_close_to_an_offline_one_is_told(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"perhaps {meant} is meant"):
        models.check_model(name)


@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "t5-small"])
def test_hub_ids_need_no_owner(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with pytest.raises(ConfigError, match=f"{name}.*HF_HUB_OFFLINE"):
        models.check_model(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    models.check_model(name)
    assert models.identity(name) == name


def test_a_path_is_a_name(tmp_path: Path) -> None:
    folder = models.save_model(*models.load_model("tiny"), tmp_path / "m")
    assert models.identity(folder) == models.identity(str(folder))
    assert models.weights_sum(models.load_model(folder)[0]) == models.weights_sum(models.load_model(str(folder))[0])
    assert models.weights_sum(models.open_model(folder, tmp_path / "b", device="cpu")[0]) == models.weights_sum(models.load_model("tiny")[0])
    with pytest.raises(ConfigError, match="no config.json"):
        models.check_model(tmp_path)


SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SEQUENCES = {"vocab_size": 64, "d_model": 16, "decoder_layers": 1, "encoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
NO_DECODERS = {
    "t5": ("T5ForConditionalGeneration", {"vocab_size": 64, "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2}, "an encoder-decoder"),
    "bart": ("BartForConditionalGeneration", {**SEQUENCES, "encoder_attention_heads": 2, "decoder_attention_heads": 2}, "an encoder-decoder"),
    "bert": ("BertLMHeadModel", SMALL, "an encoder"),
    "roberta": ("RobertaForMaskedLM", SMALL, "an encoder"),
    "distilbert": ("DistilBertForMaskedLM", {"vocab_size": 64, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}, "an encoder"),
}


@pytest.mark.parametrize("name", NO_DECODERS)
def test_what_is_no_decoder_is_refused_before_its_weights_are_loaded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    kind, values, said = NO_DECODERS[name]
    model = getattr(transformers, kind)(getattr(transformers, kind).config_class(**values))
    model.save_pretrained(tmp_path / name)
    monkeypatch.setattr(models, "_from_pretrained", None)
    for refused in (lambda: models.load_model(tmp_path / name), lambda: models.open_model(tmp_path / name, tmp_path / "blocks")):
        with pytest.raises(ConfigError, match=rf"{said} \({name}\)"):
            refused()
    with pytest.raises(ConfigError, match=rf"{kind} is {said} \({name}\)"):
        models.check_decoder(model)


def test_an_encoder_that_was_made_a_decoder_and_every_family_pass(tmp_path: Path) -> None:
    import transformers

    model = transformers.BertLMHeadModel(transformers.BertConfig(**SMALL, is_decoder=True))
    models.save_model(model, models.load_model("tiny")[1], tmp_path / "m")
    assert type(models.load_model(tmp_path / "m")[0]).__name__ == "BertLMHeadModel"
    for name in families.ALL:
        models.check_decoder(families.build(name))
    models.check_decoder(nn.Linear(2, 2))


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
    with pytest.raises(OSError, match="cannot be written .No space") as raised:
        models.save_model(model, tokenizer, tmp_path / "m")
    assert raised.value.filename == str(tmp_path / "m") and "RECONKIT_CACHE" not in str(raised.value), "which would not help here"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    assert models.load_model(str(tmp_path / "m"))[0].config.hidden_size == 64


def test_identity_changes_with_the_files(tmp_path: Path) -> None:
    models.save_model(*models.load_model("tiny"), tmp_path / "m")
    first = models.identity(str(tmp_path / "m"))
    assert first == models.identity(str(tmp_path / "m"))
    (tmp_path / "m" / "config.json").write_text((tmp_path / "m" / "config.json").read_text() + "\n")
    assert models.identity(str(tmp_path / "m")) != first
    assert models.identity("facebook/opt-125m") == "facebook/opt-125m"


def test_the_offline_model_is_read_from_its_file_where_no_copy_can_be_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = cache / "assets" / models.OFFLINE_FILE
    file.parent.mkdir()
    file.touch()
    monkeypatch.setattr(models.assets, "asset", lambda _: file.parent)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert models._offline_folder() == str(file)
    with pytest.raises(OSError, match="RECONKIT_CACHE"):
        models.open_model("smollm2-135m", cache / "blocks")


def checkpoint(folder: Path, field: dict[str, Any], change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tiny model in `folder` with this `quantization_config`, its projections changed; returns its plain weights."""
    models.save_model(*models.load_model("tiny"), folder)
    plain = load_file(folder / "model.safetensors")
    stored = [change(name, w) if "proj" in name else {name: w} for name, w in plain.items()]
    save_file({name: w for part in stored for name, w in part.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": field}
    (folder / "config.json").write_text(json.dumps(config))
    return plain


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}},
}
SPARSE = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense", "global_sparsity": 0.5, "sparsity_structure": "2:4"}}


def in_eighths(name: str, w: torch.Tensor) -> dict[str, torch.Tensor]:
    """As FP8, whose scales are one eighth in every square of 16."""
    scales = torch.full((w.shape[0] // 16, w.shape[1] // 16), 0.125)
    return {name: (8 * w).to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


def in_whole_numbers(name: str, w: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = w.abs().amax(1, keepdim=True) / 127
    return {name: (w / scale).round().to(torch.int8), f"{name}_scale": scale}


def as_it_is(name: str, w: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: w}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fp8", "sparse"])
def test_quantised_and_sparse_checkpoints_become_plain_ones(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    field, change = {"fp8": (FP8, in_eighths), "sparse": (SPARSE, as_it_is)}[kind]
    plain = checkpoint(tmp_path / "m", field, change)
    model, tokenizer = models.load_model(str(tmp_path / "m"), dtype=dtype)
    models.check_float_weights(model)
    for name, weight in plain.items():
        expected = (8 * weight).to(torch.float8_e4m3fn).float() / 8 if kind == "fp8" and "proj" in name else weight
        assert model.get_parameter(name).dtype == dtype and torch.equal(model.get_parameter(name), expected.to(dtype)), name
    models.save_model(model, tokenizer, tmp_path / "copy")
    assert "quantization_config" not in (tmp_path / "copy" / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("field", "named"),
    [
        (INT8, "compressed-tensors.*pip install compressed-tensors"),
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq and cannot be restored"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "hqq", "quant_config": {}}, "hqq"),
        ({"quant_method": "of tomorrow"}, "of tomorrow"),
        ({"bits": 4}, "an unknown method"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_restored_is_refused_before_weights_are_read(
    field: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "m", field, in_whole_numbers)
    monkeypatch.setattr("transformers.utils.quantization_config.is_compressed_tensors_available", lambda: False)
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=f"{named}.*checkpoint from which it was quantised") as raised:
        models.load_model(str(tmp_path / "m"))
    assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="blocks to be read one at a time.*checkpoint from which it was quantised"):
        models.open_model(str(tmp_path / "m"), tmp_path / "blocks")


def test_sparse_weights_that_are_stored_as_bitmasks_are_refused_by_name(tmp_path: Path) -> None:
    field = {**SPARSE, "sparsity_config": {**SPARSE["sparsity_config"], "format": "sparse-bitmask"}}
    checkpoint(tmp_path / "m", field, lambda name, w: {f"{name}.compressed": w.flatten()})
    with pytest.raises(ConfigError, match=r"no plain model\.layers\.0\.mlp\.down_proj\.weight, which compressed-tensors stores otherwise"):
        models.load_model(str(tmp_path / "m"))


@pytest.mark.parametrize("kind", ["int8", "fp8", "buffer", "subclass"])
def test_packed_weights_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    model, tokenizer = models.load_model("tiny")
    layer = model.model.layers[1].mlp.up_proj
    if kind == "buffer":  # as GPTQ and AWQ have them
        layer.register_buffer("qweight", torch.zeros(8, 64, dtype=torch.int32))
    elif kind == "subclass":

        class Packed(torch.Tensor): ...

        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed), requires_grad=False)
    else:
        layer.weight = nn.Parameter(layer.weight.detach().to({"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]), requires_grad=False)
    name = "qweight" if kind == "buffer" else "weight"
    for use in (lambda: models.check_float_weights(model), lambda: models.save_model(model, tokenizer, tmp_path / "m")):
        with pytest.raises(ConfigError, match=rf"model\.layers\.1\.mlp\.up_proj\.{name} holds packed weights \(.*load the model with load_model"):
            use()
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", [*families.ALL, *families.STATES])
def test_plain_models_of_every_family_have_float_weights(name: str) -> None:
    models.check_float_weights(families.build(name))


def test_a_rest_of_a_quantisation_is_not_saved(tmp_path: Path) -> None:
    model, tokenizer = models.load_model("tiny")
    model.config.quantization_config = dict(FP8)
    model.is_quantized = True
    models.save_model(model, tokenizer, tmp_path / "m")
    assert "quantization_config" not in (tmp_path / "m" / "config.json").read_text()
    assert models.load_model(str(tmp_path / "m"))[0].config.hidden_size == 64


LIMITED = {"llama", "gpt2 (Conv1D)", "opt (biases, learned positions)", "gpt-neo", "falcon-h1", "bamba", "rwkv"}
UNLIMITED = {"bloom (alibi)", "mamba", "mamba2", "recurrent-gemma"}


@pytest.mark.parametrize("name", sorted(LIMITED | UNLIMITED))
def test_a_length_beyond_the_context_is_refused_where_a_family_has_one(name: str) -> None:
    model = families.build(name)
    for of in (model, model.config):
        models.check_length(of, 64, "text")
        if name in UNLIMITED:
            models.check_length(of, 10**6, "text")
        else:
            with pytest.raises(ConfigError, match="^text has 65 tokens a sample, more than the model's context of 64.$"):
                models.check_length(of, 65, "text")


def test_other_names_of_the_context() -> None:
    for config in (transformers.MptConfig(max_seq_len=64), transformers.GPTJConfig(n_positions=64), transformers.OpenAIGPTConfig(n_positions=64)):
        assert models.context(config) == 64


def test_a_configuration_is_read_without_weights(tmp_path: Path) -> None:
    models.save_model(*models.load_model("tiny"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    assert models.context(models.config_of(str(tmp_path / "m"))) == models.context(models.config_of("tiny")) == 512
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        models.config_of(str(tmp_path / "m"))


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

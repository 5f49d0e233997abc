"""Blocks on disk: the same numbers as with the whole model in memory, and never more than a window of it there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from reconkit import evaluation, models, offload, pruning
from reconkit.config import ConfigError, PruneConfig

CONFIGS = [
    PruneConfig(technique="LR"),
    PruneConfig(technique="BR", criterion="wanda", epochs=1, batch_size=4),
    PruneConfig(technique="BR+GP+CR", epochs=1, batch_size=4),
    PruneConfig(technique="BR+CR", criterion="magnitude", epochs=1, batch_size=4),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return models.save_model(*models.load_model("tiny", device="cpu"), tmp_path / "model")


def opened(folder: Path, name: str = "blocks") -> Any:
    return models.open_model(str(folder), folder.parent / name, device="cpu")[0]


def held(model: torch.nn.Module) -> int:
    """Bytes of the weights that are in memory."""
    return sum(p.untyped_storage().nbytes() for p in model.parameters())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.technique)
def test_pruning_gives_the_same_bits_and_a_folder_that_loads(config: PruneConfig, folder: Path, tmp_path: Path) -> None:
    ids, other = families.tokens(6, 16), families.tokens(3, 16, 1)
    whole, tokenizer = models.load_model(str(folder), device="cpu")
    expected = pruning.prune(whole, ids, config, held_out={"other": other}, progress=False)
    model = opened(folder)
    result = pruning.prune(model, ids, config, held_out={"other": other}, progress=False)
    assert result.errors.equals(expected.errors) and result.training.equals(expected.training)
    assert (result.sparsity, result.per_parameter) == (expected.sparsity, expected.per_parameter)
    assert held(model) < held(whole) / 3, "only what is outside the blocks"
    again, _ = models.load_model(str(models.save_model(model, tokenizer, tmp_path / "pruned")), device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))
    assert set(again.state_dict()) == set(whole.state_dict())


def test_no_more_than_a_window_is_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(folder)
    empty, seen = held(model), []
    one = sum(p.numel() * 4 for p in models.blocks(model)[1][0].parameters())
    read = offload.Offload._read

    def watched(self: Any, index: int) -> None:
        read(self, index)
        seen.append(round((held(model) - empty) / one))

    monkeypatch.setattr(offload.Offload, "_read", watched)
    pruning.prune(model, families.tokens(4, 16), PruneConfig(technique="BR+GP+CR", epochs=1), progress=False)
    assert max(seen) == 2 and len(seen) <= 2 + 2 * 4, "each block is read to be looked at and to be pruned"


def test_figures_of_a_model_on_disk_are_those_of_the_whole_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, tokenizer = models.load_model(str(folder), device="cpu")
    model, ids = opened(folder), families.tokens(7, 20)
    assert torch.allclose(evaluation.sequence_nll(model, ids, batch_size=3), evaluation.sequence_nll(whole, ids, batch_size=3), atol=1e-6)
    with monkeypatch.context() as patch:  # after the last block in slices
        patch.setattr(evaluation, "LOGITS", 7 * evaluation.vocabulary(whole))
        assert torch.allclose(evaluation.sequence_nll(model, ids, batch_size=3), evaluation.sequence_nll(whole, ids, batch_size=3), atol=1e-6)
        items = torch.tensor([[0, 4, 9, 5, 6], [6, 19, 7, 8, 9], [6, 3, 9, 8, 5]])
        assert torch.equal(evaluation.cloze(model, ids, items), evaluation.cloze(whole, ids, items))
    assert models.weights_sum(model) == models.weights_sum(whole)
    pruning.prune(model, ids, PruneConfig(technique="LR"), progress=False)
    pruning.prune(whole, ids, PruneConfig(technique="LR"), progress=False)
    assert evaluation.size(model) == evaluation.size(whole) and evaluation.size(model)["zeros"] == 0.5
    assert models.weights_sum(model) == models.weights_sum(whole), "finished blocks are read from where they were written"
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)


def test_a_killed_walk_continues(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, ids = PruneConfig(technique="BR+GP+CR", epochs=1, batch_size=4), families.tokens(6, 16)
    expected = opened(folder, "a")
    pruning.prune(expected, ids, config, progress=False)
    save, count = pruning.Checkpoint.save, []

    def dies(self: Any, done: int, *args: Any) -> None:
        save(self, done, *args)
        if done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(pruning.Checkpoint, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        pruning.prune(opened(folder, "b"), ids, config, checkpoint=tmp_path / "state", progress=False)
    monkeypatch.setattr(pruning.Checkpoint, "save", lambda self, done, *args: count.append(done) or save(self, done, *args))
    model = opened(folder, "c")
    pruning.prune(model, ids, config, checkpoint=tmp_path / "state", progress=False)
    assert count == [4, 5] and models.weights_sum(model) == models.weights_sum(expected)
    monkeypatch.undo()
    (tmp_path / "state" / "streams-5.pt").unlink()
    model = opened(folder, "d")
    pruning.prune(model, ids, config, checkpoint=tmp_path / "state", progress=False)
    assert models.weights_sum(model) == models.weights_sum(expected), "the streams are had again from the blocks"


@pytest.mark.parametrize("family", ["opt (biases, learned positions)", "gpt2 (Conv1D)", "gemma3 (sliding and full layers)", "mixtral (experts)"])
def test_families(family: str, tmp_path: Path) -> None:
    """Read from the folder that transformers writes, or refused in a sentence where that has another layout."""
    whole = families.build(family)
    models.save_model(whole, models.load_model("tiny")[1], tmp_path / "model")
    ids = families.tokens(3, 12)
    try:
        model = opened(tmp_path / "model")
    except ConfigError as error:
        assert "own layout" in str(error) and "mixtral" in family
        return
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, whole(ids).logits, atol=1e-6)
    assert torch.allclose(evaluation.sequence_nll(model, ids), evaluation.sequence_nll(whole, ids), atol=1e-5)


def test_shards_are_read_by_their_index(folder: Path, tmp_path: Path) -> None:
    whole, tokenizer = models.load_model(str(folder), device="cpu")
    whole.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert models.weights_sum(opened(tmp_path / "shards")) == models.weights_sum(whole)


def test_what_cannot_be_read_by_blocks_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model is 'tiny'; it must be in safetensors"):
        models.open_model("tiny", tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="new or an empty folder"):
        opened(folder, "full")
    (folder / "model.safetensors").rename(folder / "model.bin")
    with pytest.raises(ConfigError, match="holds no safetensors"):
        opened(folder)
    (folder / offload.INDEX).write_text(json.dumps({"weight_map": {"other": "model.bin"}}))
    with pytest.raises(ConfigError, match="no weight called model.embed_tokens.weight"):
        opened(folder)

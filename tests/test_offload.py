"""Blocks on disk: the same numbers as with the whole model in memory, and never more than a window of it there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from reconkit import checkpoint, evaluation, models, offload, pruning
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
    assert max(seen) == 2 and len(seen) <= 2 + 4 * 4, "each block is read to be looked at, compared on two batches, and pruned"


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
    save, count = checkpoint.Checkpoint.save, []

    def dies(self: Any, done: int, *args: Any) -> None:
        save(self, done, *args)
        if done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoint, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        pruning.prune(opened(folder, "b"), ids, config, checkpoint=tmp_path / "state", progress=False)
    monkeypatch.setattr(checkpoint.Checkpoint, "save", lambda self, done, *args: count.append(done) or save(self, done, *args))
    model = opened(folder, "c")
    pruning.prune(model, ids, config, checkpoint=tmp_path / "state", progress=False)
    assert count == [4, 5] and models.weights_sum(model) == models.weights_sum(expected)
    monkeypatch.undo()
    (tmp_path / "state" / "streams-5.pt").unlink()
    model = opened(folder, "d")
    pruning.prune(model, ids, config, checkpoint=tmp_path / "state", progress=False)
    assert models.weights_sum(model) == models.weights_sum(expected), "the streams are had again from the blocks"


FAMILIES = [
    "llama",
    "gpt2 (Conv1D)",
    "bloom (alibi)",
    "mixtral (experts)",
    "qwen3-moe",
    "glm4-moe (a bias that is a buffer)",
    "opt (biases, learned positions)",
    "gemma3 (sliding and full layers)",
]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What the safetensors of a folder hold."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_bits_of_the_whole_model(family: str, tmp_path: Path) -> None:
    built = families.build(family)
    for name, buffer in built.named_buffers():
        if name in built.state_dict():
            buffer.normal_(generator=torch.Generator().manual_seed(0))
    models.save_model(built, models.load_model("tiny")[1], tmp_path / "model")
    whole, tokenizer = models.load_model(str(tmp_path / "model"), device="cpu")
    model, ids = opened(tmp_path / "model"), families.tokens(6, 16)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    config = PruneConfig(technique="BR+GP", criterion="wanda", epochs=1, batch_size=4)
    expected = pruning.prune(whole, ids, config, held_out={"other": families.tokens(3, 16, 1)}, progress=False)
    result = pruning.prune(model, ids, config, held_out={"other": families.tokens(3, 16, 1)}, progress=False)
    assert result.errors.equals(expected.errors) and result.training.equals(expected.training) and result.sparsity == expected.sparsity
    ours, theirs = (tensors(models.save_model(m, tokenizer, tmp_path / name)) for m, name in ((model, "offloaded"), (whole, "whole")))
    assert ours.keys() == theirs.keys() == tensors(tmp_path / "model").keys(), "the layout of the checkpoint"
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = models.load_model(str(tmp_path / "offloaded"), device="cpu")[0].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.state_dict().items())


def test_experts_on_disk_one_by_one_and_in_several_files(tmp_path: Path) -> None:
    whole = families.build("mixtral (experts)")
    whole.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    models.load_model("tiny")[1].save_pretrained(tmp_path / "model")
    stored = tensors(tmp_path / "model")
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in stored and len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    model = opened(tmp_path / "model")
    with offload.holding(model, 1):
        experts = models.blocks(model)[1][1].mlp.experts
        assert torch.equal(experts.down_proj[3], stored["model.layers.1.block_sparse_moe.experts.3.w2.weight"])
        both = torch.cat([stored[f"model.layers.1.block_sparse_moe.experts.2.{w}.weight"] for w in ("w1", "w3")])
        assert torch.equal(experts.gate_up_proj[2], both)
    assert models.weights_sum(model) == models.weights_sum(whole)


def test_a_checkpoint_in_the_layout_of_the_model_itself(tmp_path: Path) -> None:
    whole = families.build("mixtral (experts)")
    whole.save_pretrained(tmp_path / "model", save_original_format=False)
    models.load_model("tiny")[1].save_pretrained(tmp_path / "model")
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors(tmp_path / "model")
    assert models.weights_sum(opened(tmp_path / "model")) == models.weights_sum(whole)


@pytest.mark.parametrize("family", ["gpt2 (Conv1D)", "opt (biases, learned positions)", "bloom (alibi)"])
def test_a_checkpoint_of_the_model_without_its_head_has_other_names(family: str, tmp_path: Path) -> None:
    whole = families.build(family)
    whole.base_model.save_pretrained(tmp_path / "model")
    models.load_model("tiny")[1].save_pretrained(tmp_path / "model")
    assert not set(tensors(tmp_path / "model")) & set(whole.state_dict())
    assert models.weights_sum(opened(tmp_path / "model")) == models.weights_sum(whole)


def test_a_missing_head_is_refused(tmp_path: Path) -> None:
    families.build("llama").base_model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="no weight called lm_head.weight, which LlamaForCausalLM needs"):
        opened(tmp_path / "model")


@pytest.mark.parametrize("there", ["embedding", "head", "both alike", "both unlike"])
def test_tied_weights_are_those_of_the_whole_model(there: str, folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    table = stored.pop("model.embed_tokens.weight")
    other = {"both alike": table.clone(), "both unlike": table + 1}.get(there, table)
    stored |= {"model.embed_tokens.weight": table} if there != "head" else {}
    stored |= {"lm_head.weight": other} if there != "embedding" else {}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    model, ids = opened(folder), families.tokens(2, 8)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, models.load_model(folder, device="cpu")[0](ids).logits)
    heads = model.lm_head.weight, model.model.embed_tokens.weight
    assert (heads[0] is heads[1]) == (there != "both unlike") and torch.equal(heads[0], other)
    pruning.prune(model, ids, PruneConfig(technique="LR"), progress=False)
    assert torch.equal(model.lm_head.weight, other), "it is read again after pruning"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_that_stay_in_fp32_do_so(dtype: torch.dtype, tmp_path: Path) -> None:
    built = families.build("glm4-moe (a bias that is a buffer)")
    models.save_model(built, models.load_model("tiny")[1], tmp_path / "model")
    whole = models.load_model(tmp_path / "model", device="cpu", dtype=dtype)[0]
    model = models.open_model(tmp_path / "model", tmp_path / "blocks", device="cpu", dtype=dtype)[0]
    assert {n: t.dtype for n, t in model.state_dict().items()} == {n: t.dtype for n, t in whole.state_dict().items()}


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


def test_weights_that_are_no_safetensors_are_refused_and_the_advice_works(folder: Path, tmp_path: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="load it whole and save it again"):
        opened(folder)
    whole, tokenizer = models.load_model(folder, device="cpu")
    assert models.weights_sum(opened(models.save_model(whole, tokenizer, tmp_path / "again"))) == models.weights_sum(whole)


def test_what_is_damaged_or_of_another_model_is_refused_before_work(folder: Path) -> None:
    good = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**good, name: good[name][:3].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"{name} as \(3, 64\), and config.json asks for \(160, 64\)"):
        opened(folder)
    save_file({n: t for n, t in good.items() if n != name}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"no weight called {name}"):
        opened(folder)
    (folder / "model.safetensors").write_bytes(b"no header" * 100)
    with pytest.raises(ConfigError, match="is damaged"):
        opened(folder)
    (folder / offload.INDEX).write_text(json.dumps({"weight_map": {name: "gone.safetensors"}}))
    with pytest.raises(ConfigError, match="There is no file .*gone.safetensors"):
        opened(folder)


def test_an_expert_that_is_missing_is_refused_before_work(tmp_path: Path) -> None:
    families.build("mixtral (experts)").save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    del stored["model.layers.2.block_sparse_moe.experts.1.w2.weight"]
    save_file(stored, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"down_proj as \(3, 32, 48\), and config.json asks for \(4, 32, 48\)"):
        opened(tmp_path / "model")


def test_quantized_weights_are_refused(folder: Path) -> None:
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ConfigError, match="quantized"):
        opened(folder)


def test_a_full_disk_leaves_no_part_of_a_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any, file: str, **__: Any) -> None:
        Path(file).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(offload, "save_file", full)
    model = opened(folder)
    with pytest.raises(OSError, match="cannot be written .*No space left") as raised:
        pruning.prune(model, families.tokens(4, 16), PruneConfig(technique="LR"), progress=False)
    assert raised.value.filename == str(folder.parent / "blocks" / "block-00000.safetensors")
    assert list((folder.parent / "blocks").iterdir()) == []

"""Bitmask and values: nothing is lost, and the size is what arithmetic says."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch

from reconkit import packing, pruning
from reconkit.config import PruneConfig


@pytest.mark.parametrize("family", ["llama", "gpt2 (Conv1D)", "mixtral (experts)", "opt (biases, learned positions)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_comes_back_bit_for_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = families.build(family).to(dtype)
    pruning.prune(model, families.tokens(4, 8), PruneConfig(criterion="magnitude", technique="LR"), progress=False)
    with torch.no_grad():
        first = next(iter(model.parameters()))
        first.flatten()[0] = -0.0
    sizes = packing.pack(model, tmp_path / "packed.safetensors")
    assert sizes["packed"] == (tmp_path / "packed.safetensors").stat().st_size < sizes["plain"]
    assert packing.same(model, packing.unpack(tmp_path / "packed.safetensors"))


def test_a_changed_bit_is_seen(tmp_path: Path) -> None:
    model = families.build("llama")
    packing.pack(model, tmp_path / "packed.safetensors")
    found = packing.unpack(tmp_path / "packed.safetensors")
    name = next(n for n in found if "q_proj" in n)
    found[name][0, 0] = -found[name][0, 0]
    assert not packing.same(model, found)
    assert not packing.same(model, {n: t for n, t in found.items() if n != name})


def test_the_size_is_a_bit_for_each_entry_and_the_values_that_are_left(tmp_path: Path) -> None:
    model = families.build("llama")
    result = pruning.prune(model, families.tokens(4, 8), PruneConfig(criterion="magnitude", technique="LR", sparsity=0.75), progress=False)
    sizes = packing.pack(model, tmp_path / "packed.safetensors")
    matrices = sum(p.numel() for n, p in model.named_parameters() if "layers" in n and p.ndim == 2)
    saved = matrices * 4 * result.sparsity - matrices / 8
    assert sizes["plain"] - sizes["packed"] == pytest.approx(saved, abs=8000), "besides the names in the header"

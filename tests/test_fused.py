"""The kernel for GPUs does what the columns one by one do."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import util

import pytest
import torch

from reconkit import criteria

# It comes with the builds of torch for CUDA, and is too large to be fetched for these tests alone.
triton = pytest.mark.skipif(not util.find_spec("triton"), reason="Triton is not installed")

ONE_BY_ONE = """
import torch
from reconkit import criteria, fused
torch.manual_seed(0)
for count, rows, dtype in [(1, 5, torch.float32), (4, 70, torch.float32), (128, 33, torch.float32), (37, 64, torch.float64)]:
    around = torch.randn(count + 3, 2 * count, dtype=dtype) / 4 / count**0.5  # a part of a larger matrix, as in the solver
    w, moves, kept = torch.randn(count, rows, dtype=dtype), torch.randn(count, rows, dtype=dtype), torch.rand(count, rows) > 0.5
    lower, expected, found = around[3:, 1 : count + 1], torch.empty_like(w), torch.full_like(w, float("nan"))
    criteria._columns(w, kept, moves.clone(), lower, expected)
    fused.columns(w, kept, moves, lower, found)
    assert (found - expected).norm() < (1e-6 if dtype == torch.float32 else 1e-14) * expected.norm(), (count, rows)
"""

COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from reconkit import fused
sizes = {"COLUMNS": fused.COLUMNS, "ROWS": fused.ROWS}
pointers = {"kept": "*i1", **dict.fromkeys(("w", "moves", "lower", "changes"), "*fp32"), **dict.fromkeys(sizes, "constexpr")}
source = ASTSource(fused._columns, {name: pointers.get(name, "i32") for name in fused._columns.arg_names}, constexprs=sizes)
for capability in (75, 80, 90):
    assert compile(source, GPUTarget("cuda", capability, 32)).asm["ptx"]
"""


@triton
@pytest.mark.slow
@pytest.mark.parametrize(("script", "interpret"), [(ONE_BY_ONE, "1"), (COMPILED, "0")], ids=["interpreted", "compiled"])
def test_without_a_gpu_the_kernel_is_interpreted_and_compiled(script: str, interpret: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "TRITON_INTERPRET": interpret}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@triton
@pytest.mark.gpu
@pytest.mark.parametrize("nm", [None, (2, 4)])
def test_on_a_gpu_the_solver_gives_what_it_gives_without_the_kernel(nm: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(2048, 300, device="cuda"), [torch.randn(rows, 300, device="cuda") for rows in (65, 512)]
    statistics = criteria.Statistics(300, hessian=True, device="cuda")
    statistics.add(x)
    found, masks, _ = criteria.sparsegpt(weights, statistics, [0.5, 0.3], nm)
    assert criteria._walk(x.device)[0] is not criteria._columns
    monkeypatch.setattr(criteria, "_walk", lambda _: (criteria._columns, criteria.SUB_BLOCK))
    expected, expected_masks, _ = criteria.sparsegpt(weights, statistics, [0.5, 0.3], nm)
    for a, b, mask, other in zip(found, expected, masks, expected_masks, strict=True):
        assert (mask == other).float().mean() > 0.999
        same = (mask == other).all(1)
        assert same.float().mean() > 0.5 and torch.allclose(a[same], b[same], atol=1e-4)
        assert (a - b)[mask == other].abs().median() < 1e-5

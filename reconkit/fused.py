"""SparseGPT's walk through the columns as one kernel (Triton), for a GPU, where a column of its own costs more to start than to compute."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 128  # at most at once
ROWS = 32  # a program: with so many columns, their changes fit into its registers


def columns(w: Tensor, kept: Tensor, moves: Tensor, lower: Tensor, changes: Tensor) -> None:
    """What `criteria._columns` does: fill `changes` (columns, rows) from `w`, `kept` and `moves` of that shape and `lower` (columns, columns).

    All have their last dimension contiguous; there are at most `COLUMNS` columns, and only what is below the diagonal of `lower` is read.
    """
    count, rows = w.shape
    grid = (triton.cdiv(rows, ROWS),)
    strides = (w.stride(0), kept.stride(0), moves.stride(0), lower.stride(0), changes.stride(0))
    with torch.cuda.device_of(w):
        _columns[grid](w, kept, moves, lower, changes, count, rows, *strides, COLUMNS=max(16, triton.next_power_of_2(count)), ROWS=ROWS)


@triton.jit
def _columns(
    w, kept, moves, lower, changes, count, rows, w_stride, kept_stride, moves_stride, lower_stride, changes_stride,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, COLUMNS)
    done = tl.zeros((COLUMNS, ROWS), dtype=changes.dtype.element_ty)
    for j in range(count):
        factors = tl.load(lower + j * lower_stride + column, mask=column < j, other=0.0)
        move = tl.load(moves + j * moves_stride + row, mask=inside, other=0.0) + tl.sum(factors[:, None] * done, 0)
        weight = tl.load(w + j * w_stride + row, mask=inside, other=0.0)
        keep = tl.load(kept + j * kept_stride + row, mask=inside, other=0)
        change = tl.where(keep != 0, -move, weight)
        tl.store(changes + j * changes_stride + row, change, mask=inside)
        done = tl.where(column[:, None] == j, change[None, :], done)

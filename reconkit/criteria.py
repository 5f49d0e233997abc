"""What chooses the mask: magnitude, Wanda and SparseGPT, unstructured and N:M. Pure functions of tensors.

Weights are (out, in); a mask is True where a weight is kept. Exactly `round(sparsity · n)` entries of each group of n
go, the lowest scores first, and among equal scores the lower flat index (row by row).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import util

import numpy as np
import torch
from torch import Tensor

SUB_BLOCK = 16  # columns updated one by one inside SparseGPT's column block; the rest of the block follows by one product
ROWS = 256  # rows whose groups of M are ranked at once, which takes 2 · M bytes a weight
BAND = 256  # rows that a factorisation takes at once
RAISE = 10.0  # factor between two tries of the damping
TRIES = 6


class Statistics:
    """Sums over the inputs X (tokens, columns) of layers that read the same tensor: of squares, and with `hessian` of products."""

    def __init__(self, columns: int, *, hessian: bool = False, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.count = 0
        "Tokens seen."
        self.hessian = torch.zeros(columns, columns, dtype=dtype, device=device) if hessian else None
        "Σ x xᵀ (columns, columns)."
        self._squares = torch.zeros(columns, dtype=torch.float64, device="cpu" if str(device).startswith("mps") else device)

    def add(self, x: Tensor) -> None:
        """Add the inputs `x` (tokens, columns)."""
        self.count += len(x)
        if self.hessian is not None:
            x = x.to(self.hessian.dtype)
            self.hessian.addmm_(x.t(), x)
        else:
            self._squares += x.float().square().sum(0).to(self._squares.device).double()

    @property
    def square_sum(self) -> Tensor:
        """Σ x² of each column (columns,)."""
        return self._squares if self.hessian is None else self.hessian.diagonal()


def lowest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` lowest of each row of `scores` (groups, n); ties go to the lower index."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _smallest(scores, count)
    if scores.is_cpu:
        chosen = scores <= threshold
        if chosen.count_nonzero() == count * len(scores):  # no ties to break
            return chosen
    below, ties = scores < threshold, scores == threshold
    return below | (ties & (ties.cumsum(-1) <= count - below.sum(-1, keepdim=True)))


def _smallest(scores: Tensor, count: int) -> Tensor:
    """The `count`-th smallest of each row (groups, 1); on a CPU, numpy's partition is ten times as fast as kthvalue."""
    if scores.is_cpu and scores.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.partition(scores.detach().numpy(), count - 1)[:, count - 1 : count])
    return scores.kthvalue(count, dim=-1, keepdim=True).values


def _nm(scores: Tensor, kept: int) -> Tensor:
    """The `kept` highest along the first axis of `scores` (M, ...); ties keep the higher index."""
    size, rest = len(scores), (1,) * (scores.ndim - 1)
    pairs = torch.ones(size, size, dtype=torch.uint8, device=scores.device).triu_(1).view(size, size, *rest)
    lower = (scores.unsqueeze(1) <= scores).view(torch.uint8) * pairs  # [i, k]: i goes before k, for i < k
    rank = lower.sum(0, dtype=torch.int16) - lower.sum(1, dtype=torch.int16)
    return rank >= torch.arange(1 - kept, size - kept + 1, device=scores.device).view(size, *rest)


def _nm_mask(scores: Tensor, nm: tuple[int, int]) -> Tensor:
    """Kept entries (out, in): the N highest of each M neighbours along the input."""
    parts = (rows.unflatten(-1, (-1, nm[1])).movedim(-1, 0).contiguous() for rows in scores.split(ROWS))
    return torch.cat([_nm(part, nm[0]).movedim(0, -1).flatten(-2) for part in parts])


SHARE = 0.3  # share of zeros from which a matrix was pruned before; formats of 4 bits bring fewer
LARGEST_M = 16  # of the N:M patterns that are looked for


def pruned_before(weight: Tensor) -> bool:
    """Whether the zeros of `weight` (out, in) are those of an earlier pruning: at least `SHARE` of the entries, or some in each group of M
    neighbours for any M up to `LARGEST_M`."""
    zero = weight == 0
    share = float(zero.sum()) / max(1, zero.numel())
    if share >= SHARE:
        return True
    sizes = [m for m in range(2, LARGEST_M + 1) if share >= 1 / m]
    return any(side.shape[1] % m == 0 and bool(side.unflatten(1, (-1, m)).any(-1).all()) for side in (zero, zero.t()) for m in sizes)


def _zeros_first(scores: Tensor, zeros: Tensor | None) -> Tensor:
    """Scores in which the entries that must stay zero are the lowest."""
    return scores if zeros is None else scores.masked_fill(zeros, -1.0)


def _without(mask: Tensor, zeros: Tensor | None) -> Tensor:
    """The kept entries without those that must stay zero: more of them than asked for all stay zero."""
    return mask if zeros is None else mask & ~zeros


def magnitude_mask(weight: Tensor, sparsity: float, nm: tuple[int, int] | None = None, zeros: Tensor | None = None) -> Tensor:
    """Keep the largest |W|; the group is the whole matrix, or M along the input for an N:M pattern.

    `zeros` (out, in) are entries that stay zero; they count towards their group's number. So it is in `wanda_mask` and `sparsegpt`.
    """
    scores = _zeros_first(weight.abs(), zeros)
    mask = _nm_mask(scores, nm) if nm else ~lowest(scores.reshape(1, -1), round(sparsity * weight.numel())).reshape(weight.shape)
    return _without(mask, zeros)


def wanda_mask(
    weight: Tensor, statistics: Statistics, sparsity: float, nm: tuple[int, int] | None = None, zeros: Tensor | None = None
) -> Tensor:
    """Keep the largest |W| · ‖x‖₂ (Sun et al., 2024); the group is a row, or M along the input for an N:M pattern."""
    scores = _zeros_first(weight.abs() * statistics.square_sum.sqrt().to(weight), zeros)
    return _without(_nm_mask(scores, nm) if nm else ~lowest(scores, round(sparsity * weight.shape[1])), zeros)


def sparsegpt(
    weights: Sequence[Tensor],
    statistics: Statistics,
    sparsities: Sequence[float],
    nm: tuple[int, int] | None = None,
    *,
    damping: float = 0.01,
    column_block: int = 128,
    zeros: Sequence[Tensor | None] | None = None,
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Optimal-brain-surgeon pruning column by column (Frantar and Alistarh, 2023) of layers that read the same input.

    A removed weight w of column j scores w² / U[j, j]² with Uᵀ U the inverse Hessian, U upper triangular, and its error is
    undone as far as possible by the columns after it. The group is `column_block` columns × all rows of a matrix, or M along
    the input for an N:M pattern.

    U is never formed. With R = U⁻¹, so that H = R Rᵀ, the change d (old minus new weights) that costs least has, in every
    column that is still free, d_j = −Σ_{k<j} R[k, j] d_k / R[j, j]: a triangular solve, in which a removed weight has d_j = w_j.

    Args:
        weights: matrices (outᵢ, in) in the dtype of the Hessian.
        sparsities: one for each matrix.
        damping: added to the Hessian's diagonal, as a share of its mean; raised tenfold as often as the Hessian is not
            positive definite, which the notes then say.
        zeros: for each matrix the entries (outᵢ, in) that stay zero, or None.

    Returns:
        new weights (outᵢ, in) with zeros in place, masks (outᵢ, in), notes.

    Raises:
        FloatingPointError: no damping up to `damping` · 10⁵ makes the Hessian positive definite.
    """
    lower, notes = _factor(statistics.hessian, damping)
    scale = lower.diagonal().clone().unsqueeze(1)  # 1 / U[j, j]
    lower /= scale  # row j: R[k, j] / R[j, j]
    sizes = [len(m) for m in weights]
    w = torch.cat(list(weights)).t().contiguous()  # (in, rows of all): a column is contiguous
    stay = _stacked(weights, zeros)
    changes, kept = torch.empty_like(w), torch.empty_like(w, dtype=torch.bool)  # changes: old minus new
    columns, most = _column_update(w.device)
    step = nm[1] if nm else most
    width = -(-column_block // step) * step if nm else column_block
    for start in range(0, len(w), width):
        stop = min(start + width, len(w))
        block = slice(start, stop)
        moves = lower[block, :start] @ changes[:start]  # what the changes so far add to the block's weights
        if nm is None:
            scores = _zeros_first(_scores(w[block], moves, lower[block, block], scale[block]), None if stay is None else stay[block])
            for score, share, mask in zip(scores.split(sizes, 1), sparsities, kept[block].split(sizes, 1), strict=True):
                group = score.t().reshape(1, -1)
                mask.copy_(~lowest(group, round(share * group.numel())).view(score.t().shape).t())
            kept[block] = _without(kept[block], None if stay is None else stay[block])
        for first in range(start, stop, step):
            part = slice(first, min(first + step, stop))
            moved = moves[first - start : part.stop - start].addmm_(lower[part, start:first], changes[start:first])
            if nm:
                there = None if stay is None else stay[part]
                kept[part] = _without(_nm(_zeros_first(_scores(w[part], moved, lower[part, part], scale[part]), there), nm[0]), there)
            columns(w[part], kept[part], moved, lower[part, part], changes[part])
    w -= changes
    return [m.t().contiguous() for m in w.split(sizes, 1)], [m.t().contiguous() for m in kept.split(sizes, 1)], notes


def _stacked(weights: Sequence[Tensor], zeros: Sequence[Tensor | None] | None) -> Tensor | None:
    """Entries that stay zero (in, rows of all), None where there are none."""
    if zeros is None or all(z is None for z in zeros):
        return None
    return torch.cat([torch.zeros_like(m, dtype=torch.bool) if z is None else z for m, z in zip(weights, zeros, strict=True)]).t().contiguous()


def _scores(w: Tensor, moves: Tensor, lower: Tensor, scale: Tensor) -> Tensor:
    """|w| / U[j, j] of neighbouring columns (columns, rows), if none of them were removed."""
    moved = torch.linalg.solve_triangular(lower.t(), moves.t(), upper=True, left=False, unitriangular=True).t()  # so laid out, nothing is copied
    return moved.add_(w).mul_(scale).abs_()


def _column_update(device: torch.device) -> tuple[Callable[..., None], int]:
    """The function that updates neighbouring columns on this device, and how many it takes at once: a Triton kernel where one can run."""
    if device.type == "cuda" and util.find_spec("triton") and torch.cuda.get_device_capability(device) >= (7, 5):
        from . import fused

        return fused.columns, fused.COLUMNS
    return _columns, SUB_BLOCK


def _columns(w: Tensor, kept: Tensor, moves: Tensor, lower: Tensor, changes: Tensor) -> None:
    """Fill `changes` column by column: a removed weight changes by its own value, a kept one by the updates of the columns before it."""
    keep = kept.to(w.dtype)
    torch.addcmul(w, keep, w, value=-1, out=changes)
    for j, (move, row, mask, change) in enumerate(zip(moves, lower, keep, changes, strict=True)):
        if j:
            move.addmv_(changes[:j].t(), row[:j])
        change.addcmul_(mask, move, value=-1)


def _factor(hessian: Tensor, damping: float) -> tuple[Tensor, list[str]]:
    """Rᵀ with R Rᵀ = H + λ I for an upper triangular R, and a note where λ was raised. Entries above the diagonal are arbitrary.

    R⁻¹ is the factor U of the inverse.
    """
    mean = hessian.diagonal().mean()
    unit = torch.where(mean > 0, mean, torch.ones_like(mean))
    for tried in range(TRIES):
        share = damping * RAISE**tried
        damped = hessian.clone()
        damped.diagonal().add_(share * unit)
        if _reversed_cholesky(damped):
            times = "" if tried == 1 else f" {tried} times"
            raised = f"the Hessian was not positive definite, so damping was raised{times}, from {damping:g} to {share:g}"
            return damped, [raised] if tried else []
    raise FloatingPointError(f"A Hessian is not positive definite even with damping {share:g}; look at the calibration text, or raise damping.")


def _reversed_cholesky(matrix: Tensor) -> bool:
    """Overwrite `matrix` (n, n) with the lower triangular L for which LᵀL = `matrix`; return whether there is one.

    The entries above the diagonal are not cleared. L is the Cholesky factor of the matrix with reversed rows and columns. It is computed
    a band at a time from the last rows up: torch would copy the whole matrix twice and clear the other triangle, which doubles the time.
    """
    for start in reversed(range(0, len(matrix), BAND)):
        band = slice(start, min(start + BAND, len(matrix)))
        rows = matrix[band, : band.stop].addmm_(matrix[band.stop :, band].t(), matrix[band.stop :, : band.stop], alpha=-1)
        factor, info = torch.linalg.cholesky_ex(rows[:, start:].flip(0, 1))
        if int(info) or not torch.isfinite(factor.diagonal()).all():
            return False
        rows[:, start:] = factor.t().flip(0, 1)
        rows[:, :start] = torch.linalg.solve_triangular(rows[:, start:], rows[:, :start].t(), upper=False, left=False).t()  # copies along the grain
    return True

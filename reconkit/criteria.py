"""What chooses the mask: magnitude, Wanda and SparseGPT, unstructured and N:M. Pure functions of tensors.

Weights are (out, in); a mask is True where a weight is kept. Exactly `round(sparsity · n)` entries of each group of n
go, the lowest scores first, and among equal scores the lower flat index (row by row).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SUB_BLOCK = 32  # columns updated one by one inside SparseGPT's column block; the rest of the block follows by one product
RAISE = 10.0  # factor between two tries of the damping
TRIES = 6


class Statistics:
    """Sums over the inputs (tokens, columns) of layers that read the same tensor: of squares, and of products where asked for."""

    def __init__(self, columns: int, *, hessian: bool = False, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.count = 0
        "Tokens seen."
        self.hessian = torch.zeros(columns, columns, dtype=dtype, device=device) if hessian else None
        "Σ x xᵀ (columns, columns)."
        self._squares = torch.zeros(columns, dtype=torch.float64, device="cpu" if str(device).startswith("mps") else device)

    def add(self, x: Tensor) -> None:
        """Count the inputs `x` (tokens, columns)."""
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
    threshold = scores.kthvalue(count, dim=-1, keepdim=True).values
    below, ties = scores < threshold, scores == threshold
    return below | (ties & (ties.cumsum(-1) <= count - below.sum(-1, keepdim=True)))


def _nm(scores: Tensor, nm: tuple[int, int]) -> Tensor:
    """Kept entries (out, in): the N highest of each M neighbours along the input."""
    kept, group = nm
    return ~lowest(scores.reshape(-1, group), group - kept).reshape(scores.shape)


def magnitude_mask(weight: Tensor, sparsity: float, nm: tuple[int, int] | None = None) -> Tensor:
    """Keep the largest |W|; the group is the whole matrix, or M along the input for an N:M pattern."""
    scores = weight.abs()
    return _nm(scores, nm) if nm else ~lowest(scores.reshape(1, -1), round(sparsity * weight.numel())).reshape(weight.shape)


def wanda_mask(weight: Tensor, statistics: Statistics, sparsity: float, nm: tuple[int, int] | None = None) -> Tensor:
    """Keep the largest |W| · ‖x‖₂ (Sun et al., 2024); the group is a row, or M along the input for an N:M pattern."""
    scores = weight.abs() * statistics.square_sum.sqrt().to(weight)
    return _nm(scores, nm) if nm else ~lowest(scores, round(sparsity * weight.shape[1]))


def sparsegpt(
    weights: Sequence[Tensor],
    statistics: Statistics,
    sparsities: Sequence[float],
    nm: tuple[int, int] | None = None,
    *,
    damping: float = 0.01,
    column_block: int = 128,
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Optimal-brain-surgeon pruning column by column (Frantar and Alistarh, 2023) of layers that read the same input.

    A removed weight w of column j scores w² / U[j, j]² with Uᵀ U the inverse Hessian, U upper triangular, and its error is
    undone as far as possible by the columns after it. The group is `column_block` columns × all rows of a matrix, or M along
    the input for an N:M pattern.

    Args:
        weights: matrices (outᵢ, in) in the dtype of the Hessian.
        sparsities: one for each matrix.
        damping: added to the Hessian's diagonal, as a share of its mean; raised tenfold as often as the Hessian is not
            positive definite, which the notes then say.

    Returns:
        new weights (outᵢ, in) with zeros in place, masks (outᵢ, in), notes.

    Raises:
        FloatingPointError: no damping up to `damping` · 10⁵ makes the Hessian positive definite.
    """
    upper, notes = _inverse_factor(statistics.hessian, damping)
    sizes = [len(w) for w in weights]
    w = torch.cat([m.t() for m in weights], dim=1).contiguous()  # (in, rows of all): a column is contiguous
    kept = torch.ones_like(w, dtype=torch.bool)
    columns, diagonal = len(w), upper.diagonal().unsqueeze(1)
    step = max(SUB_BLOCK // nm[1], 1) * nm[1] if nm else SUB_BLOCK
    column_block = -(-column_block // nm[1]) * nm[1] if nm else column_block
    for start in range(0, columns, column_block):
        stop = min(start + column_block, columns)
        if nm is None:
            scores = (w[start:stop] / diagonal[start:stop]).square()
            for part, share, mask in zip(scores.split(sizes, 1), sparsities, kept[start:stop].split(sizes, 1), strict=True):
                group = part.t().reshape(1, -1)
                mask.copy_(~lowest(group, round(share * group.numel())).reshape(part.t().shape).t())
        errors = torch.empty_like(w[start:stop])
        for first in range(start, stop, step):
            last = min(first + step, stop)
            for j in range(first, last):
                if nm and j % nm[1] == 0:
                    scores = (w[j : j + nm[1]] / diagonal[j : j + nm[1]]).square()
                    kept[j : j + nm[1]] = _nm(scores.t().contiguous(), nm).t()
                error = errors[j - start] = w[j].masked_fill(kept[j], 0) / upper[j, j]
                w[j + 1 : last].addr_(upper[j, j + 1 : last], error, alpha=-1)
            w[last:stop].addmm_(upper[first:last, last:stop].t(), errors[first - start : last - start], alpha=-1)
        w[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    w.mul_(kept)
    return [m.t().contiguous() for m in w.split(sizes, 1)], [m.t().contiguous() for m in kept.split(sizes, 1)], notes


def _inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, list[str]]:
    """U upper triangular with Uᵀ U = (H + λ I)⁻¹, and a note where λ had to be raised.

    With the order of the columns reversed, H = R Rᵀ for an upper triangular R, so U = R⁻¹: one factorisation and one solve.
    """
    mean = hessian.diagonal().mean()
    unit = torch.where(mean > 0, mean, torch.ones_like(mean))
    for tried in range(TRIES):
        share = damping * RAISE**tried
        damped = hessian + torch.diag_embed((share * unit).expand(len(hessian)))
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0 and torch.isfinite(lower).all():
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device), upper=True)
            times = "" if tried == 1 else f" {tried} times"
            return upper, [f"the Hessian was not positive definite, so damping was raised{times}, from {damping:g} to {share:g}"] if tried else []
    raise FloatingPointError(f"A Hessian is not positive definite even with damping {share:g}; look at the calibration text, or raise damping.")

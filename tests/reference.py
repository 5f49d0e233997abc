"""The slow, obvious twin of every fast routine."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def lowest(scores: list[float], count: int) -> list[bool]:
    """True at the `count` lowest; ties go to the lower index."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return [i in order[:count] for i in range(len(scores))]


def group_mask(scores: Tensor, count: int) -> Tensor:
    """Kept entries of one group of any shape, flat index row by row."""
    return ~torch.tensor(lowest(scores.flatten().tolist(), count)).view(scores.shape)


def magnitude_mask(weight: Tensor, sparsity: float, nm: tuple[int, int] | None = None) -> Tensor:
    if nm:
        return nm_mask(weight.abs(), nm)
    return group_mask(weight.abs(), round(sparsity * weight.numel()))


def wanda_mask(weight: Tensor, inputs: Tensor, sparsity: float, nm: tuple[int, int] | None = None) -> Tensor:
    norms = torch.tensor([math.sqrt(sum(v * v for v in column)) for column in inputs.double().t().tolist()])
    scores = weight.abs() * norms.to(weight)
    if nm:
        return nm_mask(scores, nm)
    return torch.stack([group_mask(row, round(sparsity * len(row))) for row in scores])


def nm_mask(scores: Tensor, nm: tuple[int, int]) -> Tensor:
    kept, group = nm
    rows = [torch.cat([group_mask(part, group - kept) for part in row.split(group)]) for row in scores]
    return torch.stack(rows)


def sparsegpt(
    weight: Tensor, inputs: Tensor, sparsity: float, nm: tuple[int, int] | None = None, *, damping: float = 0.01, column_block: int = 128
) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon, column by column: the inverse Hessian of the columns that are left is computed anew for each.

    With F the columns from j on and G = (H_FF)⁻¹, removing w_j costs w_j² / G_00 and moves the others by −w_j / G_00 · G_0.
    Scores of a whole column block are ranked when its first column is reached (N:M: of a group of M).
    """
    w = weight.double().clone()
    h = inputs.double().t() @ inputs.double()
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    columns = len(h)
    corner = torch.tensor([torch.linalg.inv(h[j:, j:])[0, 0].item() for j in range(columns)], dtype=torch.float64)
    mask = torch.ones_like(w, dtype=torch.bool)
    for j in range(columns):
        if nm and j % nm[1] == 0:
            part = slice(j, j + nm[1])
            mask[:, part] = nm_mask(w[:, part] ** 2 / corner[part], nm)
        elif not nm and j % column_block == 0:
            part = slice(j, min(j + column_block, columns))
            scores = w[:, part] ** 2 / corner[part]
            mask[:, part] = group_mask(scores, round(sparsity * scores.numel()))
        inverse = torch.linalg.inv(h[j:, j:])
        for row in range(len(w)):
            if not mask[row, j]:
                w[row, j:] -= w[row, j] / inverse[0, 0] * inverse[0]
                w[row, j] = 0
    return w * mask, mask


def train_masked(
    module: torch.nn.Module, weight: torch.nn.Parameter, mask: Tensor, x: Tensor, y: Tensor, steps: int, rate: float, clip: float | None
) -> None:
    """AdamW on all samples at once; the masked weights are set to zero again after every step."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        ((module(x) - y) ** 2).mean().backward()
        if clip is not None:
            weight.grad[~mask] = 0
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        weight.data[~mask] = 0


def error(dense: Tensor, sparse: Tensor) -> tuple[float, float, float, float]:
    """(MSE, NMSE, median and 90th percentile of the token NMSE), scalar by scalar and token by token."""
    tokens = sorted(
        sum((a - b) ** 2 for a, b in zip(d, s, strict=True)) / sum(a * a for a in d)
        for d, s in zip(dense.double().flatten(0, 1).tolist(), sparse.double().flatten(0, 1).tolist(), strict=True)
    )

    def quantile(share: float) -> float:
        place = share * (len(tokens) - 1)
        below, above = tokens[math.floor(place)], tokens[math.ceil(place)]
        return below + (place - math.floor(place)) * (above - below)

    pairs = list(zip(dense.double().flatten().tolist(), sparse.double().flatten().tolist(), strict=True))
    mse = sum((d - s) ** 2 for d, s in pairs) / len(pairs)
    return mse, mse / (sum(d * d for d, _ in pairs) / len(pairs)), quantile(0.5), quantile(0.9)


def perplexity(model: torch.nn.Module, samples: Tensor) -> float:
    """One sequence, one token at a time: exp of the mean of −log p(next token)."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in samples:
            log_p = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            for position in range(len(ids) - 1):
                total -= log_p[position, ids[position + 1]].item()
                count += 1
    return math.exp(total / count)


def paired_difference(first: list[int], second: list[int]) -> tuple[float, float, float]:
    """Mean of the differences item by item, and its 95 % interval."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    half = 1.959963984540054 * (variance / len(differences)) ** 0.5
    return mean, mean - half, mean + half


def clustered_error(values: Any, cluster: list[int]) -> float:
    """Standard error of the mean of items that share texts: sums of the deviations, text by text."""
    mean = sum(values) / len(values)
    sums: dict[int, float] = {}
    for value, text in zip(values, cluster, strict=True):
        sums[text] = sums.get(text, 0.0) + value - mean
    return (sum(s * s for s in sums.values()) * len(sums) / (len(sums) - 1)) ** 0.5 / len(values)


def front(table: Any, quality: str, cost: str, *, higher: bool) -> list[bool]:
    """Each row against every other one."""
    rows = [(c, -q if higher else q) for c, q in zip(table[cost], table[quality], strict=True)]
    whole = [c == c and q == q for c, q in rows]
    return [
        there and not any(other and (d <= c and r <= q) and (d < c or r < q) for (d, r), other in zip(rows, whole, strict=True))
        for (c, q), there in zip(rows, whole, strict=True)
    ]

"""Log-likelihoods of continuations on a live model, for questions that begin alike: the same numbers as one by one, in fewer passes."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .models import read_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pair = tuple[list[int], list[int]]
"Token ids of a context, at least one, and of its continuation, at least one."
Answer = tuple[float, bool]
"log p of a continuation given its context, and whether it is what the model would write greedily."


def _groups(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Neighbours with one context."""
    return [list(members) for _, members in itertools.groupby(pairs, key=lambda pair: pair[0])]


def few(pairs: Sequence[Pair]) -> list[Pair]:
    """Requests that show whether a route is right.

    The longest shows what is lost over a distance. That of the longest continuation shows a state that is not carried from token to
    token. Two of one context, of several tokens if there is such a one, and those of the two shortest contexts show what leaks
    from one continuation or context into another.
    """
    groups = sorted(_groups(pairs), key=lambda members: len(members[0][0]))
    branching = [members for members in groups if len(members) > 1 and len(members[0][0]) > 1]
    longest = [max(pairs, key=lambda pair: len(pair[0]) + len(pair[1])), max(pairs, key=lambda pair: len(pair[1]))]
    return [*longest, *(branching or groups)[0][:2], *(members[0] for members in groups[:2])]


def agrees(
    route: Callable[[PreTrainedModel, Sequence[Pair]], list[Answer]], model: PreTrainedModel, pairs: Sequence[Pair], expected: Sequence[Answer]
) -> bool:
    """Whether this route gives the model's log-likelihoods up to rounding."""
    try:
        found = route(model, pairs)
    except Exception:  # families that cannot be called so have no error in common
        return False
    return all(math.isclose(ours[0], theirs[0], rel_tol=1e-5, abs_tol=1e-3) for ours, theirs in zip(found, expected, strict=True))


PACK = 384
"Tokens of a pack, unless one question has more: fewer read the weights more often, more spend longer on attention that the mask hides."


def packed(model: PreTrainedModel, pairs: Sequence[Pair]) -> list[Answer]:
    """Answers to requests, many in one pass: a pack is a tree of tokens in which what begins alike is read once.

    Each token attends to its ancestors in the tree, as in tree attention (SpecInfer, Miao et al. 2024), and its position is its depth.

    Args:
        pairs: requests, sorted, so that those that begin alike are neighbours.

    Raises:
        ValueError: the model takes no positions, or may also mask by the place in the row, as some do that do not use sdpa.
    """
    if getattr(model.config, "_attn_implementation", None) != "sdpa" or "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__} cannot be asked in packs.")
    packs: list[Tree] = []
    for members in _groups(pairs):
        most = len(members[0][0]) + sum(len(end) for _, end in members)
        if not packs or len(packs[-1].nodes) + most > PACK:
            packs.append(Tree())
        for context, end in members:
            packs[-1].add(context, end)
    return [answer for tree in packs for answer in tree.answers(model)]


class Tree:
    """Requests as one tree of tokens."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[int, int], int] = {}
        "(parent, token) → node; parents come first."
        self.wanted: list[tuple[list[int], list[int]]] = []
        "For each request: the nodes that predict its continuation, and the continuation."

    def add(self, context: list[int], end: list[int]) -> None:
        path = [-1]
        for token in [*context, *end[:-1]]:
            path.append(self.nodes.setdefault((path[-1], token), len(self.nodes)))
        self.wanted.append((path[-len(end) :], end))

    @torch.no_grad()
    def answers(self, model: PreTrainedModel) -> list[Answer]:
        """One pass over the tree; logits only where a continuation is predicted."""
        size = len(self.nodes)
        sees = np.eye(size, dtype=bool)  # (size, size): node, ancestor or itself
        for node, (parent, _) in enumerate(self.nodes):
            if parent >= 0:
                sees[node] |= sees[parent]
        rows = {node: row for row, node in enumerate(sorted({node for path, _ in self.wanted for node in path}))}
        blocked = torch.full((size, size), torch.finfo(model.dtype).min, dtype=model.dtype).masked_fill(torch.from_numpy(sees), 0)
        logits = model(
            input_ids=torch.tensor([[token for _, token in self.nodes]]),
            attention_mask=blocked[None, None],
            position_ids=torch.from_numpy(sees.sum(1) - 1)[None],
            logits_to_keep=torch.tensor(list(rows)),
            use_cache=False,
        ).logits[0]
        likely, greedy = logits.float().log_softmax(-1), logits.argmax(-1)
        found = []
        for path, end in self.wanted:
            at, chosen = [rows[node] for node in path], torch.tensor(end)
            found.append((float(likely[at, chosen].sum()), bool((greedy[at] == chosen).all())))
        return found


def shared(model: PreTrainedModel, pairs: Sequence[Pair]) -> list[Answer]:
    """Answers to requests, those of one context, which are neighbours, from one pass over it and one over all its continuations."""
    return [answer for members in _groups(pairs) for answer in continuations(model, members[0][0], [end for _, end in members])]


@torch.no_grad()
def continuations(model: PreTrainedModel, context: list[int], ends: Sequence[list[int]]) -> list[Answer]:
    """(log p of each continuation given `context`, whether it is what the model would write greedily).

    Args:
        context: token ids, at least one.
        ends: token ids of each continuation, at least one token each.
    """
    cache = None
    if len(context) > 1:
        _, cache = read_on(model, torch.tensor([context[:-1]], device=model.device), logits_to_keep=1)
        cache.batch_repeat_interleave(len(ends))
    width = max(map(len, ends))
    rows = torch.zeros(len(ends), width, dtype=torch.long, device=model.device)  # padding comes after what is looked at
    for row, end in zip(rows, ends, strict=True):
        row[: len(end)] = torch.tensor([context[-1], *end[:-1]])
    logits, _ = read_on(model, rows, cache)
    found = []
    for scores, end in zip(logits, ends, strict=True):
        likely, chosen = scores[: len(end)].float().log_softmax(-1), torch.tensor(end, device=scores.device)
        found.append((float(likely.gather(1, chosen[:, None]).sum()), bool((likely.argmax(-1) == chosen).all())))
    return found

"""How fast models generate, measured side by side: the models take turns in one run, so that whatever else the machine does hits them alike."""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor
from torch.sparse import to_sparse_semi_structured

from .config import require
from .models import blocks, weight_views

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKEN = 5  # of the made-up prompt: speed does not depend on what is read
COLUMNS = ["model", "batch", "measure", "value", "low", "high", "n"]


@torch.no_grad()
def latency(
    models: Mapping[str, PreTrainedModel], *, batch_sizes: Sequence[int] = (1,), length: int = 128, tokens: int = 32, repeats: int = 5
) -> pd.DataFrame:
    """Generation by batch size: medians over `repeats` after a warm-up, with the quartiles as spread.

    Args:
        models: by name; they take turns.
        batch_sizes: prompts at once.
        length: tokens of a prompt.
        tokens: tokens written after it, at least 2.

    Returns:
        model, batch, measure, value, low, high (quartiles, not a 95 % interval), n (turns). Measures: first_token_seconds (from the
        prompt to the first token), prefill_tokens_per_second (prompt tokens over that time), decode_tokens_per_second (further tokens
        over further time) and, on a GPU, peak_bytes: the most that was allocated there, all models that are on it included.
        Figures compare only within one call.

    Raises:
        ConfigError: fewer than two tokens, or no repeat.
    """
    require(tokens >= 2, "tokens", tokens, "a whole number of at least 2")
    require(repeats >= 1, "repeats", repeats, "a whole number of at least 1")
    rows = []
    for batch in batch_sizes:
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in models}
        for turn in range(repeats + 1):  # the first one warms up
            for name, model in models.items():
                found = _once(model, batch, length, tokens)
                if turn:
                    taken[name].append(found)
        for name, found in taken.items():
            for measure in found[0]:
                low, value, high = pd.Series([f[measure] for f in found]).quantile([0.25, 0.5, 0.75])
                rows.append((name, batch, measure, value, low, high, repeats))
    return pd.DataFrame(rows, columns=COLUMNS)


def compressed(model: PreTrainedModel) -> PreTrainedModel | None:
    """A copy whose 2:4 matrices are held in torch's semi-structured format, which some GPUs multiply faster.

    None where there is no such GPU, dtype or shape, or no matrix with at most 2 of 4 neighbours along the input.
    """
    names = [
        (index, view.name)
        for index, block in enumerate(blocks(model)[1])
        for view in weight_views(block)[0]
        if view.index is None and not view.transposed and view.get().is_cuda and is_two_four(view.get())
    ]
    if not names:
        return None
    other, done = copy.deepcopy(model), False
    for index, name in names:
        linear = blocks(other)[1][index].get_submodule(name)
        if (weight := _semi_structured(linear.weight.detach())) is not None:
            linear.weight, done = torch.nn.Parameter(weight, requires_grad=False), True
    return other if done else None


def _semi_structured(weight: Tensor) -> Tensor | None:
    """A 2:4 matrix in torch's format; None where its kernels are for another GPU, dtype, shape or pattern."""
    if weight.is_cuda and is_two_four(weight):
        with contextlib.suppress(RuntimeError, NotImplementedError):
            return to_sparse_semi_structured(weight)
    return None


def is_two_four(weight: Tensor) -> bool:
    """Whether at most 2 of every 4 neighbours along the input of `weight` (out, in) differ from zero."""
    return weight.shape[1] % 4 == 0 and int((weight.reshape(-1, 4) != 0).sum(1).max()) <= 2


def products(weights: Mapping[str, Tensor], *, tokens: Sequence[int] = (1, 128), repeats: int = 15) -> pd.DataFrame:
    """How fast matrices multiply in each format that stores no zeros, against the dense product of the same matrix, in turns.

    Args:
        weights: name → (out, in).
        tokens: inputs at once, (tokens, in).

    Returns:
        name, tokens, format ("CSR", and "2:4" where torch has a kernel for it here), value: seconds of the dense product over
        seconds in that format, so that above 1 is faster; low, high: quartiles over the turns; n: turns.
    """
    rows = []
    for name, weight in weights.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
            formats = {"dense": weight, "CSR": weight.to_sparse_csr()}
        if (compact := _semi_structured(weight)) is not None:
            formats["2:4"] = compact
        for count in tokens:
            x = torch.ones(weight.shape[1], count, dtype=weight.dtype, device=weight.device)
            turns = [{kind: _timed(lambda held=held, x=x: held @ x, x.device) for kind, held in formats.items()} for _ in range(repeats + 3)]
            for kind in list(formats)[1:]:
                ratios = pd.Series([turn["dense"] / turn[kind] for turn in turns[3:]])  # the first ones warm up
                rows.append((name, count, kind, *ratios.quantile([0.5, 0.25, 0.75]), repeats))
    return pd.DataFrame(rows, columns=["name", "tokens", "format", "value", "low", "high", "n"])


def _once(model: PreTrainedModel, batch: int, length: int, tokens: int) -> dict[str, float]:
    prompt = torch.full((batch, length), TOKEN, device=model.device)

    def generate(new: int) -> Tensor:
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)

    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    # Reading is writing one token: a plain forward would also compute the logits of the whole prompt, which generation never does.
    read = _timed(lambda: generate(1), model.device)
    write = max(_timed(lambda: generate(tokens), model.device) - read, 1e-9)
    found = {
        "first_token_seconds": read,
        "prefill_tokens_per_second": batch * length / read,
        "decode_tokens_per_second": batch * (tokens - 1) / write,
    }
    return found | ({"peak_bytes": torch.cuda.max_memory_allocated(model.device)} if model.device.type == "cuda" else {})


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()

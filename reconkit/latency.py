"""How fast models generate, measured side by side: the models take turns in one run, so that whatever else the machine does hits them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from .config import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKEN = 5  # of the made-up prompt: speed does not depend on what is read
COLUMNS = ["model", "batch", "measure", "value", "low", "high"]


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
        model, batch, measure, value, low, high. Measures: first_token_seconds (from the prompt to the first token),
        prefill_tokens_per_second (prompt tokens over that time) and decode_tokens_per_second (further tokens over further time).
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
                rows.append((name, batch, measure, value, low, high))
    return pd.DataFrame(rows, columns=COLUMNS)


def _once(model: PreTrainedModel, batch: int, length: int, tokens: int) -> dict[str, float]:
    prompt = torch.full((batch, length), TOKEN, device=model.device)

    def generate(new: int) -> Tensor:
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)

    # Reading is writing one token: a plain forward would also compute the logits of the whole prompt, which generation never does.
    read = _timed(lambda: generate(1), model.device)
    write = max(_timed(lambda: generate(tokens), model.device) - read, 1e-9)
    return {
        "first_token_seconds": read,
        "prefill_tokens_per_second": batch * length / read,
        "decode_tokens_per_second": batch * (tokens - 1) / write,
    }


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()

"""The dense model writing its own calibration text (paper, section 4)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import require
from .progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GREEDY = 4  # tokens that follow the random first one greedily, so that sampling starts from something likely
TRIES = 8  # times as many sequences as asked for may be written before giving up


def self_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = 32,
    keep: Callable[[str], bool] | None = None,
    progress: bool = True,
) -> Tensor:
    """Text that the model samples from itself, (count, length): one random token, four greedy ones, the rest sampled.

    Sequences that end early are dropped, and so are those that `keep` refuses (the paper keeps what is detected as
    English).

    Args:
        temperature: of the sampling; 1 is the model's own distribution.
        batch_size: sequences written at once; another one gives other text.
        keep: called with the decoded text.

    Raises:
        ConfigError: `length` is not between 6 and the model's context, or `count` is not positive.
        RuntimeError: eight times as many sequences were written and too few of them kept.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    require(count >= 1, "count", count, "a whole number of at least 1")
    require(GREEDY + 2 <= length <= context, "length", length, f"from {GREEDY + 2} to the model's context of {context} tokens")
    special = set(tokenizer.all_special_ids)
    first = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    kept: list[Tensor] = []
    written = 0
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), Progress("self-generated text", count, show=progress) as bar:
        torch.manual_seed(seed)
        while len(kept) < count and written < TRIES * max(count, batch_size):
            ids = first[torch.randint(len(first), (batch_size, 1))].to(model.device)
            written += batch_size
            for sample, new in ((False, GREEDY), (True, length - GREEDY - 1)):
                if len(ids):
                    options = (
                        {"temperature": temperature, "top_k": 0, "top_p": 1.0} if sample else {"temperature": None, "top_k": None, "top_p": None}
                    )
                    ids = model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        do_sample=sample,
                        max_new_tokens=new,
                        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                        repetition_penalty=1.0,
                        **options,
                    )
                    ids = ids[[not special & set(row) for row in ids.tolist()]]
            if len(ids) and ids.shape[1] < length:
                continue
            found = [row for row in ids.cpu() if keep is None or keep(tokenizer.decode(row))][: count - len(kept)]
            kept += found
            bar.step(len(found))
    if len(kept) < count:
        raise RuntimeError(f"The model wrote {written} sequences, but only {len(kept)} of {count} were whole and kept; ask for shorter ones.")
    return torch.stack(kept)


def write_jsonl(file: str | Path, samples: Tensor, tokenizer: PreTrainedTokenizerBase) -> Path:
    """One {"text", "tokens"} a line; `load_samples` takes the tokens as they are."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as out:
        for row in samples:
            out.write(json.dumps({"text": tokenizer.decode(row), "tokens": row.tolist()}, ensure_ascii=False) + "\n")
    os.replace(partial, path)
    return path

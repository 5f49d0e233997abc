"""The dense model writing its own calibration text (paper, section 4).

One random token, four greedy ones, the rest sampled; kept if it is whole and in the right language; a random crop of it.
Batch b of seed s has random numbers of its own, so that an interrupted file goes on where it stopped and ends the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor

from . import data
from .config import ConfigError, SelfGenConfig, require, to_dict
from .evaluation import sequence_nll
from .models import context, weights_sum, writes_from_cache
from .progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEAST = 0.05  # share of the written texts that must be kept
PATIENCE = 128  # texts that are written before that is judged
LETTERS = 40  # of a text, below which no language can be told
SYMBOLS = set("{}<>[]()=;_|\\/#*+^~`$@&")
BYTES = 1000  # a vocabulary up to this size is single bytes, which make no words
RUN = 4  # tokens of the runs that are counted for repetition


@dataclass
class Generated:
    """Texts that were kept, and what became of the others."""

    tokens: Tensor
    "(count, length)"
    perplexity: list[float]
    "Of each text under the model that wrote it."
    counts: dict[str, int] = field(default_factory=dict)
    "Texts that were written, then those left after each filter, in order."


def self_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    seed: int = 0,
    config: SelfGenConfig | None = None,
    prefixes: Tensor | None = None,
    bos: bool | str = False,
    progress: bool = True,
) -> Tensor:
    """Text that the model samples from itself, (count, length).

    Args:
        config: the recipe; None is the paper's. See `SelfGenConfig`.
        prefixes: token ids (M, at least `config.prefix_length`) of real text, of which each text starts with one, when
            `config.start` is "prefix".
        bos: False as in the paper, or auto: texts start with the BOS token where `data.bos_token` finds one; it is one of the
            `length` tokens, and no filter or perplexity counts it.

    Raises:
        ConfigError: `length` does not fit the recipe or the model's context, or prefixes are missing.
        RuntimeError: fewer than 5 % of the texts are kept; the message says what each filter left.
    """
    return generate(model, tokenizer, count=count, length=length, seed=seed, config=config, prefixes=prefixes, bos=bos, progress=progress).tokens


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    seed: int = 0,
    config: SelfGenConfig | None = None,
    prefixes: Tensor | None = None,
    bos: bool | str = False,
    progress: bool = True,
    partial: Path | None = None,
) -> Generated:
    """As `self_generate`, with the perplexities and the counts.

    Args:
        partial: a file that keeps every finished batch, and from which the same call goes on.

    Raises:
        ConfigError: as `self_generate`; `partial` holds text of other settings or of another model.
        RuntimeError: as `self_generate`; what was kept stays in `partial`.
    """
    config = config or SelfGenConfig()
    first = data.bos_token(tokenizer, bos)
    _check(model, config, count, length, prefixes, len(first))
    needed = math.ceil(count / (1 - config.unlikely))
    filters = _filters(tokenizer, config)
    counts = dict.fromkeys(["written", "whole", *filters], 0)
    kept: list[tuple[list[int], float]] = []
    batch, kept_in = 0, f" What was kept is in {partial}." if partial is not None else ""
    if partial is not None:
        for record in _resume(partial, made_by(model, config, length=length, seed=seed, prefixes=prefixes, first=first)):
            batch, counts = record["batch"], record["counts"]
            kept += [(tokens, value) for tokens, value in record["kept"]]
    with Progress("self-generated text", needed, show=progress) as bar, _plain(model, _pad(tokenizer)):
        bar.step(min(len(kept), needed))
        while len(kept) < needed:
            if counts["written"] >= PATIENCE and len(kept) < LEAST * counts["written"]:
                raise RuntimeError(
                    f"The model wrote too little that could be kept: {told(counts)}; another language, start or temperature may help.{kept_in}"
                )
            rows = _batch(model, tokenizer, length, _mix(seed, batch), config, prefixes, first)
            counts["written"] += config.batch_size
            counts["whole"] += len(rows)
            for name, keep in filters.items():
                rows = [row for row in rows if keep(row[len(first) :])]
                counts[name] += len(rows)
            nll = sequence_nll(model, torch.stack(rows), batch_size=config.batch_size) if rows else torch.empty(0)
            found = [(row.tolist(), float(value.exp())) for row, value in zip(rows, nll, strict=True)]
            kept += found
            batch += 1
            if partial is not None:
                _append(partial, {"batch": batch, "kept": found, "counts": counts})
            bar.step(min(len(found), needed - bar.done))
    chosen = kept[:needed]
    if config.unlikely:
        limit = sorted(value for _, value in chosen)[count - 1]
        chosen = [row for row in chosen if row[1] <= limit]
        counts["likely"] = count
    chosen = chosen[:count]
    return Generated(torch.tensor([tokens for tokens, _ in chosen]), [value for _, value in chosen], counts)


def write(
    file: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    seed: int = 0,
    config: SelfGenConfig | None = None,
    prefixes: Tensor | None = None,
    bos: bool | str = False,
    progress: bool = True,
) -> Generated:
    """`generate` into a .jsonl file: one {"text", "tokens", "perplexity", "made"} a line; `load_samples` takes the tokens as they are.

    Tokens and text are kept without a BOS token, which `load_samples(…, bos="auto")` puts before them again.
    An interrupted call leaves `<file>.partial`, from which the same call goes on; it ends with the same bytes.

    Raises:
        ConfigError, RuntimeError: as `generate`.
    """
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    first = data.bos_token(tokenizer, bos)
    made = made_by(model, config or SelfGenConfig(), length=length, seed=seed, prefixes=prefixes, first=first)
    options = {"count": count, "length": length, "seed": seed, "config": config, "prefixes": prefixes, "bos": bos, "progress": progress}
    lock = path.with_name(f".{path.name}.lock")  # two that write one file would mix their batches
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    with FileLock(lock):
        try:
            found = generate(model, tokenizer, **options, partial=partial)
            with whole.open("w", encoding="utf-8", newline="\n") as out:
                for row, value in zip(found.tokens[:, len(first) :].tolist(), found.perplexity, strict=True):
                    line = {"text": tokenizer.decode(row), "tokens": row, "perplexity": round(value, 4), "made": made}
                    out.write(json.dumps(line, ensure_ascii=False) + "\n")
            os.replace(whole, path)
            partial.unlink(missing_ok=True)
        finally:
            whole.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
    return found


def told(counts: dict[str, int]) -> str:
    """The counts as a sentence's part: "64 written, 40 whole, 38 in en"."""
    return ", ".join(f"{n} {name}" for name, n in counts.items())


def made_by(
    model: PreTrainedModel, config: SelfGenConfig, *, length: int, seed: int, prefixes: Tensor | None = None, first: Sequence[int] = ()
) -> dict[str, Any]:
    """What decides the texts besides their number: the weights, the seed and every setting."""
    start = {"prefixes": hashlib.sha256(prefixes.cpu().numpy().tobytes()).hexdigest()[:16]} if prefixes is not None else {}
    versions = {name: version(name) for name in ("torch", "transformers", "py3langid")}
    whose = {"model": called(model), "weights": weights_sum(model)[:16], "device": model.device.type, **versions}
    return {**whose, "length": length, "seed": seed, **to_dict(config), **start, **({"first": list(first)} if first else {})}


def called(model: PreTrainedModel) -> str:
    """A model's name without a folder, else its kind."""
    return Path(model.config._name_or_path or type(model).__name__).name


@torch.no_grad()
def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    config: SelfGenConfig,
    prefixes: Tensor | None,
    first: Sequence[int] = (),
) -> list[Tensor]:
    """Random crops (length,) of the texts of one batch that did not end early; the tokens `first` stand before a text and before its crop."""
    written, length = (config.written or length) - len(first), length - len(first)
    special = torch.tensor(sorted({*tokenizer.all_special_ids, *_ends(model)}))
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        if config.start == "prefix":
            ids = prefixes[torch.randint(len(prefixes), (config.batch_size,)), : config.prefix_length]
            steps = [(True, written - config.prefix_length)]
        else:
            plain = torch.ones(min(len(tokenizer), model.get_input_embeddings().num_embeddings), dtype=torch.bool)
            plain[special[special < len(plain)]] = False
            words = plain.nonzero().flatten()
            if not len(words):
                return []
            ids = words[torch.randint(len(words), (config.batch_size, 1))]
            steps = [(False, config.greedy), (True, written - 1 - config.greedy)]
        ids = ids.to(model.device)
        for sample, new in steps:
            if new and len(ids):
                free = {"temperature": config.temperature, "top_k": 0, "top_p": 1.0} if sample else {}
                given = data.begun(ids, first)
                ids = model.generate(given, attention_mask=torch.ones_like(given), do_sample=sample, max_new_tokens=new, **free)[:, len(first) :]
                ids = ids[~torch.isin(ids, special.to(ids.device)).any(1)]  # those that ended
        if not len(ids) or ids.shape[1] < written:
            return []
        starts = torch.randint(written - length + 1, (len(ids),)).tolist()
        crops = [row[start : start + length] for row, start in zip(ids.cpu(), starts, strict=True)]
    return list(data.begun(torch.stack(crops), first))


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


@contextmanager
def _plain(model: PreTrainedModel, pad: int) -> Iterator[None]:
    """Generation by the recipe alone: what a model's own settings would add, such as penalties or min_p, is put aside."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=pad, use_cache=writes_from_cache(model))
    try:
        yield
    finally:
        model.generation_config = own


def _ends(model: PreTrainedModel) -> list[int]:
    found = model.generation_config.eos_token_id
    return found if isinstance(found, list) else [] if found is None else [found]


def _filters(tokenizer: PreTrainedTokenizerBase, config: SelfGenConfig) -> dict[str, Callable[[Tensor], bool]]:
    """Each filter that is asked for, by the word that its count is called."""
    filters: dict[str, Callable[[Tensor], bool]] = {}
    asked = config.language if config.language != "auto" else "en" if len(tokenizer) > BYTES else None
    if asked is not None:
        filters[f"in {asked}"] = lambda row: language(tokenizer.decode(row)) == asked
    if config.symbols is not None:
        filters["not code-like"] = lambda row: symbols(tokenizer.decode(row)) <= config.symbols
    if config.distinct is not None:
        filters["not repeating"] = lambda row: distinct(row.tolist()) >= config.distinct
    return filters


def language(text: str) -> str | None:
    """ISO 639-1 code of a text's most likely language; None where it has too few letters to tell."""
    if sum(c.isalpha() for c in text) < LETTERS:
        return None
    return _classifier()(text)[0]


@lru_cache
def _classifier() -> Callable[[str], tuple[str, float]]:
    import py3langid  # its model takes half a second to load

    return py3langid.classify


def symbols(text: str) -> float:
    """Share of the characters that code is full of."""
    return sum(c in SYMBOLS for c in text) / max(1, len(text))


def distinct(tokens: list[int]) -> float:
    """Share of distinct runs of four tokens among all of them; text that repeats itself has few."""
    runs = list(zip(*(tokens[i:] for i in range(RUN)), strict=False))
    return len(set(runs)) / max(1, len(runs))


def _check(model: PreTrainedModel, config: SelfGenConfig, count: int, length: int, prefixes: Tensor | None, before: int) -> None:
    limit = context(model) or max(length, config.written or length)
    require(count >= 1, "count", count, "a whole number of at least 1")
    least = before + config.first + 1
    require(least <= length <= limit, "length", length, f"from {least} to the model's context of {limit} tokens")
    require(
        config.written is None or length <= config.written <= limit,
        "written",
        config.written,
        f"from length ({length}) to the model's context of {limit} tokens",
    )
    if config.start == "prefix":
        there = prefixes is not None and prefixes.ndim == 2 and len(prefixes) > 0 and prefixes.shape[1] >= config.prefix_length
        require(there, "prefixes", None if prefixes is None else tuple(prefixes.shape), f"tokens (any number, at least {config.prefix_length})")


def _resume(partial: Path, made: dict[str, Any]) -> list[dict[str, Any]]:
    """The record of each finished batch; a line that was cut off or damaged is removed, and so is what follows it."""
    made = json.loads(json.dumps(made))
    text = partial.read_text(encoding="utf-8", errors="replace") if partial.is_file() else ""
    whole = []
    for line in text[: text.rfind("\n") + 1].split("\n")[:-1]:
        try:
            whole.append((line + "\n", json.loads(line)))
        except ValueError:
            break
    if not whole:
        partial.unlink(missing_ok=True)
        _append(partial, {"made": made})
        return []
    known = whole[0][1].get("made") or {}
    differs = sorted({*known, *made} - {k for k in made if k in known and known[k] == made[k]})
    if differs:
        raise ConfigError(f"{partial} holds texts made with another {' and another '.join(differs)}; ask for the same again, or delete it.")
    aside = partial.with_name(f".{partial.name}")
    aside.write_text("".join(line for line, _ in whole), encoding="utf-8", newline="\n")
    os.replace(aside, partial)
    return [record for _, record in whole[1:]]


def _append(partial: Path, record: dict[str, Any]) -> None:
    with partial.open("a", encoding="utf-8", newline="\n") as out:
        out.write(json.dumps(record) + "\n")


def _mix(seed: int, batch: int) -> int:
    """One number of 63 bits for a seed and a batch."""
    return int.from_bytes(hashlib.sha256(f"self-generated {seed} {batch}".encode()).digest()[:8], "big") >> 1

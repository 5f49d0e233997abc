"""Sets on which a pruned model is compared with its original, made automatically for a model: its own text, and cloze items.

Held-out text of several domains is a corpus (wiki, news, pydocs, …) and needs nothing made. What is made is kept in the
cache with its seed, size and fingerprint, and listed by `reconkit data`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor

from . import assets, data, evaluation, selfgen
from .config import TEST_SEEDS, ConfigError, SelfGenConfig, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEAST = 500  # cloze items: fewer tell no two pruned models apart
CHOICES = 4
CLEAR = 0.15  # above chance, beyond the interval; below, the items say nothing about what pruning lost
LETTERS = 4  # of a word that is blanked out


def own_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    seed: int = 0,
    config: SelfGenConfig | None = None,
    prefixes: Tensor | None = None,
    progress: bool = True,
) -> Tensor:
    """Text (count, length) that the dense model writes, made once and kept; `model` must be dense when it is first asked for.

    Raises:
        ConfigError, RuntimeError: as `selfgen.generate`; an interrupted call goes on from what it had.
    """
    config = config or SelfGenConfig()
    made = selfgen.made_by(model, config, length=length, seed=seed, prefixes=prefixes)
    facts = {**made, "count": count, "device": model.device.type, "torch": torch.__version__}
    file = _folder() / f"own-{_sum(facts)}.jsonl"
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file():
            options = {"count": count, "length": length, "seed": seed, "config": config, "prefixes": prefixes, "progress": progress}
            found = selfgen.write(file, model, tokenizer, **options)
            _describe(file, "own text", f"{count} texts of {length} tokens", seed % TEST_SEEDS, ids_sum(found.tokens), selfgen.told(found.counts))
    lines = file.read_text(encoding="utf-8").splitlines()
    return torch.tensor([json.loads(line)["tokens"] for line in lines])


def own_test(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, count: int, length: int, seed: int = 0) -> Tensor:
    """As `own_text`, from seeds that calibration cannot have, and by the paper's recipe whatever the calibration's is."""
    return own_text(model, tokenizer, count=count, length=length, seed=TEST_SEEDS + seed, config=SelfGenConfig(batch_size=32))


def cloze_items(tokenizer: PreTrainedTokenizerBase, samples: Tensor, *, count: int = LEAST, choices: int = CHOICES, seed: int = 0) -> Tensor:
    """Blanks in `samples` (N, T): (count, 2 + choices) of sample, position, the true token, and other words of the same text.

    A blank is a whole word of at least four letters that is one token, in the second three quarters of its sample, where there is a
    context; the other candidates are drawn as often as they occur, so that frequency alone does not tell.

    Raises:
        ConfigError: the samples hold fewer blanks than asked for.
    """
    words = {t: w for t in samples.unique().tolist() if (w := _word(tokenizer, t))}
    starts = {t for t in samples.unique().tolist() if _begins(tokenizer, t)}
    blanks = [
        (i, t, row[t])
        for i, row in enumerate(samples.tolist())
        for t in range(len(row) // 4, len(row) - 1)
        if row[t] in words and row[t + 1] in starts
    ]
    if len(blanks) < count:
        raise ConfigError(
            f"{count} cloze items were asked for, but {len(samples)} samples of {samples.shape[1]} tokens hold only {len(blanks)} blanks; take more."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(blanks), generator=generator)[:count].sort().values.tolist()
    often = Counter(token for *_, token in blanks)
    known, weight = list(often), torch.tensor([float(n) for n in often.values()])
    require(len(known) > choices, "samples", tuple(samples.shape), f"a text with more than {choices} different words")
    items = []
    for i, t, true in (blanks[n] for n in order):
        same = torch.tensor([words[token].lower() == words[true].lower() for token in known])
        others = torch.multinomial(weight.masked_fill(same, 0), choices - 1, generator=generator).tolist()
        items.append([i, t, true, *(known[o] for o in others)])
    return torch.tensor(items)


def cloze_set(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Tensor, name: str, *, count: int = LEAST, seed: int = 0) -> Tensor:
    """Cloze items in held-out `samples` that the dense `model` answers clearly above chance; made and judged once, then kept.

    Raises:
        ConfigError: too few blanks, or the dense model is not well above chance on them; the message has both figures.
    """
    facts = {"samples": ids_sum(samples), "weights": evaluation.weights_sum(model), "count": count, "seed": seed, "kind": "cloze"}
    file = _folder() / f"cloze-{_sum(facts)}.json"
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file():
            items = cloze_items(tokenizer, samples, count=count, seed=seed)
            right = evaluation.cloze(model, samples, items)
            value, error = float(right.double().mean()), evaluation.clustered_error(right, items[:, 0])
            if value - evaluation.Z95 * error < 1 / CHOICES + CLEAR:
                raise ConfigError(
                    f"The dense model fills {value:.0%} of {len(items)} blanks in {name} right, where chance is {1 / CHOICES:.0%}: "
                    "the items would not show what pruning costs; take text in a language of the model, or longer samples."
                )
            _write(file, json.dumps(items.tolist()))
            _describe(file, "cloze", f"{count} blanks in {name}", seed, ids_sum(items), f"dense model {value:.1%} right, chance {1 / CHOICES:.0%}")
    return torch.tensor(json.loads(file.read_text(encoding="utf-8")))


def listed() -> list[dict[str, Any]]:
    """What has been made: kind, size, seed, fingerprint, about."""
    found = []
    for file in sorted(_folder().glob("*.about")):
        try:
            found.append(json.loads(file.read_text(encoding="utf-8")))
        except ValueError:
            continue  # cut off by a kill; the set itself is whole or made again
    return found


def text_sum(corpus: str) -> str:
    """The fingerprint of a corpus's test split: of its identity, so that nothing is read or fetched."""
    return hashlib.sha256(data.identity(corpus, "test").encode()).hexdigest()[:12]


def ids_sum(ids: Tensor) -> str:
    """A fingerprint of token ids and their shape."""
    return hashlib.sha256(repr(tuple(ids.shape)).encode() + ids.cpu().contiguous().numpy().tobytes()).hexdigest()[:12]


def _word(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The word that a token is: a space, then letters only."""
    text = tokenizer.decode([token])
    return text[1:] if text[:1] == " " and len(text) > LETTERS and text[1:].isalpha() else ""


def _begins(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether a token ends the word before it."""
    return not tokenizer.decode([token])[:1].isalnum()


def _folder() -> Path:
    folder = assets.cache_dir() / "testsets"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sum(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _describe(file: Path, kind: str, size: str, seed: int, fingerprint: str, about: str) -> None:
    _write(file.with_suffix(".about"), json.dumps({"kind": kind, "size": size, "seed": seed, "fingerprint": fingerprint, "about": about}))


def _write(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)

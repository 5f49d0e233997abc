"""Sets on which a pruned model is compared with its original, made automatically for a model: its own text, and cloze items.

Held-out text of several domains is a corpus (wiki, news, pydocs, …) and needs nothing made. What is made is kept in the
cache with its seed, size and fingerprint, and listed by `reconkit data`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor

from . import assets, data, evaluation, selfgen, statistics
from .checkpoint import code_hash
from .config import TEST_SEEDS, ConfigError, SelfGenConfig, require
from .evaluation import ids_sum
from .models import weights_sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOMS = ("config", "data", "evaluation", "selfgen", "statistics", "testsets")
"Sources that decide a set."
LEAST = 500  # cloze items: fewer tell no two pruned models apart
FIRST = 16  # samples in which blanks are looked for at first
CHOICES = 4
CLEAR = 0.15  # above chance, with the whole 95 % interval; below, the items say nothing about what pruning lost
LETTERS = 4  # of a word that is blanked out
MARKS = ("Ġ", "▁")  # of byte-level and of SentencePiece vocabularies: a space before a word


class FewBlanks(ConfigError):
    """The text holds fewer blanks than were asked for; more of it may do."""


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
    test: bool = False,
) -> Tensor:
    """Text (count, length) that `model` writes, made once for its weights, settings, sources and versions, and kept.

    Args:
        test: it is a test set, and listed as one.

    Raises:
        ConfigError, RuntimeError: as `selfgen.generate`; an interrupted call goes on from what it had.
    """
    config = config or SelfGenConfig()
    made = selfgen.made_by(model, config, length=length, seed=seed, prefixes=prefixes)
    facts = {**made, "count": count, "code": code_hash(ROOMS)}
    file = folder() / f"own-{_sum(facts)}.jsonl"
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file():
            options = {"count": count, "length": length, "seed": seed, "config": config, "prefixes": prefixes, "progress": progress}
            found = selfgen.write(file, model, tokenizer, **options)
            if test:
                size = f"{count} texts of {length} tokens"
                _describe(file, "own text", size, made["model"], seed - TEST_SEEDS, ids_sum(found.tokens), selfgen.told(found.counts))
    lines = file.read_text(encoding="utf-8").splitlines()
    return torch.tensor([json.loads(line)["tokens"] for line in lines])


def own_test(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, count: int, length: int, seed: int = 0) -> Tensor:
    """As `own_text`, from seeds that calibration cannot have, and by the paper's recipe whatever the calibration's is."""
    return own_text(model, tokenizer, count=count, length=length, seed=TEST_SEEDS + seed, config=SelfGenConfig(batch_size=32), test=True)


def cloze_items(tokenizer: PreTrainedTokenizerBase, samples: Tensor, *, count: int = LEAST, choices: int = CHOICES, seed: int = 0) -> Tensor:
    """Blanks in `samples` (N, T): (count, 2 + choices) of sample, position, the true token, and other words of the same text.

    A blank is a whole word of at least four letters that is one token, in the last three quarters of its sample, where there is a
    context; the other candidates are drawn as often as they occur, so that frequency alone does not tell.

    Raises:
        ConfigError: the samples hold fewer blanks than asked for.
    """
    words = {t: w for t in samples.unique().tolist() if (w := _word(tokenizer, t))}
    starts = {t for t in samples.unique().tolist() if _ends_a_word(tokenizer, t)}
    blanks = [
        (i, t, row[t])
        for i, row in enumerate(samples.tolist())
        for t in range(len(row) // 4, len(row) - 1)
        if row[t] in words and row[t + 1] in starts
    ]
    if len(blanks) < count:
        raise FewBlanks(
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


def cloze_set(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Tensor,
    name: str,
    *,
    count: int = LEAST,
    seed: int = 0,
    articles: Sequence[int] | None = None,
) -> Tensor:
    """Cloze items in held-out `samples` that the dense `model` answers clearly above chance; made and judged once, then kept.

    Args:
        articles: the number of each sample's article, over which the interval is; None: each sample is one.

    Raises:
        ConfigError: too few blanks, or the dense model is not well above chance on them; the message has both figures.
    """
    facts = {"samples": ids_sum(samples), "weights": weights_sum(model), "count": count, "seed": seed, "code": code_hash(ROOMS)}
    file = folder() / f"cloze-{_sum(facts)}.json"
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file():
            items = cloze_items(tokenizer, samples, count=count, seed=seed)
            right = evaluation.cloze(model, samples, items)
            found = statistics.proportion(right, [i if articles is None else articles[i] for i in items[:, 0].tolist()])
            if found.low < 1 / CHOICES + CLEAR:
                raise ConfigError(
                    f"The dense model fills {found.value:.0%} of {len(items)} blanks in {name} right (95 % interval over {found.n} articles: "
                    f"{found.low:.0%} to {found.high:.0%}), where chance is {1 / CHOICES:.0%}: "
                    "the items would not show what pruning costs; take text in a language of the model, or longer samples."
                )
            said = f"dense model {found.value:.1%} right, chance {1 / CHOICES:.0%}"
            _describe(file, "cloze", f"{count} blanks in {name}", selfgen.called(model), seed, ids_sum(items), said)
            data.write_text(file, json.dumps(items.tolist()))
    return torch.tensor(json.loads(file.read_text(encoding="utf-8")))


def cloze_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: str, *, length: int, seed: int = 0
) -> tuple[Tensor, Tensor, list[int]]:
    """(samples, items, number of each sample's article): `cloze_set` in as much of a corpus's test split as it takes.

    Raises:
        ConfigError: as `cloze_set`, or the whole split is too short.
    """
    count = FIRST
    while True:
        samples, articles = data.draw(corpus, tokenizer, count=count, length=length, split="test", seed=seed)
        try:
            return samples, cloze_set(model, tokenizer, samples, f"{corpus} test", seed=seed, articles=articles), articles
        except FewBlanks:
            if not any(_word(tokenizer, token) for token in samples.unique().tolist()):
                raise  # more of it would not help
            count += FIRST // 4


def listed() -> list[dict[str, Any]]:
    """What has been made: kind, size, model, seed, fingerprint, about."""
    found = []
    for file in sorted(folder().glob("*.about")):
        if not any(file.with_suffix(kind).is_file() for kind in (".json", ".jsonl")):
            continue
        try:
            found.append(json.loads(file.read_text(encoding="utf-8")))
        except ValueError:
            continue  # cut off by a kill; the set itself is whole or made again
    return found


def text_sum(corpus: str) -> str:
    """The fingerprint of a corpus's test split: of its identity, so that nothing is read or fetched."""
    return hashlib.sha256(data.identity(corpus, "test").encode()).hexdigest()[:12]


def _word(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The word that a token is: letters only, after a mark of its beginning."""
    text = tokenizer.decode([token]).strip()
    return text if _starts_a_word(tokenizer, token) and len(text) >= LETTERS and text.isalpha() else ""


def _starts_a_word(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """By the token itself: some decoders drop the space before a first word."""
    return tokenizer.convert_ids_to_tokens(token)[:1] in MARKS


def _ends_a_word(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether the word before a token is complete: another one starts, or something that is no letter follows."""
    return _starts_a_word(tokenizer, token) or not tokenizer.decode([token])[:1].isalnum()


def folder() -> Path:
    """Where made sets are kept."""
    found = assets.cache_dir() / "testsets"
    found.mkdir(parents=True, exist_ok=True)
    return found


def _sum(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _describe(file: Path, kind: str, size: str, model: str, seed: int, fingerprint: str, about: str) -> None:
    facts = {"kind": kind, "size": size, "model": model, "seed": seed, "fingerprint": fingerprint, "about": about}
    data.write_text(file.with_suffix(".about"), json.dumps(facts))

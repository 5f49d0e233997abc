"""Draws from small files, splits, the mirror, and the real offline texts."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from reconkit import assets, data
from reconkit.config import ConfigError
from reconkit.models import load_model

ROOT = Path(__file__).parent.parent
TEXT = "".join(f"Line {i} says that {i * i} is the square of {i}.\n" for i in range(400))
TASK_SIZES = {"boolq": 3270, "rte": 277, "hellaswag": 10042, "winogrande": 1267, "arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a byte, so that a file's tokens are its bytes plus three."""
    return load_model("tiny", device="cpu")[1]


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "numbers.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture
def documents(tmp_path: Path) -> str:
    """Thirty documents, every third too short for 40 tokens."""
    file = tmp_path / "documents.jsonl"
    texts = [f"<{i:02}>" + chr(97 + i % 26) * (60 + i if i % 3 else 10) for i in range(30)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("RECONKIT_DATA", str(folder))
    return folder


@pytest.fixture(autouse=True)
def no_mirror(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if not {"data_mirror", "mirror"} & set(request.fixturenames):
        monkeypatch.delenv("RECONKIT_DATA", raising=False)


def add(folder: Path, name: str, content: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)


def digest(samples: torch.Tensor) -> str:
    return hashlib.sha256(samples.numpy().astype("<i8").tobytes()).hexdigest()[:16]


# Draws


def test_samples_have_the_asked_shape_and_no_special_tokens(text: str, documents: str, tokenizer: Any) -> None:
    special = torch.tensor(tokenizer.all_special_ids)
    for corpus in (text, documents):
        samples = data.load_samples(corpus, tokenizer, count=5, length=40)
        assert samples.shape == (5, 40) and samples.dtype == torch.int64
        assert not torch.isin(samples, special).any()


@pytest.fixture
def bos_tokenizer() -> Any:
    """The bytes of the tiny model, with a BOS token before every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_model("tiny", device="cpu")[1]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    assert tokenizer("x")["input_ids"][0] == 1
    return tokenizer


def test_no_bos_even_of_a_tokenizer_that_adds_it(text: str, bos_tokenizer: Any) -> None:
    assert not (data.load_samples(text, bos_tokenizer, count=None, length=40) == 1).any()


@pytest.mark.parametrize("kind", ["text", "documents"])
@pytest.mark.parametrize("count", [8, None])
def test_auto_puts_the_bos_token_before_one_token_less_of_the_same_text(
    kind: str, count: int | None, bos_tokenizer: Any, tokenizer: Any, request: pytest.FixtureRequest
) -> None:
    corpus, options = request.getfixturevalue(kind), {"count": count, "seed": 3}
    found = data.load_samples(corpus, bos_tokenizer, length=40, bos="auto", **options)
    assert found.shape[1] == 40 and (found[:, 0] == 1).all() and found.dtype == torch.int64
    assert torch.equal(found[:, 1:], data.load_samples(corpus, tokenizer, length=39, **options))
    assert torch.equal(
        data.load_samples(corpus, tokenizer, length=40, bos="auto", **options), data.load_samples(corpus, tokenizer, length=40, **options)
    )
    assert torch.equal(
        data.load_reported(corpus, bos_tokenizer, length=40, bos="auto"), data.load_samples(corpus, bos_tokenizer, count=None, length=40, bos="auto")
    )


def test_reported_c4_with_a_bos_token(mirror: Path, bos_tokenizer: Any, tokenizer: Any) -> None:
    add(mirror, "c4/c4_validation.jsonl", "".join(json.dumps({"text": f"{i:02}"}) + "\n" for i in range(40)))
    found = data.load_reported("c4", bos_tokenizer, length=12, bos="auto")
    assert (found[:, 0] == 1).all() and torch.equal(found[:, 1:], data.load_reported("c4", tokenizer, length=11))


@pytest.mark.parametrize("bos", [True, None, 0, "always", ""])
def test_another_word_for_bos_is_refused(bos: Any, text: str, tokenizer: Any) -> None:
    for load in (data.load_samples, data.load_reported):
        with pytest.raises(ConfigError, match=r"bos is .*; it must be False or auto"):
            load(text, tokenizer, length=40, bos=bos)


def test_a_bos_token_alone_is_no_sample(text: str, bos_tokenizer: Any) -> None:
    for load in (data.load_samples, data.load_reported):
        with pytest.raises(ConfigError, match="length is 1; it must be a whole number above 1"):
            load(text, bos_tokenizer, length=1, bos="auto")


@pytest.mark.parametrize("kind", ["text", "documents"])
def test_the_seed_decides_the_draw(kind: str, tokenizer: Any, request: pytest.FixtureRequest) -> None:
    corpus = request.getfixturevalue(kind)
    first = data.load_samples(corpus, tokenizer, count=8, length=40, seed=1)
    assert torch.equal(first, data.load_samples(corpus, tokenizer, count=8, length=40, seed=1))
    assert not torch.equal(first, data.load_samples(corpus, tokenizer, count=8, length=40, seed=2))
    assert torch.equal(first[:3], data.load_samples(corpus, tokenizer, count=3, length=40, seed=1)), "fewer samples are the first of more"


@pytest.mark.parametrize(("kind", "golden"), [("text", "aec7e76dd4136ea8"), ("documents", "3f970a948179d69b")])
def test_the_draw_never_changes(kind: str, golden: str, tokenizer: Any, request: pytest.FixtureRequest) -> None:
    """Recorded runs rely on it, on every machine. Change these sums only with a reason that is worth all of them."""
    assert digest(data.load_samples(request.getfixturevalue(kind), tokenizer, count=8, length=40, seed=3)) == golden


def test_windows_do_not_overlap_and_lie_in_the_text(text: str, tokenizer: Any) -> None:
    every = data.load_samples(text, tokenizer, count=None, length=50)
    assert len(every) == len(TEXT) // 50
    assert tokenizer.decode(every.flatten()) == TEXT[: len(every) * 50]
    drawn = [tuple(row) for row in data.load_samples(text, tokenizer, count=len(every), length=50).tolist()]
    assert drawn != [tuple(row) for row in every.tolist()]
    assert sorted(drawn) == sorted(tuple(row) for row in every.tolist())


def test_text_is_tokenised_in_pieces_that_lose_nothing(text: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data.load_samples(text, tokenizer, count=None, length=50)
    monkeypatch.setattr(data, "PIECE", 101)
    assert "".join(data._pieces(TEXT)) == TEXT and max(map(len, data._pieces(TEXT))) <= 101
    assert "".join(data._pieces("x" * 250)) == "x" * 250
    assert torch.equal(whole, data.load_samples(text, tokenizer, count=None, length=50))


def test_documents_give_one_crop_each_of_the_long_ones(documents: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    crops = data.load_samples(documents, tokenizer, count=20, length=40)
    letters = [tokenizer.decode(row)[-1] for row in crops]
    long = [chr(97 + i % 26) for i in range(30) if i % 3]
    assert sorted(letters) == sorted(long), "each long document once, without replacement"
    assert len({tokenizer.decode(row)[:4] for row in crops}) > 10, "at random places"
    monkeypatch.setattr(data, "BATCH", 3)
    assert torch.equal(crops, data.load_samples(documents, tokenizer, count=20, length=40))


def test_all_windows_of_documents_stay_inside_a_document(documents: str, tokenizer: Any) -> None:
    rows = [tokenizer.decode(row) for row in data.load_samples(documents, tokenizer, count=None, length=40)]
    lengths = [4 + 60 + i for i in range(30) if i % 3]
    assert len(rows) == sum(n // 40 for n in lengths)
    assert rows[0] == "<01>" + "b" * 36 and all(len(set(row) - set("<>0123456789")) == 1 for row in rows)


# Articles


def test_crops_and_windows_of_documents_carry_their_documents_number(documents: str, tokenizer: Any) -> None:
    for count, seed in ((20, 0), (7, 3), (None, 0)):
        options = {"count": count, "length": 40, "seed": seed}
        rows, articles = data.load_samples(documents, tokenizer, **options), data.load_articles(documents, tokenizer, **options)
        assert [tokenizer.decode(row)[-1] for row in rows] == [chr(97 + i % 26) for i in articles] and not any(i % 3 == 0 for i in articles)
        assert len(set(articles)) == len(articles) or count is None
    assert articles == sorted(articles) and articles.count(1) == (4 + 60 + 1) // 40


def by_hand(rows: torch.Tensor, texts: list[str], length: int, tokenizer: Any) -> list[int]:
    """The text that holds the first byte of each row, which is found in the joined texts."""
    whole, owners = "".join(texts), [i for i, text in enumerate(texts) for _ in text]
    places = {whole[i : i + length]: i for i in range(0, len(whole) - length + 1, length)}
    assert len(places) == len(whole) // length, "no window twice"
    return [owners[places[tokenizer.decode(row)]] for row in rows]


def test_windows_of_running_text_belong_to_the_article_of_their_first_token(tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept in the cache says the same."""
    made = {f"module {i}": "".join(f"{i} {(97 * i + k) ** 5} " for k in range(1 + 3 * (i % 4))) for i in range(20)}
    monkeypatch.setattr(data, "_pydocs", lambda: made)
    texts = data._running_text("pydocs", "train")
    for options in ({"count": None, "length": 16}, {"count": 9, "length": 16, "seed": 2}):
        rows, articles = data.load_samples("pydocs", tokenizer, **options), data.load_articles("pydocs", tokenizer, **options)
        assert articles == by_hand(rows, texts, 16, tokenizer) and len(set(articles)) > 3
    monkeypatch.setattr(data, "_running_text", lambda *_: pytest.fail("tokenised again"))
    assert data.load_articles("pydocs", tokenizer, **options) == articles


WIKITEXT = [" \n", *(f" = Title {i} = \n \n It was {(i + 7) ** 7} . \n = = Part {(i + 3) ** 5} = = \n a = {i} \n \n" for i in range(12))]


@pytest.mark.parametrize("piece", [100_000, 60])
def test_titles_begin_the_articles_of_wikitext(piece: int, tokenizer: Any, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the pieces in which the text is tokenised; the blank line before the first title is its article's."""
    add(mirror, "wikitext2/wiki.test.raw", "".join(WIKITEXT))
    monkeypatch.setattr(data, "PIECE", piece)
    options = {"length": 20, "split": "test", "count": None}
    rows, articles = data.load_samples("wikitext2", tokenizer, **options), data.load_articles("wikitext2", tokenizer, **options)
    assert articles == [max(0, i - 1) for i in by_hand(rows, WIKITEXT, 20, tokenizer)] and len(set(articles)) == 12
    assert data.draw_reported("wikitext2", tokenizer, length=20).articles == articles


def test_articles_are_found_where_tokens_hold_no_spaces(mirror: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = sorted({word for text in WIKITEXT for word in text.split()})
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token=known[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    add(mirror, "wikitext2/wiki.test.raw", "".join(WIKITEXT))
    words = [i - 1 for i, text in enumerate(WIKITEXT) for _ in text.split()]
    options = {"count": None, "length": 4, "split": "test"}
    found = data.load_articles("wikitext2", PreTrainedTokenizerFast(tokenizer_object=backend), **options)
    assert found == words[: len(words) // 4 * 4 : 4]


def test_documents_that_are_joined_stay_articles(mirror: Path, tokenizer: Any) -> None:
    texts = [f"{i:02}" * (i % 5) for i in range(31)]  # some are empty, the last one, too
    add(mirror, "c4/c4_validation.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    joined = [f"{text} " for text in texts[:-1]] + texts[-1:]
    owners = [i for i, text in enumerate(joined) for _ in text]
    found = data.draw_reported("c4", tokenizer, length=5)
    assert found.articles == owners[: len(owners) // 5 * 5 : 5] and torch.equal(found.samples, data.load_reported("c4", tokenizer, length=5))


def test_without_documents_every_window_is_one(text: str, mirror: Path, tokenizer: Any) -> None:
    class Slow:
        """A tokenizer that does not say which characters a token holds."""

        is_fast = False

        def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
            return {"input_ids": [list(text.encode()) for text in texts]}

        def __len__(self) -> int:
            return 256

    add(mirror, "ptb/ptb.test.txt", TEXT)
    add(mirror, "wikitext2/wiki.test.raw", "".join(WIKITEXT))
    for corpus, reader in ((text, tokenizer), ("ptb", tokenizer), ("wikitext2", Slow())):
        every = data.load_articles(corpus, reader, count=None, length=20, split="test")
        assert every == list(range(len(every)))
        drawn = data.load_articles(corpus, reader, count=5, length=20, split="test")
        assert len(set(drawn)) == 5 and drawn != sorted(drawn)


def test_tokens_are_used_as_they_are(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "self.jsonl"
    file.write_text('{"text": "other", "tokens": [5, 6, 7, 8]}\n\n{"text": "abcd"}\n{"text": "efgh", "tokens": 4}\n')
    rows = data.load_samples(str(file), tokenizer, count=None, length=4).tolist()
    assert rows == [[5, 6, 7, 8], tokenizer("abcd")["input_ids"], tokenizer("efgh")["input_ids"]]
    file.write_text('{"tokens": [5, 600, 7, 8]}\n')
    with pytest.raises(ConfigError, match="600.*below 259"):
        data.load_samples(str(file), tokenizer, count=1, length=4)


def test_a_line_may_hold_any_character(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "odd.jsonl"
    file.write_text(json.dumps({"text": "a\u2028b\u0085c" * 9}, ensure_ascii=False), encoding="utf-8")
    assert tokenizer.decode(data.load_samples(str(file), tokenizer, count=None, length=8)[0]) == "a\u2028b\u0085c"[:8]


def test_a_file_has_one_split_under_every_name(text: str, documents: str, tokenizer: Any) -> None:
    for corpus in (text, documents):
        train, *others = (data.load_samples(corpus, tokenizer, count=4, length=40, split=split) for split in data.SPLITS)
        assert all(torch.equal(train, other) for other in others)


# What is refused


def test_beginnings_are_as_many_as_there_are(text: str, documents: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(data.prefixes(documents, tokenizer, length=40)) == 20
    monkeypatch.setattr(data, "PREFIXES", 5)
    found = data.prefixes(text, tokenizer, length=8, seed=3)
    assert found.tolist() == data.load_samples(text, tokenizer, count=5, length=8, seed=3).tolist()
    with pytest.raises(ConfigError, match="holds only 0 samples"):
        data.prefixes(documents, tokenizer, length=100_000)


def test_too_little_text_says_how_many_are_possible(text: str, documents: str, tokenizer: Any) -> None:
    possible = len(TEXT) // 50
    with pytest.raises(ValueError, match=f"holds only {possible} samples of 50 tokens, and {possible + 1} were asked for"):
        data.load_samples(text, tokenizer, count=possible + 1, length=50)
    with pytest.raises(ConfigError, match="holds only 20 samples of 40 tokens, and 21 were asked for"):
        data.load_samples(documents, tokenizer, count=21, length=40)
    for corpus in (text, documents):
        with pytest.raises(ConfigError, match="holds only 0 samples of 100000 tokens, and at least 1 were asked for"):
            data.load_samples(corpus, tokenizer, count=None, length=100_000)


@pytest.mark.parametrize(
    ("values", "named"), [({"split": "dev"}, "train, validation, test"), ({"count": 0}, "count is 0"), ({"length": 0}, "length is 0")]
)
def test_wrong_values_name_the_field(values: dict[str, Any], named: str, text: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=named):
        data.load_samples(text, tokenizer, **values)


@pytest.mark.parametrize("name", ["wiki", "news", "pydocs", "c4", "wikitext2", "owner/name", "owner/name:config-1"])
def test_known_names_pass(name: str) -> None:
    data.check_corpus(name)


@pytest.mark.parametrize("name", ["wikki", "a/b/c", "../x", "/", "", "gone.txt", "some/gone.jsonl", "a b/c"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="corpora are: wiki, news, pydocs, c4"):
        data.check_corpus(name)


def test_a_folder_or_other_file_is_no_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "texts").mkdir(parents=True)
    with pytest.raises(ConfigError, match="No corpus is called 'my/texts'"):
        data.check_corpus("my/texts")


def test_checking_a_name_imports_no_heavy_library() -> None:
    heavy = ("torch", "numpy", "datasets", "transformers")
    code = f"import sys; from reconkit import data; data.check_corpus('wiki'); print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"text": "a"}\n{"text"', "line 2 is not JSON"),
        (b'{"body": "a"}', 'line 1 has neither a "text"'),
        (b'{"body": "a", "id": 1}', 'it has body: "a", id: 1'),
        (b'{"text": "a"}\n{"text": null}', 'line 2 has neither a "text".*it has text: null'),
        (b'{"tokens": [1, 2.0]}', 'line 1 has neither a "text"'),
        (b"[1]", r"line 1 has neither.*it has \[1\]"),
        (b"\xff\xfe", "UTF-8"),
        ('{"text": "a"}'.encode("utf-16"), "not UTF-8 text .*save it in UTF-8"),
        ('{"text": "a"}'.encode("utf-16-le"), "every other byte is zero, as in UTF-16"),
        (b'{"text": "a"}\n\n{"text": "a \\ud83d b"}', r"line 3 has a text with half of a surrogate pair, '\\ud83d', at character 2"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "line 1 is not JSON"),
        (b"[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_a_broken_file_is_named_with_its_line(content: bytes, named: str, tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_bytes(content)
    for read in (lambda: data.load_samples(str(file), tokenizer, count=1, length=1), lambda: data.prefixes(str(file), tokenizer, length=1)):
        with pytest.raises(ConfigError, match=f"broken.jsonl.*{named}") as raised:
            read()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_a_byte_order_mark_is_no_text(suffix: str, tmp_path: Path, tokenizer: Any) -> None:
    text = "a\U0001f600b\0c\u2028d" * 9
    file = tmp_path / f"marked{suffix}"
    file.write_text(json.dumps({"text": text}) + "\r\n" if suffix == ".jsonl" else text, encoding="utf-8-sig")
    assert tokenizer.decode(data.load_samples(str(file), tokenizer, count=None, length=30)[0]) == text.encode()[:30].decode()


# The mirror and the hub


def test_the_mirror_is_looked_in_first(mirror: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("the hub was asked"))
    for short, long in (("train", "train"), ("valid", "validation"), ("test", "test")):
        add(mirror, f"wikitext2/wiki.{short}.raw", f" \n = {long} = \n")
        add(mirror, f"ptb/ptb.{short}.txt", f" no it was n't {long}\n")
        for corpus, start in (("wikitext2", " \n = "), ("ptb", " no it was n't ")):
            [row] = data.load_samples(corpus, tokenizer, count=None, length=len(start + long), split=long)
            assert tokenizer.decode(row) == start + long
    add(mirror, "wikitext2/wiki.train.first.txt", "a part")
    assert tokenizer.decode(data.load_samples("wikitext2", tokenizer, count=None, length=11)[0]) == " \n = train "


def test_c4_of_the_mirror_shares_validation_out_for_validation_and_test(mirror: Path, tokenizer: Any) -> None:
    for part in ("00", "01"):
        add(mirror, f"c4/c4_train_{part}.jsonl", json.dumps({"text": f"train {part}", "url": "x"}) + "\n")
    add(mirror, "c4/c4_validation.jsonl", "".join(json.dumps({"text": f"valid {i:02}"}) + "\n" for i in range(40)))
    rows = {s: [tokenizer.decode(row) for row in data.load_samples("c4", tokenizer, count=None, length=8, split=s)] for s in data.SPLITS}
    assert rows["train"] == ["train 00", "train 01"]
    assert not set(rows["validation"]) & set(rows["test"]) and min(len(rows["validation"]), len(rows["test"])) > 10
    assert sorted(rows["validation"] + rows["test"]) == [f"valid {i:02}" for i in range(40)]


def test_reported_text_is_the_whole_split_and_of_c4_the_first_documents_joined(mirror: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All documents of the validation in order, short ones too, those that other draws call test as well."""
    add(mirror, "wikitext2/wiki.test.raw", " \n = some text = \n")
    whole = data.load_reported("wikitext2", tokenizer, length=8)
    assert torch.equal(whole, data.load_samples("wikitext2", tokenizer, count=None, length=8, split="test"))
    add(mirror, "c4/c4_validation.jsonl", "".join(json.dumps({"text": f"{i:02}"}) + "\n" for i in range(40)))
    monkeypatch.setattr(data, "REPORTED", (30, 5))
    assert tokenizer.decode(data.load_reported("c4", tokenizer, length=12).flatten()) == " ".join(f"{i:02}" for i in range(20)) + " "
    monkeypatch.setattr(data, "REPORTED", (30, 100))
    assert data.load_reported("c4", tokenizer, length=12).shape == ((30 * 3 - 1) // 12, 12)
    with pytest.raises(ConfigError, match="length is 100; it must be shorter"):
        data.load_reported("c4", tokenizer, length=100)


def test_ptb_is_read_from_the_mirror_alone(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (data.check_corpus, data.identity, lambda name: data.load_samples(name, tokenizer)):
        with pytest.raises(ConfigError, match="ptb has no free licence.*RECONKIT_DATA"):
            call("ptb")
    monkeypatch.setenv("RECONKIT_DATA", str(tmp_path))
    add(tmp_path, "ptb/ptb.train.txt", "text")
    data.check_corpus("ptb")
    with pytest.raises(ConfigError, match=r"no ptb \(test\)"):
        data.load_samples("ptb", tokenizer, split="test")


def test_a_mirror_that_is_no_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECONKIT_DATA", "/no/such/folder")
    with pytest.raises(ConfigError, match="RECONKIT_DATA is '/no/such/folder'"):
        data.task_data("rte")


def test_hub_data_sets(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, configuration: str | None, split: str, streaming: bool = False) -> Any:
        asked.append((name, configuration, split, streaming))
        if name == "Salesforce/wikitext":
            return datasets.Dataset.from_dict({"text": ["", " = A = \n", "", " b \n"]})
        rows = datasets.Dataset.from_dict({"text": [f"document {i:03}" for i in range(100)]})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    samples = data.load_samples("owner/name:small", tokenizer, count=100, length=12, split="test")
    assert sorted(tokenizer.decode(row) for row in samples) == [f"document {i:03}" for i in range(100)]
    assert tokenizer.decode(data.load_samples("wikitext2", tokenizer, count=None, length=16)[0]) == " \n = A = \n \n b \n"
    first = data.load_samples("c4", tokenizer, count=5, length=12)
    assert torch.equal(first, data.load_samples("c4", tokenizer, count=5, length=12))
    assert not torch.equal(first, data.load_samples("c4", tokenizer, count=5, length=12, seed=1))
    held = [data.load_samples("c4", tokenizer, count=30, length=12, split=s) for s in ("validation", "test")]
    assert not {tokenizer.decode(row) for row in held[0]} & {tokenizer.decode(row) for row in held[1]}
    streamed = data.load_reported("c4", tokenizer, length=12)
    assert tokenizer.decode(streamed.flatten()).startswith("document 000 document 001 document 002")
    with pytest.raises(ConfigError, match="count is None; it must be a number for c4"):
        data.load_samples("c4", tokenizer, count=None)
    assert asked[:3] == [
        ("owner/name", "small", "test", False),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", False),
        ("allenai/c4", "en", "train", True),
    ]
    assert [row[2] for row in asked[-3:]] == ["validation"] * 3


def test_a_hub_data_set_without_text_says_what_it_has(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_dict({"body": ["a"], "n": [1]}))
    with pytest.raises(ConfigError, match=r"owner/name is \['body', 'n'\]; .*column called text"):
        data.load_samples("owner/name", tokenizer)


@pytest.mark.parametrize("corpus", ["owner/no-such-data-set", "c4", "wikitext2"])
def test_a_hub_that_cannot_be_asked_is_said_in_one_sentence(corpus: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="The hub cannot be asked for .*corpora: wiki, news, pydocs, c4") as raised:
        data.load_samples(corpus, tokenizer)
    assert "\n" not in str(raised.value)


# Identity


def test_identity_follows_the_content_of_files(text: str, mirror: Path) -> None:
    before = data.identity(text)
    assert before.startswith("numbers.txt ") and before == data.identity(text, "test")
    Path(text).write_text(TEXT + "more")
    assert data.identity(text) != before
    add(mirror, "wikitext2/wiki.train.raw", "a")
    add(mirror, "wikitext2/wiki.test.raw", "b")
    assert data.identity("wikitext2") != data.identity("wikitext2", "test")
    assert data.identity("wikitext2", "validation") == "wikitext2 validation from the hub"


def test_identity_of_offline_texts_needs_no_fetch() -> None:
    assert data.identity("wiki", "test") == f"wiki test of {assets.identity('gensim')}"
    assert data.identity("pydocs") == "pydocs train"
    with pytest.raises(ConfigError):
        data.identity("wikki")


# Offline texts


def test_wikitext_becomes_prose() -> None:
    markup = """{{about|x{{nested|{{deep}}}}}}<!-- hidden
-->'''Tar''' ({{IPAc-en|t}}; ''thing'')<ref name="a">{{cite|b}}</ref> is a
[[Liquid|thick liquid]], {{convert|5|cm|in}} deep{{mdash}}or {{nowrap|not {{lang|de|tief}}}}&nbsp;<ref name=b/>.
[[File:a.jpg|thumb|A [[caption]] of it]] [[Category:Tars]] [[de:Teer]]
== History ==
{| class="x"
| a || {| nested |}
|}
* See [http://x.org/a the site] [http://y.org]
Sums: <math>a^2</math> 3 &lt; 4 and x<sup>2</sup>.
{{unclosed
== See also ==
* [[Pitch]]
=== Deeper ===
gone
== Uses ==
Roads."""
    assert data._prose(markup).split("\n") == [
        "Tar (thing) is a",
        "thick liquid, 5 cm deep – or not tief.",
        "History",
        "See the site",
        "Sums: 3 < 4 and x2.",
        "Uses",
        "Roads.",
    ]


def test_a_share_of_documents_depends_on_their_keys_alone() -> None:
    documents = {f"key {i}": f"text {i}" for i in range(20)}
    shares = [data._share(documents, 12, split) for split in data.SPLITS]
    assert list(map(len, shares)) == [12, 4, 4]
    assert sorted(text for share in shares for text in share) == sorted(documents.values())
    assert shares[0] == sorted(shares[0], key=list(documents.values()).index), "in their own order"
    backwards = dict(reversed(documents.items()))
    assert [set(data._share(backwards, 12, split)) for split in data.SPLITS] == [set(share) for share in shares]


def test_docstrings_keep_their_prose() -> None:
    docstring = """Open a file and return a stream, or raise an OSError when that fails.

    >>> this is an example of it that is not prose at all, with many words.

x -- y

A second paragraph that has
enough words to be kept."""
    assert data._sentences(docstring) == (
        "Open a file and return a stream, or raise an OSError when that fails.\nA second paragraph that has enough words to be kept."
    )


def test_a_cache_that_cannot_be_written_gives_the_same_text(tokenizer: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_docstrings", lambda: {f"module {i}": TEXT for i in range(5)})
    options = {"count": 4, "length": 20, "split": "train"}
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("RECONKIT_CACHE", str(assets.cache_dir() / "other"))
        expected = data.load_samples("pydocs", tokenizer, **options)
    cache = request.getfixturevalue("read_only")
    before = sorted(cache.rglob("*"))
    assert torch.equal(data.load_samples("pydocs", tokenizer, **options), expected)
    assert sorted(cache.rglob("*")) == before


def test_a_full_disk_leaves_no_part_of_a_kept_text(tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    def full(stream: Any, **_: Any) -> None:
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "_docstrings", lambda: {f"module {i}": TEXT for i in range(5)})
    monkeypatch.setattr(np, "savez", full)
    assert data.load_samples("pydocs", tokenizer, count=4, length=20).shape == (4, 20)
    assert [p.suffix for p in (cache / "text").rglob("*") if p.is_file()] == [".json"]


def test_pydocs(tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [data._running_text("pydocs", split) for split in data.SPLITS]
    assert all(sum(map(len, part)) > 60_000 for part in parts) and sum(map(len, parts[0])) > 300_000
    paragraphs = [{p for text in part for p in text.split("\n\n") if p} for part in parts]
    assert not paragraphs[0] & paragraphs[1] and not paragraphs[0] & paragraphs[2] and not paragraphs[1] & paragraphs[2]
    assert not any(">>>" in text for part in parts for text in part)
    assert [p.suffix for p in (cache / "text").rglob("*") if p.is_file()] == [".json"]
    monkeypatch.setattr(data, "_docstrings", lambda: pytest.fail("parsed again"))
    drawn = data.load_samples("pydocs", tokenizer, count=4, length=64)
    assert drawn.shape == (4, 64)
    monkeypatch.setattr(data, "_running_text", lambda *_: pytest.fail("tokenised again"))
    assert torch.equal(data.load_samples("pydocs", tokenizer, count=4, length=64), drawn)


@pytest.mark.assets
def test_wiki() -> None:
    parts = {split: data._running_text("wiki", split) for split in data.SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {"train": 75, "validation": 11, "test": 10}
    assert len({text for part in parts.values() for text in part}) == 96
    whole = "".join(text for part in parts.values() for text in part)
    assert 2.4e6 < len(whole) < 3e6
    for mark in ("[[", "]]", "{{", "}}", "{|", "<ref", "</", "File:", "Category:", "'''", "&nbsp;", "http://", "()", "==\n"):
        assert mark not in whole, mark
    assert "A (named, plural As, A's, as, a's or aes) is the first letter and the first vowel in the ISO basic Latin alphabet." in whole


@pytest.mark.assets
def test_news() -> None:
    parts = [data._running_text("news", split) for split in data.SPLITS]
    assert list(map(len, parts)) == [176, 59, 58]
    assert len({story for part in parts for story in part}) == 293


@pytest.mark.assets
def test_offline_splits_share_no_sample(tokenizer: Any) -> None:
    for corpus in ("wiki", "news"):
        drawn = [{tuple(row) for row in data.load_samples(corpus, tokenizer, count=50, length=128, split=s).tolist()} for s in data.SPLITS]
        assert all(len(part) == 50 for part in drawn)
        assert not drawn[0] & drawn[1] and not drawn[0] & drawn[2] and not drawn[1] & drawn[2]


# Tasks


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ConfigError, match="task is 'bool'; it must be one of boolq, rte"):
        data.task_data("bool")


def test_tasks_of_the_mirror_come_first(mirror: Path) -> None:
    add(mirror, "zeroshot/winogrande_xl_validation.jsonl", "{}\n")
    assert data.task_data("winogrande") == mirror / "zeroshot" / "winogrande_xl_validation.jsonl"


@pytest.mark.assets
@pytest.mark.parametrize("task", data.TASKS)
def test_tasks_of_the_offline_asset_are_whole(task: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = data.task_data(task)
    assert file.is_relative_to(cache / "tasks") and file.name == f"{data.TASKS[task]}.jsonl"
    assert len(file.read_text(encoding="utf-8").splitlines()) == TASK_SIZES[task]
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    monkeypatch.setattr(data, "_task_records", lambda _: pytest.fail("made again"))
    assert data.task_data(task) == file


@pytest.mark.assets
@pytest.mark.data
@pytest.mark.parametrize("task", data.TASKS)
def test_tasks_of_the_offline_asset_equal_the_mirror(task: str, data_mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = data.task_data(task)
    assert theirs == data_mirror / "zeroshot" / f"{data.TASKS[task]}.jsonl"
    monkeypatch.delenv("RECONKIT_DATA")
    ours = data.task_data(task)
    assert ours != theirs
    assert [json.loads(line) for line in ours.open(encoding="utf-8")] == [json.loads(line) for line in theirs.open(encoding="utf-8")]


@pytest.mark.data
@pytest.mark.parametrize("corpus", ["c4", "wikitext2"])
def test_the_real_mirror_has_text_for_every_split(corpus: str, data_mirror: Path, tokenizer: Any) -> None:
    for split in data.SPLITS:
        assert data.load_samples(corpus, tokenizer, count=16, length=256, split=split).shape == (16, 256)

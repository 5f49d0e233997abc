"""Sets that are made for a model: its own text, and cloze items."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reconkit import assets, evaluation, models, testsets
from reconkit.config import ConfigError, SelfGenConfig

VOCABULARY = {2: ".", 3: "ing", **{10 + i: f" {w}" for i, w in enumerate(["river", "house", "garden", "winter", "stone", "of", "Paris2", "bread"])}}
WORDS = SimpleNamespace(
    decode=lambda ids: "".join(VOCABULARY[int(i)] for i in ids).lstrip(" "),  # as SentencePiece decoders do
    convert_ids_to_tokens=lambda i: VOCABULARY[int(i)].replace(" ", "▁"),
)
CONFIG = SelfGenConfig(batch_size=4)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECONKIT_CACHE", str(tmp_path / "cache"))
    return assets.cache_dir()


@pytest.fixture
def tiny() -> tuple:
    return models.load_model("tiny")


def text(count: int = 6, length: int = 40, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    words = torch.tensor(sorted(VOCABULARY))
    return words[torch.randint(len(words), (count, length), generator=generator)]


def test_blanks_are_whole_words_with_a_context_and_other_words_beside_them() -> None:
    samples = text()
    items = testsets.cloze_items(WORDS, samples, count=20)
    assert items.shape == (20, 2 + testsets.CHOICES)
    for i, t, true, *others in items.tolist():
        word = VOCABULARY[true]
        assert int(samples[i, t]) == true and t >= 10
        assert word.startswith(" ") and word[1:].isalpha() and len(word) > 4
        assert int(samples[i, t + 1]) != 3, "the word ends there"
        assert true not in others and len(set(others)) == testsets.CHOICES - 1
        assert all(VOCABULARY[o][1:].isalpha() for o in others)


def test_cloze_items_are_seeded_and_too_few_are_refused_with_their_number() -> None:
    a, b, c = (testsets.cloze_items(WORDS, text(), count=20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    with pytest.raises(ConfigError, match=r"500 cloze items .* only \d+ blanks"):
        testsets.cloze_items(WORDS, text())


def test_answers_equal_the_obvious_way(tiny: tuple) -> None:
    model, _ = tiny
    samples = torch.randint(3, 200, (5, 24), generator=torch.Generator().manual_seed(0))
    items = torch.stack([torch.randint(0, 5, (30,)), torch.randint(1, 24, (30,)), *(torch.randint(3, 200, (30,)) for _ in range(4))], 1)
    found = evaluation.cloze(model, samples, items, batch_size=2)
    for (i, t, *candidates), right in zip(items.tolist(), found.tolist(), strict=True):
        with torch.no_grad():
            scores = model(samples[i : i + 1, :t]).logits[0, -1, candidates]
        assert right == bool((scores[0] > scores[1:]).all())


@pytest.mark.parametrize("shared", [3, 5])
def test_what_perplexity_and_cloze_both_read_is_read_once(tiny: tuple, shared: int) -> None:
    model, tokenizer = tiny
    samples = torch.randint(3, 200, (5, 24), generator=torch.Generator().manual_seed(0))
    items = torch.stack([torch.arange(30) % 5, torch.randint(1, 24, (30,)), *(torch.randint(3, 200, (30,)) for _ in range(4))], 1)
    nll, right = evaluation.sequence_nll(model, samples[:shared], batch_size=2), evaluation.cloze(model, samples, items, batch_size=2)
    read = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True)
    options = {"perplexity": (), "texts": {"first": samples[:shared], "second": samples[1:]}, "blanks": (samples, items), "batch_size": 2}
    found = evaluation.evaluate(model, tokenizer, **options)
    handle.remove()
    assert sum(read) == 5 + 4
    assert found["perplexity"][0]["nll"] == pytest.approx(nll.tolist(), rel=1e-6) and found["cloze"]["right"] == right.int().tolist()
    other = evaluation.evaluate(model, tokenizer, **options | {"texts": {"other": samples[1:]}})
    assert other["cloze"]["right"] == right.int().tolist()


def judged(tiny: tuple, monkeypatch: pytest.MonkeyPatch, share: float) -> Any:
    """A cloze set on which the model is right in `share` of the items."""

    def answers(model: Any, samples: Any, items: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.arange(len(items)) % 100 < 100 * share

    monkeypatch.setattr(evaluation, "cloze", answers)
    return testsets.cloze_set(tiny[0], WORDS, text(60), "made test", count=500)


def test_a_set_that_the_dense_model_cannot_answer_is_refused(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"fills 30% of 500 blanks in made test right \(95 % interval over 60 articles.* where chance is 25%"):
        judged(tiny, monkeypatch, 0.3)
    assert testsets.listed() == []


def test_a_set_is_made_once_and_listed(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    items = judged(tiny, monkeypatch, 0.8)
    monkeypatch.setattr(evaluation, "cloze", None)  # nothing is judged again
    assert torch.equal(testsets.cloze_set(tiny[0], WORDS, text(60), "made test", count=500), items)
    [row] = testsets.listed()
    assert row["kind"] == "cloze" and row["size"] == "500 blanks in made test" and row["seed"] == 0
    assert "80.0% right" in row["about"] and row["fingerprint"] == evaluation.ids_sum(items)


def test_own_text_is_made_once_and_test_text_is_never_calibration_text(tiny: tuple, cache: Path) -> None:
    options = {"count": 6, "length": 16, "config": CONFIG, "progress": False}
    first = testsets.own_text(*tiny, **options)
    files = sorted((cache / "testsets").glob("own-*.jsonl"))
    stamp = files[0].stat().st_mtime_ns
    assert torch.equal(testsets.own_text(*tiny, **options), first)
    assert len(files) == 1 and files[0].stat().st_mtime_ns == stamp
    test = testsets.own_test(*tiny, count=6, length=16)
    assert test.shape == first.shape and not torch.equal(test, first)
    assert not {tuple(row) for row in test.tolist()} & {tuple(row) for row in first.tolist()}
    [row] = testsets.listed()  # calibration text is no test set
    assert (row["kind"], row["seed"], row["size"]) == ("own text", 0, "6 texts of 16 tokens") and row["model"]
    assert row["fingerprint"] == evaluation.ids_sum(test)


def test_a_corpus_gives_as_many_samples_as_the_blanks_take(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(testsets.data, "draw", lambda *_, count, **__: asked.append(count) or (text(count), [i // 2 for i in range(count)]))
    monkeypatch.setattr(evaluation, "cloze", lambda model, samples, items, **_: torch.ones(len(items), dtype=torch.bool))
    samples, items, articles = testsets.cloze_of(tiny[0], WORDS, "made", length=40)
    assert asked == [16, 20, 24, 28, 32] and len(samples) == 32 and len(items) == 500 and articles == [i // 2 for i in range(32)]
    asked.clear()
    with pytest.raises(ConfigError, match="only 0 blanks"):
        testsets.cloze_of(*tiny, "made", length=40)
    assert asked == [16], "single bytes make no words, however many there are"

"""Text that a model writes itself: the recipe, its filters, and a file that goes on where it stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from transformers import GenerationConfig

from reconkit import data, evaluation, models, selfgen, testsets
from reconkit.config import ConfigError, SelfGenConfig

ANY = SelfGenConfig(batch_size=4)


@pytest.fixture
def tiny() -> tuple:
    return models.load_model("tiny")


def generate(tiny: tuple, count: int = 5, length: int = 20, config: SelfGenConfig = ANY, **options: Any) -> selfgen.Generated:
    return selfgen.generate(*tiny, count=count, length=length, config=config, progress=False, **options)


def test_shape_seed_and_the_callers_random_state(tiny: tuple) -> None:
    state = torch.get_rng_state()
    a, b, c = (selfgen.self_generate(*tiny, count=5, length=20, seed=seed, config=ANY, progress=False) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert a.shape == (5, 20) and a.dtype == torch.long
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not set(a.flatten().tolist()) & set(tiny[1].all_special_ids), "texts that ended early are dropped"


def test_four_tokens_are_greedy_and_the_rest_is_sampled(tiny: tuple) -> None:
    model, _ = tiny
    found = generate(tiny, count=8, length=16).tokens
    with torch.no_grad():
        best = model(found).logits.argmax(-1)
    assert torch.equal(found[:, 1:5], best[:, :4])
    assert not torch.equal(found[:, 5:], best[:, 4:-1])
    assert len(set(found[:, 0].tolist())) > 1, "first tokens are drawn from the vocabulary"


def test_a_family_whose_cache_is_wrong_writes_without_it() -> None:
    """The greedy tokens of RWKV, whose state transformers 5.24 mixes up between the texts of a batch."""
    model = families.build("rwkv")
    found = selfgen.self_generate(model, models.load_model("tiny")[1], count=4, length=16, config=ANY, progress=False)
    with torch.no_grad():
        best = model(found, use_cache=False).logits.argmax(-1)
    assert torch.equal(found[:, 1:5], best[:, :4]) and model.generation_config.use_cache is not False


def test_perplexities_are_those_of_the_model_and_counts_those_of_the_filters(tiny: tuple) -> None:
    found = generate(tiny)
    nll = evaluation.sequence_nll(tiny[0], found.tokens)
    assert found.perplexity == pytest.approx(nll.exp().tolist(), rel=1e-5)
    assert found.counts["written"] >= found.counts["whole"] >= 5
    assert list(found.counts) == ["written", "whole"], "single bytes make no words, so their language is not asked for"


def test_a_smaller_count_gives_the_first_of_a_larger_one(tiny: tuple) -> None:
    assert torch.equal(generate(tiny, count=6).tokens[:3], generate(tiny, count=3).tokens)


def test_a_crop_of_a_longer_text(tiny: tuple) -> None:
    long = generate(tiny, count=4, length=40, config=SelfGenConfig(batch_size=4)).tokens
    crops = generate(tiny, count=4, length=12, config=SelfGenConfig(batch_size=4, written=40)).tokens
    assert crops.shape == (4, 12)
    inside = [any(torch.equal(crop, row[i : i + 12]) for i in range(29)) for crop, row in zip(crops, long, strict=True)]
    assert all(inside)


def test_real_prefixes_start_the_texts(tiny: tuple) -> None:
    prefixes = torch.arange(40, 100).reshape(6, 10)
    found = generate(tiny, config=SelfGenConfig(batch_size=4, start="prefix", prefix_length=7), prefixes=prefixes).tokens
    known = {tuple(row) for row in prefixes[:, :7].tolist()}
    assert {tuple(row) for row in found[:, :7].tolist()} <= known
    for wrong in (None, prefixes[:, :6]):
        with pytest.raises(ConfigError, match="prefixes"):
            generate(tiny, config=SelfGenConfig(start="prefix", prefix_length=7), prefixes=wrong)


def test_the_most_unlikely_share_is_dropped(tiny: tuple) -> None:
    all_of_them = generate(tiny, count=8)
    likely = generate(tiny, count=4, config=SelfGenConfig(batch_size=4, unlikely=0.5))
    kept = sorted(all_of_them.perplexity)[:4]
    assert sorted(likely.perplexity) == pytest.approx(kept)
    assert {tuple(r) for r in likely.tokens.tolist()} < {tuple(r) for r in all_of_them.tokens.tolist()}


@pytest.mark.parametrize(
    ("text", "code", "of"),
    [
        ("The river rises in the hills north of the town and flows south for forty miles.", "en", "en"),
        ("Der Fluss entspringt in den Hügeln nördlich der Stadt und fließt vierzig Meilen nach Süden.", "en", "de"),
        ("Hm, ok.", "en", None),
    ],
)
def test_language(text: str, code: str, of: str | None) -> None:
    assert selfgen.language(text) == of
    assert selfgen.language(text) == selfgen.language(text)


def test_code_and_repetition_are_told_from_prose() -> None:
    prose = "The river rises in the hills north of the town, and flows (slowly) for forty miles."
    code = "for (int i = 0; i < n; ++i) { total += values[i] * weights[i]; }"
    assert selfgen.symbols(prose) < 0.03 < 0.1 < selfgen.symbols(code)
    assert selfgen.symbols("") == 0
    assert selfgen.distinct(list(range(20))) == 1
    assert selfgen.distinct([1, 2] * 10) == 2 / 17
    assert selfgen.distinct([1, 2, 3]) == 0


def test_filters_are_applied_in_order_and_counted(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(selfgen, "language", lambda text: asked.append(text) or ("en" if len(asked) % 2 else "fr"))
    monkeypatch.setattr(selfgen, "distinct", lambda tokens: tokens[-1] / 300)
    found = generate(tiny, count=3, config=SelfGenConfig(batch_size=8, language="en", distinct=0.2))
    assert list(found.counts) == ["written", "whole", "in en", "not repeating"]
    assert found.counts["in en"] == math.ceil(found.counts["whole"] / 2)
    assert found.counts["in en"] > found.counts["not repeating"] >= 3
    assert all(row[-1] >= 60 for row in found.tokens.tolist())


def only_ends(tiny: tuple) -> tuple:
    """A model whose every word is the end of the text."""
    model, tokenizer = tiny
    model.generation_config = GenerationConfig(eos_token_id=list(range(5, len(tokenizer))))
    return model, tokenizer


@pytest.mark.parametrize("case", ["ends", "language"])
def test_too_little_is_said_with_the_counts_and_nothing_is_lost(tiny: tuple, case: str, tmp_path: Path) -> None:
    config = SelfGenConfig(batch_size=32, language="en" if case == "language" else None)
    model = only_ends(tiny) if case == "ends" else tiny
    with pytest.raises(RuntimeError, match=r"128 written, (0 whole|\d+ whole, [0-6] in en)"):
        selfgen.write(tmp_path / "self.jsonl", *model, count=8, length=60, config=config, progress=False)
    assert [f.name for f in tmp_path.iterdir()] == ["self.jsonl.partial"]
    assert len((tmp_path / "self.jsonl.partial").read_text().splitlines()) == 5, "what was made by, and four batches"


@pytest.mark.parametrize(
    ("count", "length", "config", "field"),
    [
        (0, 20, ANY, "count"),
        (2, 5, ANY, "length"),
        (2, 10_000, ANY, "length"),
        (2, 20, SelfGenConfig(written=10), "written"),
        (2, 20, SelfGenConfig(written=10_000), "written"),
        (2, 8, SelfGenConfig(start="prefix"), "length"),
    ],
)
def test_impossible_sizes(tiny: tuple, count: int, length: int, config: SelfGenConfig, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        generate(tiny, count=count, length=length, config=config)


@pytest.mark.parametrize(
    "wrong",
    [{"start": "word"}, {"temperature": 0}, {"language": "english"}, {"unlikely": 1.0}, {"symbols": 0}, {"batch_size": 0}, {"distinct": 2}],
)
def test_settings_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SelfGenConfig(**wrong)


def write(tiny: tuple, file: Path, **options: Any) -> selfgen.Generated:
    return selfgen.write(file, *tiny, **{"count": 10, "length": 16, "config": ANY, "progress": False, **options})


def test_a_file_loads_as_the_same_samples_and_says_how_it_was_made(tiny: tuple, tmp_path: Path) -> None:
    file = tmp_path / "new" / "self.jsonl"
    found = write(tiny, file, seed=3)
    assert [p.name for p in file.parent.iterdir()] == ["self.jsonl"]
    assert torch.equal(data.load_samples(str(file), tiny[1], count=None, length=16), found.tokens)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["perplexity"] for line in lines] == pytest.approx(found.perplexity, abs=1e-4)
    made = lines[0]["made"]
    assert made["seed"] == 3 and made["batch_size"] == 4 and made["temperature"] == 1.0 and len(made["weights"]) == 16


def test_the_same_seed_gives_the_same_bytes_and_another_one_other_text(tiny: tuple, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(tiny, tmp_path / f"{name}.jsonl", seed=seed)
    a, b, c = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "abc")
    assert a == b and a != c


@pytest.fixture
def bos_tiny(tiny: tuple) -> tuple:
    """The tiny model with a tokenizer that puts a BOS token before a text."""
    from tokenizers.processors import TemplateProcessing

    tiny[1].backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return tiny


@pytest.mark.parametrize("written", [None, 40])
def test_texts_after_a_bos_token(bos_tiny: tuple, written: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model sees it before every text, and before a crop; the filters do not see it, and it is never predicted."""
    seen: list[list[int]] = []
    monkeypatch.setattr(selfgen, "distinct", lambda tokens: seen.append(tokens) or 1.0)
    found = generate(bos_tiny, count=4, length=16, config=SelfGenConfig(batch_size=4, written=written, distinct=0.5), bos="auto")
    assert found.tokens.shape == (4, 16) and (found.tokens[:, 0] == 1).all() and not (found.tokens[:, 1:] < 3).any()
    assert found.tokens[:, 1:].tolist() == seen[:4]
    with torch.no_grad():
        logits = bos_tiny[0](found.tokens).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), found.tokens[:, 1:].flatten(), reduction="none").view(4, 15)
    assert found.perplexity == pytest.approx(expected.mean(1).exp().tolist(), rel=1e-5)
    if written is None:
        assert torch.equal(found.tokens[:, 2:6], logits.argmax(-1)[:, 1:5]), "four greedy tokens after the first one"
    without = generate(bos_tiny, count=4, length=16, config=SelfGenConfig(batch_size=4, written=written))
    assert (without.tokens != 1).all() and not torch.equal(without.tokens[:, 1:], found.tokens[:, 1:])


def test_a_file_of_texts_after_a_bos_token_loads_as_the_same_samples(bos_tiny: tuple, tmp_path: Path) -> None:
    found = write(bos_tiny, tmp_path / "self.jsonl", bos="auto")
    assert torch.equal(data.load_samples(str(tmp_path / "self.jsonl"), bos_tiny[1], count=None, length=16, bos="auto"), found.tokens)
    assert "<bos>" not in (tmp_path / "self.jsonl").read_text()
    own = {"count": 5, "length": 16, "config": ANY, "progress": False}
    first, again = (testsets.own_text(*bos_tiny, **own, bos="auto") for _ in range(2))
    assert torch.equal(first, again) and torch.equal(first, found.tokens[:5]) and not torch.equal(first, testsets.own_text(*bos_tiny, **own))


@pytest.mark.parametrize("batches", [0, 1, 2])
@pytest.mark.parametrize("cut", [False, True])
def test_an_interrupted_file_goes_on_to_the_same_bytes(tiny: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int, cut: bool) -> None:
    write(tiny, tmp_path / "unbroken.jsonl")
    real, calls = selfgen._batch, []

    def interrupted(*args: Any) -> Any:
        if len(calls) == batches:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)

    file = tmp_path / "broken.jsonl"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(selfgen, "_batch", interrupted)
        write(tiny, file)
    partial = tmp_path / "broken.jsonl.partial"
    assert partial.is_file() and not file.exists()
    if cut:  # killed in the middle of a line
        partial.write_text(partial.read_text()[:-20])
    again: list[Any] = []
    monkeypatch.setattr(selfgen, "_batch", lambda *args: again.append(args) or real(*args))
    write(tiny, file)
    assert file.read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()
    assert not partial.exists()
    assert len(again) < 3 or batches == 0 or cut, "finished batches are not written anew"


def test_what_was_begun_otherwise_is_refused(tiny: tuple, tmp_path: Path) -> None:
    file = tmp_path / "self.jsonl"
    with pytest.raises(RuntimeError):
        write(only_ends(tiny), file, config=SelfGenConfig(batch_size=64))
    before = (tmp_path / "self.jsonl.partial").read_bytes()
    with pytest.raises(ConfigError, match="another seed"):
        write(tiny, file, seed=1, config=SelfGenConfig(batch_size=64))
    assert (tmp_path / "self.jsonl.partial").read_bytes() == before


def test_a_truncated_file_is_refused_with_its_line(tiny: tuple, tmp_path: Path) -> None:
    file = tmp_path / "self.jsonl"
    write(tiny, file, count=3)
    file.write_text(file.read_text()[:-30])
    with pytest.raises(ConfigError, match="line 3 is not JSON.*2 whole lines"):
        data.load_samples(str(file), tiny[1], count=None, length=16)

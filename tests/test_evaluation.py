"""Measurements against their slow twins."""

from __future__ import annotations

import json

import families
import numpy as np
import pytest
import reference
import torch
from scipy import stats

from reconkit import data, evaluation, models, pruning, zeroshot
from reconkit.config import ConfigError, PruneConfig


@pytest.fixture
def tiny() -> tuple:
    return models.load_model("tiny")


def tokens(count: int = 6, length: int = 20) -> torch.Tensor:
    return torch.randint(3, 250, (count, length), generator=torch.Generator().manual_seed(0))


def test_perplexity_equals_its_twin_and_does_not_depend_on_batches(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny
    expected = reference.perplexity(model, tokens())
    for batch_size in (1, 4, 8):
        assert evaluation.perplexity(model, tokens(), batch_size=batch_size) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(evaluation, "LOGITS", 1)
    assert evaluation.perplexity(model, tokens()) == pytest.approx(expected, rel=1e-5)


def test_a_long_sequence_is_read_in_pieces(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many logits as fit at once, and the same figures, for models that look back over the whole text or over a part of it."""
    seen: list[int] = []
    for model in (tiny[0], families.build("gemma3 (sliding and full layers)")):
        ids = families.tokens(3, 20)
        expected = evaluation.sequence_nll(model, ids)
        model.get_output_embeddings().register_forward_hook(lambda _, __, logits: seen.append(logits.numel()))
        monkeypatch.setattr(evaluation, "LOGITS", 7 * model.get_output_embeddings().out_features)
        assert torch.allclose(evaluation.sequence_nll(model, ids), expected, atol=1e-5)
        assert len(seen) == 9 and max(seen) <= evaluation.LOGITS
        seen.clear()
        monkeypatch.undo()


@pytest.mark.parametrize("count", [12, None])
def test_the_interval_of_a_record_is_over_articles(count: int | None, tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Student's t over the articles of the windows, each weighted by how many windows it has; the paired ratio likewise."""
    made = {f"module {i}": " ".join(str((31 * i + k) ** 3) for k in range(60)) for i in range(20)}
    monkeypatch.setattr(data, "_pydocs", lambda: made)
    model, tokenizer = tiny
    other = models.load_model("tiny")[0]
    other.lm_head.weight.data *= 1.5
    [row] = evaluation.evaluate(model, tokenizer, perplexity=["pydocs"], count=count, length=32, against=other)["perplexity"]
    assert row["articles"] == data.load_articles("pydocs", tokenizer, count=count, length=32, split="test")
    samples = data.load_samples("pydocs", tokenizer, count=count, length=32, split="test")
    own, against = evaluation.sequence_nll(model, samples), evaluation.sequence_nll(other, samples)
    assert row["nll"] == pytest.approx(own.tolist()) and row["n"] == len(set(row["articles"])) < len(samples)
    for nll, names in ((own, ("value", "low", "high")), (own - against, ("ratio", "ratio_low", "ratio_high"))):
        mean, error = float(nll.mean()), reference.clustered_error(nll.tolist(), row["articles"])
        half = stats.t.ppf(0.975, row["n"] - 1) * error
        assert [row[name] for name in names] == pytest.approx(np.exp([mean, mean - half, mean + half]).tolist(), rel=1e-4)


def test_texts_that_are_given_are_articles_and_one_alone_has_no_bounds(tiny: tuple) -> None:
    texts = {"own": tokens(3), "single": tokens(1)}
    own, single = evaluation.evaluate(*tiny, perplexity=(), texts=texts)["perplexity"]
    assert own["articles"] == [0, 1, 2] and own["n"] == 3 and 0 < own["low"] < own["value"] < own["high"] < np.inf
    assert (single["n"], single["low"], single["high"]) == (1, 0, np.inf)


@pytest.mark.parametrize("known", [True, False])
def test_cloze_answers_of_one_article_belong_together(known: bool, tiny: tuple) -> None:
    """The samples' articles where they are given, else the samples."""
    model, tokenizer = tiny
    other = models.load_model("tiny")[0]
    other.lm_head.weight.data = other.lm_head.weight.data.flip(1)
    samples, generator = tokens(6, 24), torch.Generator().manual_seed(1)
    items = torch.stack([torch.arange(60) % 6, torch.randint(1, 24, (60,), generator=generator)], 1)
    items = torch.cat([items, torch.randint(3, 200, (60, 4), generator=generator)], 1)
    articles = [7, 7, 8, 8, 9, 9]
    blanks = (samples, items, articles) if known else (samples, items)
    found = evaluation.evaluate(model, tokenizer, perplexity=(), blanks=blanks, against=other)["cloze"]
    clusters = [articles[i] if known else i for i in items[:, 0].tolist()]
    right = evaluation.cloze(model, samples, items).int()
    change = right - evaluation.cloze(other, samples, items).int()
    assert found["article"] == clusters and found["sample"] == items[:, 0].tolist() and found["n"] == (3 if known else 6)
    for values, names in ((right, ("value", "low", "high")), (change, ("difference", "difference_low", "difference_high"))):
        mean = float(values.double().mean())
        half = stats.t.ppf(0.975, found["n"] - 1) * reference.clustered_error(values.tolist(), clusters)
        expected = [mean, mean - half, mean + half]
        assert [found[name] for name in names] == pytest.approx(expected if names[0] == "difference" else np.clip(expected, 0, 1).tolist())


def test_a_broken_model_has_an_infinite_perplexity(tiny: tuple) -> None:
    tiny[0].lm_head.weight.data *= 1e9
    assert evaluation.perplexity(tiny[0], tokens()) == np.inf
    [row] = evaluation.evaluate(*tiny, perplexity=(), texts={"any": tokens()})["perplexity"]
    assert (row["value"], row["high"]) == (np.inf, np.inf) and json.loads(json.dumps(row))["n"] == 6


def test_too_short_sequences_are_refused(tiny: tuple) -> None:
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        evaluation.perplexity(tiny[0], tokens(3, 1))


def test_the_record_refuses_before_it_measures(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "sequence_nll", lambda *args, **options: pytest.fail("measured first"))
    with pytest.raises(ConfigError, match="chess"):
        evaluation.evaluate(*tiny, perplexity=["pydocs"], count=2, length=16, tasks=["chess"])
    monkeypatch.setattr(zeroshot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"reconkit\[eval\]"):
        evaluation.evaluate(*tiny, perplexity=["pydocs"], count=2, length=16, tasks=["boolq"])


def test_size_counts_zeros_and_promises_no_byte(tiny: tuple) -> None:
    model, _ = tiny
    before = evaluation.size(model)
    for view in models.weight_views(models.blocks(model)[1][0])[0]:
        view.get().zero_()
    after = evaluation.size(model)
    assert before["zeros"] == 0 and after["zeros"] == 0.25 and after["bytes"] == before["bytes"] == 4 * before["parameters"]


def test_the_record_holds_everything_that_was_asked_for(tiny: tuple) -> None:
    model, tokenizer = tiny
    record = evaluation.evaluate(model, tokenizer, perplexity=["pydocs"], count=5, length=32, against=model, speed=True, speed_batches=(1, 2))
    [row] = record["perplexity"]
    assert row["low"] < row["value"] < row["high"] and len(row["nll"]) == 5 and row["tokens"] == 5 * 31
    assert (row["ratio"], row["ratio_low"], row["ratio_high"]) == (1, 1, 1)
    assert {(r["model"], r["batch"]) for r in record["speed"]} == {(m, b) for m in ("this", "against") for b in (1, 2)}
    assert (row["dtype"], row["device"]) == ("float32", model.device.type) and row["data"].startswith("pydocs test")
    assert record["zero_shot"] == [] and record["cost"]["seconds"] > 0
    same = evaluation.evaluate(model, tokenizer, perplexity=["pydocs"], count=5, length=32)
    assert same["speed"] == [] and same["fingerprint"] == record["fingerprint"]
    model.lm_head.weight.data[0, 0] += 1
    assert evaluation.evaluate(model, tokenizer, perplexity=["pydocs"], count=5, length=32)["fingerprint"] != record["fingerprint"]


def test_the_wrong_model_is_never_scored(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny
    result = pruning.prune(model, tokens(4, 16), PruneConfig(technique="LR"), progress=False)
    evaluation.evaluate(model, tokenizer, perplexity=["pydocs"], count=2, length=16, sparsity=result.sparsity)
    monkeypatch.setattr(evaluation, "sequence_nll", lambda *args, **options: pytest.fail("scored"))
    for other, sparsity in ((models.load_model("tiny")[0], 0.5), (model, 0.2)):
        with pytest.raises(RuntimeError, match="another model, or its masks"):
            evaluation.evaluate(other, tokenizer, perplexity=["pydocs"], count=2, length=16, sparsity=sparsity)


def test_the_packed_size_and_what_a_million_tokens_cost(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny
    pruning.prune(model, tokens(4, 16), PruneConfig(technique="LR", sparsity=0.75), progress=False)
    options = {"perplexity": [], "packed": True, "speed": True, "speed_batches": (2,), "price_per_hour": 3.6}
    record = evaluation.evaluate(model, tokenizer, **options)
    assert record["size"]["packed_bytes"] < 0.6 * record["size"]["plain_bytes"]
    speed = next(r["value"] for r in record["speed"] if r["measure"] == "decode_tokens_per_second")
    assert record["cost"]["million_tokens/2"] == pytest.approx(1e6 / speed * 0.001)
    assert record["cost"]["money"] == pytest.approx(record["cost"]["seconds"] * 0.001)
    monkeypatch.setattr(evaluation.packing, "unpack", lambda file: {})
    with pytest.raises(RuntimeError, match="came back changed"):
        evaluation.evaluate(model, tokenizer, perplexity=[], packed=True)

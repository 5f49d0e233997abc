"""Measurements against their slow twins."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import reference
import torch

from reconkit import data, evaluation, models
from reconkit.config import ConfigError


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


def test_interval_is_that_of_the_mean_over_sequences() -> None:
    nll = torch.tensor([3.0, 3.2, 3.4, 3.6], dtype=torch.float64)
    low, high = evaluation.perplexity_interval(nll)
    half = 1.959964 * math.sqrt(((nll - 3.3) ** 2).sum().item() / 3 / 4)
    assert (low, high) == pytest.approx((math.exp(3.3 - half), math.exp(3.3 + half)))
    assert evaluation.perplexity_interval(nll[:1])[1] == math.inf, "one sequence says nothing about the spread"


def test_a_paired_ratio_is_narrower_than_two_intervals() -> None:
    nll = torch.linspace(2, 5, 20, dtype=torch.float64)
    ratio, low, high = evaluation.perplexity_ratio(nll + 0.1, nll)
    assert (ratio, low, high) == pytest.approx((math.exp(0.1),) * 3)


def test_a_broken_model_has_an_infinite_perplexity() -> None:
    nll = torch.tensor([10.0, 2000.0], dtype=torch.float64)
    assert evaluation.perplexity_interval(nll) == (0, math.inf)
    assert evaluation.perplexity_ratio(nll, nll - 1000) == (math.inf,) * 3


def test_too_short_sequences_are_refused(tiny: tuple) -> None:
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        evaluation.perplexity(tiny[0], tokens(3, 1))


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty questions whose answer the tiny model cannot know."""
    items = [{"question": f"is {i} odd", "passage": f"{i} is a number.", "idx": i, "label": i % 2} for i in range(30)]
    file = tmp_path / "boolq.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    monkeypatch.setattr(data, "task_data", lambda task: file)


def test_zero_shot_draws_by_seed_and_compares_item_by_item(tiny: tuple, questions: None) -> None:
    pytest.importorskip("lm_eval")
    model, tokenizer = tiny
    state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    table = evaluation.zero_shot(model, tokenizer, ["boolq"], limit=12, against=model)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python and all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy, strict=True))
    assert list(table.columns) == ["task", "metric", "value", "stderr", "n", "difference", "low", "high"]
    [row] = table.to_dict("records")
    assert (row["task"], row["metric"], row["n"], row["difference"], row["low"], row["high"]) == ("boolq", "acc", 12, 0, 0, 0)
    other, _ = models.load_model("tiny")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    [row] = evaluation.zero_shot(other, tokenizer, ["boolq"], limit=12, against=model).to_dict("records")
    assert row["low"] <= row["difference"] <= row["high"] and row["low"] < row["high"]
    [alone] = evaluation.zero_shot(other, tokenizer, ["boolq"], limit=12).to_dict("records")
    assert math.isnan(alone["difference"]) and alone["low"] < alone["value"] < alone["high"] and alone["value"] == row["value"]


def test_draws(tmp_path: Path) -> None:
    source = tmp_path / "all.jsonl"
    source.write_text("".join(f'{{"n": {i}}}\n' for i in range(50)))

    def drawn(limit: int | None, seed: int) -> list[str]:
        return evaluation._draw(source, tmp_path / "some.jsonl", limit, seed).read_text().splitlines()

    assert drawn(9, 0) == drawn(9, 0) != drawn(9, 1)
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"n": "a\u2028b\x85c"}\n{"n": 2}\n', encoding="utf-8")
    assert evaluation._draw(odd, tmp_path / "same.jsonl", None, 0).read_bytes() == odd.read_bytes(), "an item is a line of JSON, whatever it holds"
    assert len(set(drawn(9, 0))) == 9 and set(drawn(9, 0)) < set(drawn(None, 0)) and len(drawn(99, 0)) == 50


def test_an_unknown_task_is_refused_before_any_work(tiny: tuple) -> None:
    with pytest.raises(ConfigError, match="boolq.*winogrande"):
        evaluation.zero_shot(*tiny, ["chess"])
    with pytest.raises(ConfigError, match="limit is 0"):
        evaluation.zero_shot(*tiny, ["boolq"], limit=0)


def test_the_record_refuses_before_it_measures(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "sequence_nll", lambda *args, **options: pytest.fail("measured first"))
    with pytest.raises(ConfigError, match="chess"):
        evaluation.evaluate(*tiny, perplexity=["pydocs"], count=2, length=16, tasks=["chess"])
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"reconkit\[eval\]"):
        evaluation.evaluate(*tiny, perplexity=["pydocs"], count=2, length=16, tasks=["boolq"])


def test_nothing_is_said_on_stderr(
    tiny: tuple, questions: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """git, which lm-eval asks for a version, complains outside a repository."""
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    evaluation.zero_shot(*tiny, ["boolq"], limit=2)
    assert "git" not in capfd.readouterr().err


@pytest.mark.data
@pytest.mark.slow
def test_requests_and_scores_are_those_of_plain_lm_eval(tiny: tuple, data_mirror: Path) -> None:
    """The same items through lm-eval's whole task list, as its own documentation calls it."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = tiny
    file = str(data_mirror / "zeroshot" / "rte_validation.jsonl")
    task = {
        "task": "rte",
        "dataset_path": "json",
        "dataset_name": None,
        "training_split": None,
        "dataset_kwargs": {"data_files": {"validation": file}},
    }
    plain = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=[{"group": "g", "task": [task]}],
        task_manager=TaskManager(),
        bootstrap_iters=0,
    )
    [row] = evaluation.zero_shot(model, tokenizer, ["rte"]).to_dict("records")
    assert row["n"] == 277 and row["value"] == pytest.approx(plain["results"]["rte"]["acc,none"])


def test_size_counts_zeros_and_promises_no_byte(tiny: tuple) -> None:
    model, _ = tiny
    before = evaluation.size(model)
    for view in models.weight_views(models.blocks(model)[1][0])[0]:
        view.get().zero_()
    after = evaluation.size(model)
    assert before["zeros"] == 0 and after["zeros"] == 0.25 and after["bytes"] == before["bytes"] == 4 * before["parameters"]


def test_speed_measures_both_phases(tiny: tuple) -> None:
    found = evaluation.speed(tiny[0], length=8, tokens=4, repeats=1)
    assert set(found) == {"prefill_tokens_per_second", "decode_tokens_per_second"} and all(v > 0 for v in found.values())


def test_speed_subtracts_the_prompt_as_generation_reads_it(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a second a generated token and no other time: a plain forward would have no such length."""
    monkeypatch.setattr(evaluation, "_timed", lambda work, device: 0.1 * (work().shape[1] - 8))
    found = evaluation.speed(tiny[0], length=8, tokens=4, repeats=1)
    assert found == pytest.approx({"prefill_tokens_per_second": 80, "decode_tokens_per_second": 10})


def test_the_record_holds_everything_that_was_asked_for(tiny: tuple) -> None:
    model, tokenizer = tiny
    record = evaluation.evaluate(model, tokenizer, perplexity=["pydocs"], count=5, length=32, against=model, speed=True)
    [row] = record["perplexity"]
    assert row["low"] < row["value"] < row["high"] and len(row["nll"]) == 5 and row["tokens"] == 5 * 31
    assert (row["ratio"], row["ratio_low"], row["ratio_high"]) == (1, 1, 1)
    assert record["speed"]["prefill_tokens_per_second"] > 0 and record["zero_shot"] == [] and record["cost"]["seconds"] > 0
    same = evaluation.evaluate(model, tokenizer, perplexity=["pydocs"], count=5, length=32)
    assert same["speed"] is None and same["fingerprint"] == record["fingerprint"]
    model.lm_head.weight.data[0, 0] += 1
    assert evaluation.evaluate(model, tokenizer, perplexity=["pydocs"], count=5, length=32)["fingerprint"] != record["fingerprint"]

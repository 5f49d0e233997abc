"""The dashboard page and the monitor, from a history made here."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest

from reconkit import report
from reconkit.config import ConfigError, PruneConfig, RunConfig


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    rows = {
        "id": ["aaa", "bbb", "ccc"],
        "created": ["2026-01-01T10:00:00", "2026-01-03T10:00:00", "2026-01-02T10:00:00"],
        "tag": ["<script>alert(1)</script>", None, "dense & whole"],
        "model": ["tiny"] * 3,
        "technique": ["LR", "BR+GP", None],
        "verdict": ["fine", "watch", None],
        "perplexity/wiki": [42.125, 37.25, 26.5],
        "perplexity/wiki/low": [40.0, 36.0, 25.0],
        "accuracy/boolq": [0.5, 0.75, 0.6],
        "nmse/calibration": [0.104, 0.07, float("nan")],
        "memory/gpu": [float("nan")] * 3,
    }
    table = pd.DataFrame(rows)
    monkeypatch.setattr(report.runs, "history", lambda: table)
    return table


def test_the_table_is_newest_first_without_interval_ends_and_empty_columns(history: pd.DataFrame) -> None:
    table = report.arrange(history)
    assert list(table["id"]) == ["ccc", "bbb", "aaa"], "in the order of recording, whatever the clock said"
    assert list(table.columns) == [
        "id", "created", "tag", "model", "technique", "verdict", "perplexity/wiki", "accuracy/boolq", "nmse/calibration",
    ]  # fmt: skip


def test_best_is_what_no_other_version_beats(history: pd.DataFrame) -> None:
    table = history.assign(**{"seconds/prune": [10.0, 5.0, 1.0], "technique": ["LR", "BR+GP", "BR"]})
    said = report.best(table, "accuracy/boolq", "seconds/prune", 9)
    assert said.index("ccc") < said.index("bbb") and "aaa" not in said
    assert "2 of 3 pruned versions" in said and "more accuracy/boolq is better" in said
    assert report.best(table, "accuracy/boolq", "seconds/prune", 1).count("\n") == 3 and "BR+GP" in said
    said = report.best(table, "nmse/calibration", "seconds/prune", 9)
    assert "bbb" in said and "ccc" not in said, "what was not measured is beaten by none and shown by none"
    assert "dense" not in report.best(history.assign(**{"seconds/prune": 1.0, "technique": "dense"}), "perplexity/wiki", "seconds/prune", 9)
    for metric, cost, limit, word in (
        ("beauty", "seconds/prune", 2, "nmse/calibration"), ("perplexity/wiki", "beauty", 2, "--cost"),
        ("perplexity/wiki", "seconds/prune", 0, "--limit"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=word):
            report.best(table, metric, cost, limit)


def test_a_run_and_a_result_are_described_in_full() -> None:
    run = SimpleNamespace(
        id="aaa",
        folder="cache/runs/aaa",
        config=RunConfig("tiny", prune=PruneConfig(criterion="wanda")),
        metrics={"sparsity": 0.5},
        notes=["Kept dense."],
        errors=pd.DataFrame(columns=["block", "source", "mse", "nmse"]),
        training=pd.DataFrame(columns=["window", "epoch", "source", "loss"]),
    )
    said = report.describe(run)
    for text in ("nothing was pruned", "aaa", "tiny", "prune.criterion", "wanda", "sparsity", "Kept dense."):
        assert text in said
    errors = pd.DataFrame(
        {"block": [0, 0, 1, 1], "source": ["calibration", "wiki"] * 2, "mse": [1.0, 2.0, 3.0, 4.0], "nmse": [0.07, 0.08, 0.03, 0.04]}
    )
    training = pd.DataFrame(columns=["window", "epoch", "source", "loss"])
    result = SimpleNamespace(
        errors=errors, training=training, sparsity=0.5, seconds=3725.0, peak_memory={"gpu": 0, "rss": 2_500_000_000}, notes=["A note."]
    )
    said = report.summary(result)
    for text in ("0.03", "0.04", "1:02:05", "2.5 GB rss", "verdict", "A note."):
        assert text in said
    assert "0.07" not in said and "gpu" not in said


def test_an_evaluation_is_one_table_with_intervals_and_changes() -> None:
    perplexity = {
        "corpus": "wiki",
        "tokens": 8160,
        "value": 26.5,
        "low": 25.0,
        "high": 28.0,
        "n": 7,
        "ratio": 1.25,
        "ratio_low": 1.2,
        "ratio_high": 1.3,
    }
    score = {"task": "boolq", "metric": "acc", "value": 0.5, "stderr": 0.05, "n": 100, "difference": -0.02, "low": -0.07, "high": 0.03}
    cloze = {
        "value": 0.4,
        "low": 0.35,
        "high": 0.45,
        "n": 12,
        "right": [0] * 500,
        "article": [0] * 500,
        "difference": -0.1,
        "difference_low": -0.12,
        "difference_high": -0.08,
    }
    rate = {"batch": 1, "measure": "decode_tokens_per_second"}
    speed = [{"model": m, **rate, "value": v, "low": v, "high": v, "n": 5} for m, v in (("this", 30.0), ("against", 20.0))]
    said = report.evaluation({"perplexity": [perplexity], "zero_shot": [score], "cloze": cloze, "speed": speed, "size": {}, "cost": {"money": 2.5}})
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert lines[1:] == [
        "perplexity, wiki 26.5 25 to 28 8160 tokens, 7 articles +25.0% (+20.0% to +30.0%)",
        "acc, cloze 0.4 0.35 to 0.45 500 items, 12 articles -10.0 points (-12.0 points to -8.0 points)",
        "acc, boolq 0.5 0.4038 to 0.5962 100 items -2.0 points (-7.0 points to +3.0 points)",
        "decode tokens per second, batch 1 30 30 to 30 quartiles of 5 turns 1.50 times",
        "the other's decode tokens per second, batch 1 20 20 to 20 quartiles of 5 turns",
        "cost, money 2.5",
    ]
    alone = report.evaluation({"perplexity": [], "zero_shot": [{**score, "difference": float("nan")}]})
    assert "0.4038 to 0.5962" in alone and "points" not in alone and "against" not in alone


def test_an_evaluation_record_is_shown_without_its_per_sequence_values() -> None:
    row = {"corpus": "wiki", "split": "test", "length": 256, "tokens": 8160, "value": 26.5, "low": 25.0, "high": 28.0, "nll": [3.25, 3.5]}
    said = report.evaluation({"model": "tiny", "perplexity": [row], "zero_shot": [], "speed": None, "size": {"parameters": 134515008}, "cost": {}})
    assert "wiki" in said and "26.5" in said and "parameters" in said and "134,515,008" in said and "3.25" not in said

"""A run as rows of the history, and how two versions compare."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import reference

from reconkit import history, runs, versions
from reconkit.config import PruneConfig, RunConfig

TINY: dict[str, Any] = {
    "model": "tiny", "corpus": "pydocs", "count": 8, "length": 32, "held_out": ("pydocs",), "held_out_count": 2, "test": ("pydocs",), "test_count": 4,
}  # fmt: skip


def run(**how: Any) -> runs.Run:
    return runs.run(RunConfig(**TINY, prune=PruneConfig(criterion="wanda", technique="LR", **how)))


def test_rows_are_the_runs_metrics_and_its_gap() -> None:
    found = run()
    rows = {versions.name_of(row["metric"], row["test_set"]): row for row in versions.measurements(found)}
    plain = {name: value for name, value in found.metrics.items() if not name.endswith(versions.ENDS)}
    assert {name: row["value"] for name, row in rows.items() if row["metric"] != "gap"} == plain
    assert rows["gap/pydocs"]["value"] == plain["nmse/pydocs"] / plain["nmse/calibration"] and "gap/calibration" not in rows
    row, [told] = rows["perplexity/pydocs"], found.record["evaluation"]["perplexity"]
    assert json.loads(row["items"]) == told["nll"] and row["n"] == 4 and row["sample"] == told["samples"] and row["direction"] == "lower"
    assert (row["low"], row["high"]) == (told["low"], told["high"]) and row["stderr"] > 0
    facts = versions.facts(found)
    assert facts["version"] == found.id and facts["technique"] == "LR" and json.loads(facts["settings"])["count"] == 8
    assert set(facts) <= set(history.FACTS) and all(set(row) <= set(history.MEASURED) for row in rows.values())


def test_the_configurations_sum_says_the_same_question_whatever_code_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    first = run()
    monkeypatch.setattr(runs, "code_hash", lambda rooms: "other code")
    second, third = run(), run(sparsity=0.6)
    a, b, c = (versions.facts(r) for r in (first, second, third))
    assert a["version"] != b["version"] and a["configuration"] == b["configuration"] != c["configuration"]


def test_a_run_comes_back_from_the_history_as_it_was() -> None:
    found = run()
    [row] = runs.history().to_dict("records")
    assert row["id"] == found.id and row["count"] == 8 and row["verdict"] == found.record["verdict"]
    assert {name: row[name] for name in found.metrics} == pytest.approx(found.metrics)


def perplexity(nll: list[float], sample: str = "s", stderr: float | None = None) -> dict[str, Any]:
    row = {"metric": "perplexity", "test_set": "wiki", "value": float(np.exp(np.mean(nll))), "sample": sample, "items": json.dumps(nll)}
    return {**row, "stderr": stderr}


def accuracy(right: list[int], sample: str = "s", task: str = "boolq") -> dict[str, Any]:
    error = float(np.std(right, ddof=1) / len(right) ** 0.5)
    return {"metric": "accuracy", "test_set": task, "value": float(np.mean(right)), "sample": sample, "items": json.dumps(right), "stderr": error}


def test_changes_are_paired_where_the_items_are_the_same() -> None:
    draw = np.random.default_rng(0)
    a, b = (list(draw.normal(3.0, 0.5, 20)) for _ in range(2))
    change, low, high, paired = versions.change(perplexity(a), perplexity(b))
    assert paired and change == pytest.approx(np.exp(np.mean(a)) / np.exp(np.mean(b)) - 1) and low < change < high
    right, other = ([int(x) for x in draw.random(50) < p] for p in (0.7, 0.5))
    change, low, high, paired = versions.change(accuracy(right), accuracy(other))
    expected = reference.paired_difference(right, other)
    assert paired and (change, low, high) == pytest.approx(expected)
    same = versions.change(accuracy(right), accuracy(right))
    assert same == (0.0, 0.0, 0.0, True)


def test_cloze_pairs_are_clustered_by_text() -> None:
    a = {"right": [1, 1, 0, 1, 0, 0, 1, 1], "sample": [0, 0, 0, 1, 1, 2, 2, 3]}
    b = {"right": [1, 0, 0, 0, 0, 1, 1, 0], "sample": [0, 0, 0, 1, 1, 2, 2, 3]}
    rows = [{"metric": "accuracy", "test_set": "cloze", "value": np.mean(x["right"]), "sample": "s", "items": json.dumps(x)} for x in (a, b)]
    change, low, high, paired = versions.change(*rows)
    assert paired and change == pytest.approx(2 / 8)
    assert high - low == pytest.approx(2 * 1.96 * reference.clustered_error(np.subtract(a["right"], b["right"]), a["sample"]), rel=1e-3)


def test_other_items_are_compared_by_both_standard_errors_and_plain_figures_not_at_all() -> None:
    change, low, high, paired = versions.change(perplexity([3.0, 3.2], "s", 1.0), perplexity([3.0, 3.1], "t", 2.0))
    other = perplexity([3.0, 3.1])["value"]
    assert not paired and high - low == pytest.approx(2 * 1.96 * 5**0.5 / other, rel=1e-3)
    error = {"metric": "nmse", "test_set": "calibration", "value": 0.3}
    assert versions.change(error, {**error, "value": 0.2}) == (pytest.approx(0.5), None, None, False)
    assert versions.change(error, {**error, "value": 0.0})[0] == 0.3, "no share of nothing"


@pytest.mark.parametrize("quality", ["perplexity/wiki", "accuracy/boolq"])
def test_the_front_is_what_no_other_version_beats(quality: str) -> None:
    draw = np.random.default_rng(1)
    for size in (0, 1, 2, 30):
        table = pd.DataFrame({quality: draw.integers(0, 6, size).astype(float), "seconds/prune": draw.integers(0, 6, size).astype(float)})
        if size == 30:
            table.loc[3, quality] = table.loc[4, "seconds/prune"] = float("nan")
        found = versions.front(table, quality, "seconds/prune")
        assert found.tolist() == reference.front(table, quality, "seconds/prune", higher=quality.startswith("accuracy"))


def test_directions() -> None:
    assert versions.direction("perplexity", "wiki") == "lower" and versions.direction("accuracy", "boolq") == "higher"
    assert versions.direction("speed", "decode_tokens_per_second/8") == "higher" and versions.direction("speed", "first_token_seconds/1") == "lower"
    assert versions.direction("sparsity") == ""


def test_hardware_is_the_gpu_or_the_processor_and_its_threads() -> None:
    where = {"gpu": None, "processor": "X", "system": "Linux", "cores": 2, "threads": 1}
    assert versions.hardware(where) == "X, 2 cores, 1 threads" and versions.hardware({**where, "gpu": "A100"}) == "A100"
    assert versions.hardware({**where, "processor": ""}) == "Linux, 2 cores, 1 threads"


def test_the_commit_of_these_sources_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    versions.commit.cache_clear()
    found = versions.commit()
    assert found is None or set(found.rstrip("+")) <= set("0123456789abcdef")
    versions.commit.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert versions.commit() is None
    versions.commit.cache_clear()

"""A run as rows of the history, and how two versions compare."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import reference
from scipy import stats

from reconkit import history, runs, versions
from reconkit.config import PruneConfig, RunConfig

TINY: dict[str, Any] = {
    "model": "tiny", "corpus": "pydocs", "count": 8, "length": 32, "held_out": ("pydocs",), "held_out_count": 2, "test": ("pydocs",), "test_count": 4,
}  # fmt: skip


def run(**how: Any) -> runs.Run:
    return runs.run(RunConfig(**TINY, prune=PruneConfig(criterion="wanda", technique="LR", **how)))


def test_rows_are_the_runs_metrics_and_its_error_ratios() -> None:
    found = run()
    rows = {versions.name_of(row["metric"], row["test_set"]): row for row in versions.measurements(found)}
    plain = {name: value for name, value in found.metrics.items() if not name.endswith(versions.ENDS)}
    assert {name: row["value"] for name, row in rows.items() if "error ratio" not in name} == plain
    for ratio, error in (("error ratio", "nmse"), ("token error ratio", "token_nmse")):
        assert rows[f"{ratio}/pydocs"]["value"] == plain[f"{error}/pydocs"] / plain[f"{error}/calibration"] and f"{ratio}/calibration" not in rows
        assert rows[f"{ratio}/pydocs"]["unit"] == "ratio"
    for name in ("nmse", "mse", "token_nmse", "token_nmse_90", "error ratio", "token error ratio"):
        assert rows[f"{name}/pydocs"]["direction"] == "lower"
    row, [told] = rows["perplexity/pydocs"], found.record["evaluation"]["perplexity"]
    assert json.loads(row["items"]) == {"nll": told["nll"], "article": told["articles"]} and row["n"] == len(set(told["articles"]))
    assert row["sample"] == told["samples"] and row["direction"] == "lower" and (row["low"], row["high"]) == (told["low"], told["high"])
    assert row["stderr"] == pytest.approx(row["value"] * reference.clustered_error(told["nll"], told["articles"]))
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
    found = versions.change(perplexity(a), perplexity(b))
    ends = np.exp(stats.ttest_rel(a, b).confidence_interval()) - 1
    assert found.paired and found.n == 20
    assert found[:3] == pytest.approx((np.exp(np.mean(a)) / np.exp(np.mean(b)) - 1, *ends))
    right, other = ([int(x) for x in draw.random(25) < p] for p in (0.7, 0.5))
    found = versions.change(accuracy(right), accuracy(other))
    assert found.paired and found[:3] == pytest.approx((np.mean(right) - np.mean(other), *stats.ttest_rel(right, other).confidence_interval()))
    assert versions.change(accuracy(right), accuracy(right)) == (0.0, 0.0, 0.0, True, 25)
    right, other = right * 8, other * 8
    assert versions.change(accuracy(right), accuracy(other))[:3] == pytest.approx(reference.paired_difference(right, other), abs=0.01)


def test_perplexities_pair_over_articles_and_rows_of_old_records_over_windows() -> None:
    a, b, article = [3.0, 3.1, 3.3, 2.9, 3.0], [2.9, 2.9, 3.2, 2.9, 2.8], [4, 4, 4, 5, 9]
    rows = [{**perplexity(nll), "items": json.dumps({"nll": nll, "article": article})} for nll in (a, b)]
    difference = np.subtract(a, b)
    half = stats.t.ppf(0.975, 2) * reference.clustered_error(difference, article)
    expected = (*(np.exp([difference.mean(), difference.mean() - half, difference.mean() + half]) - 1), True, 3)
    assert versions.change(*rows) == pytest.approx(expected)
    assert versions.change(rows[0], perplexity(b)) == versions.change(perplexity(a), rows[1]) == pytest.approx(expected), "one of them is older"
    assert versions.change(perplexity(a), perplexity(b)).n == 5
    one = [{**row, "items": json.dumps({"nll": nll, "article": [3] * 5})} for row, nll in zip(rows, (a, b), strict=True)]
    assert versions.change(*one)[1:] == (-1, np.inf, True, 1), "one article has no bounds"


@pytest.mark.parametrize("name", ["article", "sample"], ids=["new", "old"])
def test_cloze_pairs_are_clustered_by_text(name: str) -> None:
    a = {"right": [1, 1, 0, 1, 0, 0, 1, 1], name: [0, 0, 0, 1, 1, 2, 2, 3]}
    b = {"right": [1, 0, 0, 0, 0, 1, 1, 0], name: [0, 0, 0, 1, 1, 2, 2, 3]}
    rows = [{"metric": "accuracy", "test_set": "cloze", "value": np.mean(x["right"]), "sample": "s", "items": json.dumps(x)} for x in (a, b)]
    half = stats.t.ppf(0.975, 3) * reference.clustered_error(np.subtract(a["right"], b["right"]), a[name])
    assert versions.change(*rows) == pytest.approx((2 / 8, 2 / 8 - half, 2 / 8 + half, True, 4))


def test_other_items_are_compared_by_welch_and_plain_figures_not_at_all() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(3.2, 0.3, 6), draw.normal(3.0, 0.5, 9)
    rows = [{**perplexity(list(nll), sample, float(np.exp(nll.mean()) * stats.sem(nll))), "n": len(nll)} for nll, sample in ((a, "s"), (b, "t"))]
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    expected = np.exp([a.mean() - b.mean(), low, high]) - 1
    assert versions.change(*rows) == pytest.approx((*expected, False, 6))
    right, other = [int(x) for x in draw.random(20) < 0.7], [int(x) for x in draw.random(30) < 0.5]
    rows = [{**accuracy(given, sample), "n": len(given)} for given, sample in ((right, "s"), (other, "t"))]
    low, high = stats.ttest_ind(right, other, equal_var=False).confidence_interval()
    assert versions.change(*rows) == pytest.approx((np.mean(right) - np.mean(other), low, high, False, 20))
    single = {**rows[0], "stderr": None, "n": 1}
    assert versions.change(single, rows[1])[1:] == (-np.inf, np.inf, False, 1) and versions.change({**single, "n": 2}, rows[1]).low is None
    error = {"metric": "nmse", "test_set": "calibration", "value": 0.3}
    assert versions.change(error, {**error, "value": 0.2}) == (pytest.approx(0.5), None, None, False, None)
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

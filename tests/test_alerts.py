"""Rules over the history: what fires, what does not, what is refused."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import reference
from scipy import stats

from reconkit import alerts, statistics, versions
from reconkit.alerts import Rule, check, compare
from reconkit.config import ConfigError
from reconkit.history import Store

RULES = Path(__file__).parent.parent / "papermill_runs" / "alerts.toml"
FACTS = {"parent": None, "model": "tiny", "hardware": "CPU, 2 cores", "verdict": "fine", "technique": "BR", "sparsity": 0.5}
DENSE = {"technique": "dense", "verdict": None, "sparsity": 0.0}
DIRECTIONS = {"accuracy": "higher", "sparsity": ""}
MEASURED = ("value", "low", "high", "stderr", "n", "sample", "items")
SAME = [2.0, 2.5, 3.0, 3.5, 2.2, 2.7, 3.1, 2.9]
Frames = tuple[pd.DataFrame, pd.DataFrame]


def measured(name: str, value: Any) -> dict[str, Any]:
    """A row of `measurements`: of a number, of the items that a list holds, or of the columns that a mapping gives."""
    metric, _, test_set = name.partition("/")
    row: dict[str, Any] = {"metric": metric, "test_set": test_set, **dict.fromkeys(MEASURED), "direction": DIRECTIONS.get(metric, "lower")}
    if isinstance(value, list):
        mean = float(np.mean(value))
        about = {"n": len(value), "sample": f"{test_set}-{len(value)}", "items": json.dumps(value)}
        return {**row, **about, "value": math.exp(mean) if metric == "perplexity" else mean, "stderr": float(np.std(value) / len(value) ** 0.5)}
    return {**row, **(value if isinstance(value, dict) else {"value": value})}


def history(*versions: dict[str, Any]) -> Frames:
    """Frames as a store gives them; each version's facts are words, its measurements names with a slash (or `sparsity_`)."""
    facts, rows = [], []
    for number, version in enumerate(versions, 1):
        told = {k: v for k, v in version.items() if "/" not in k}
        id = told.get("version", f"v{number}")
        tag = told.get("tag")
        facts.append({"number": number, "version": id, "tag": tag, "name": tag or id, **FACTS, **told})
        rows += [{"number": number, "version": id, **measured(k, v)} for k, v in version.items() if "/" in k]
    columns = ["number", "version", "metric", "test_set", *MEASURED, "direction"]
    return pd.DataFrame(facts), pd.DataFrame(rows, columns=columns)


def judged(frames: Frames, rules: Rule | list[Rule], version: Any = None) -> tuple[list[str], list[str], list[str]]:
    """Names of what fired, what passed, and why the rest was skipped."""
    found = check(frames, version, rules if isinstance(rules, list) else [rules])
    return [f"{r['metric']}/{r['test_set']}".rstrip("/") for r in found.fired], [p.measurement for p in found.passed], [s.why for s in found.skipped]


def rule(metric: str, **more: Any) -> Rule:
    return Rule("r", metric, **more)


WORSE = [x + 0.1 + 0.01 * (i % 3) for i, x in enumerate(SAME)]
RIGHT = [1.0] * 80 + [0.0] * 20
FEWER = [1.0] * 60 + [0.0] * 40


@pytest.mark.parametrize(
    ("planted", "fires"),
    [
        ({}, []),
        ({"perplexity/wiki": WORSE}, ["perplexity rose", "perplexity behind the best"]),
        ({"accuracy/boolq": FEWER}, ["accuracy fell", "accuracy far from dense"]),
        ({"nmse/calibration": 0.12}, ["reconstruction error rose"]),
        ({"error ratio/news": 2.0}, ["error ratio grew"]),
        ({"verdict": "overfitting"}, ["overfitting", "overfitting is near"]),
        ({"verdict": "watch"}, ["overfitting is near"]),
        ({"sparsity/": 0.4}, ["less sparse"]),
        ({"seconds/prune": 160.0}, ["pruning takes longer"]),
        ({"memory/rss": 1.3e9}, ["pruning takes more memory"]),
        ({"speed/decode_tokens_per_second/1": 70.0}, ["slower generation"]),
        ({"speed/first_token_seconds/8": 0.2}, ["slower first token"]),
        ({"size/bytes": 1.02e6}, ["more bytes"]),
        ({"money/prune": 1.6}, ["pruning costs more"]),
    ],
    ids=lambda value: ", ".join(value) or "nothing" if isinstance(value, dict) else None,
)
def test_each_planted_regression_fires_its_rules_and_no_other(planted: dict[str, Any], fires: list[str]) -> None:
    good = {
        "perplexity/wiki": SAME,
        "perplexity/news": SAME,
        "accuracy/boolq": RIGHT,
        "nmse/calibration": 0.1,
        "nmse/news": 0.15,
        "error ratio/news": 1.5,
        "sparsity/": 0.5,
        "seconds/prune": 100.0,
        "memory/rss": 1e9,
        "speed/decode_tokens_per_second/1": {"value": 100.0, "direction": "higher"},
        "speed/first_token_seconds/8": 0.1,
        "size/bytes": 1e6,
        "money/prune": 1.0,
    }
    if "speed/decode_tokens_per_second/1" in planted:
        planted = {"speed/decode_tokens_per_second/1": {"value": 70.0, "direction": "higher"}}
    dense = {**DENSE, "perplexity/wiki": [x - 0.2 for x in SAME], "accuracy/boolq": RIGHT}
    frames = history(dense, {**good, "parent": "v1"}, {**good, "parent": "v2", **planted})
    found = check(frames, None, alerts.load_rules(RULES, frames[1]))
    assert [row["rule"] for row in found.fired] == fires
    assert found.failed == any(row["severity"] == "error" for row in found.fired)
    assert len({row["rule"] for row in found.fired} | {p.rule for p in found.passed}) == 16  # every rule of the file was answered


def test_an_improvement_fires_nothing() -> None:
    before = {"perplexity/wiki": WORSE, "accuracy/a": FEWER, "nmse/x": 0.2}
    frames = history(before, {"parent": "v1", "perplexity/wiki": SAME, "accuracy/a": RIGHT, "nmse/x": 0.1})
    rules = [rule(m, against="parent", absolute=0) for m in ("perplexity", "accuracy", "nmse")]
    assert judged(frames, rules) == ([], ["perplexity/wiki", "accuracy/a", "nmse/x"], [])


def test_what_a_paired_alert_says() -> None:
    frames = history({"perplexity/wiki": SAME, "tag": "good"}, {"parent": "v1", "perplexity/wiki": WORSE})
    row = check(frames, None, [rule("perplexity", against="parent", relative=0.02)]).fired[0]
    ratio = math.exp(np.mean(np.subtract(WORSE, SAME)))
    low, high = np.exp(stats.ttest_rel(WORSE, SAME).confidence_interval())
    assert (row["change"], row["low"], row["high"]) == pytest.approx((ratio - 1, low - 1, high - 1))
    assert (row["number"], row["version"], row["reference"], row["against"], row["limit"]) == (2, "v2", "v1", "parent", 0.02)
    assert row["value"] == pytest.approx(math.exp(np.mean(WORSE))) and row["reference_value"] == pytest.approx(math.exp(np.mean(SAME)))
    assert row["message"] == (
        f"perplexity/wiki is {row['value']:.4g}, {ratio - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%}, n = 8) against the parent good "
        f"({row['reference_value']:.4g}); allowed is +2.0%."
    )


def test_exactly_what_is_allowed_does_not_fire() -> None:
    frames = history({"nmse/a": 0.48, "accuracy/a": 0.5}, {"parent": "v1", "nmse/a": 0.5, "accuracy/a": 0.48})
    rules = [rule(m, against="parent", absolute=0.02) for m in ("nmse", "accuracy")]  # 0.5 - 0.48 > 0.02 in floats
    assert judged(frames, rules)[0] == []
    assert judged(frames, [replace(r, absolute=0.0199) for r in rules])[0] == ["nmse/a", "accuracy/a"]


def test_compare_is_paired_on_the_same_items_only() -> None:
    own, other = measured("accuracy/a", FEWER), measured("accuracy/a", RIGHT)
    paired = statistics.difference(FEWER, RIGHT)
    assert compare(own, other) == pytest.approx((-0.2, paired.low, paired.high, True, 100))
    assert compare(own, other, relative=True) == pytest.approx((-0.25, paired.low / 0.8, paired.high / 0.8, True, 100))
    half = stats.t.ppf(0.975, 190) * math.hypot(own["stderr"], other["stderr"])
    assert compare({**own, "sample": "others"}, other)[:3] == pytest.approx((-0.2, -0.2 - half, -0.2 + half), rel=1e-3)
    deterministic = compare(measured("nmse/a", 0.3), measured("nmse/a", 0.2))
    assert deterministic[0] == pytest.approx(0.1) and math.isnan(deterministic[1]) and math.isnan(deterministic[2])


def test_cloze_items_of_one_text_belong_together() -> None:
    first, second, cluster = [1, 1, 0, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 1, 0, 1], [0, 0, 0, 1, 1, 1, 2, 2]
    rows = [{**measured("accuracy/cloze", x), "items": json.dumps({"right": x, "sample": cluster})} for x in (first, second)]
    half = stats.t.ppf(0.975, 2) * reference.clustered_error(np.subtract(first, second), cluster)
    assert compare(*rows) == pytest.approx((0.25, 0.25 - half, 0.25 + half, True, 3))


def test_an_alert_of_the_error_ratio_tells_that_of_the_token_nmse() -> None:
    frames = history(
        {"error ratio/a": 1.0, "token error ratio/a": 1.1},
        {"error ratio/a": 3.0, "token error ratio/a": 1.25, "error ratio/b": 3.0, "token error ratio/c": 9.0, "nmse/a": 9.0},
    )
    messages = {
        row["metric"] + row["test_set"]: row["message"] for row in check(frames, 2, [rule("error ratio", limit=2), rule("nmse", limit=2)]).fired
    }
    assert messages["error ratioa"] == "error ratio/a is 3; the worst that is allowed is 2. By token NMSE the ratio is 1.25."
    assert messages["error ratiob"].endswith("allowed is 2.") and messages["nmsea"].endswith("allowed is 2.")
    assert judged(frames, rule("token error ratio", limit=2), 2)[0] == ["token error ratio/c"]


def test_a_single_item_says_nothing() -> None:
    one = history({"perplexity/a": [2.0], "accuracy/a": [1.0]}, {"parent": "v1", "perplexity/a": [3.0], "accuracy/a": [0.0]})
    rules = [rule("perplexity", against="parent", relative=0), rule("accuracy", against="parent", absolute=0)]
    assert judged(one, rules) == ([], ["perplexity/a", "accuracy/a"], [])


@pytest.mark.parametrize("paired", [True, False], ids=["the same items", "other items"])
@pytest.mark.parametrize("metric", ["perplexity", "accuracy"])
def test_noise_does_not_fire(metric: str, paired: bool) -> None:
    """Of equal models, one in forty looks worse beyond its 95 % interval, and none is allowed to be worse at all here."""
    random, fired = np.random.default_rng(0), 0
    asked = Rule("r", metric, against="parent", absolute=0)
    for _ in range(200):
        if metric == "perplexity":
            text = random.normal(3, 0.5, 40)
            drawn = [(text + random.normal(0, 0.1, 40)).tolist() for _ in range(2)]
        else:
            drawn = random.integers(0, 2, (2, 100)).astype(float).tolist()
        rows = [measured(f"{metric}/a", items) for items in drawn]
        if not paired:
            for row in rows:
                scale = row["value"] if metric == "perplexity" else 1
                row |= {"stderr": row["stderr"] * scale, "items": None, "sample": None}
        fired += len(check(history({f"{metric}/a": rows[0]}, {"parent": "v1", f"{metric}/a": rows[1]}), None, [asked]).fired)
    assert fired <= 12  # expected 5 of 200


def test_a_change_within_its_noise_is_told() -> None:
    frames = history({"perplexity/a": [2.0, 4.0, 3.0, 2.5]}, {"parent": "v1", "perplexity/a": [2.9, 3.6, 2.8, 3.2]})
    found = check(frames, None, [rule("perplexity", against="parent", relative=0.02)])
    assert not found.fired and "within its noise" in found.passed[0].why and "within its noise" in alerts.describe(found)


@pytest.mark.parametrize(
    ("value", "limit", "fires"),
    [
        (0.5, 0.4, False),
        (0.39, 0.4, True),
        ({"value": 0.39, "low": 0.3, "high": 0.48, "stderr": 0.046}, 0.4, False),
        ({"value": 0.3, "stderr": 0.046}, 0.4, True),
        ({"value": 0.3, "stderr": 0.046, "n": 4}, 0.4, False),
    ],
)
def test_a_limit_judges_the_value_itself(value: Any, limit: float, fires: bool) -> None:
    found = check(history({"accuracy/a": value}), None, [rule("accuracy", limit=limit)]).fired
    assert bool(found) == fires
    if fires and isinstance(value, dict):  # the change is from the limit, and so is its interval
        assert [found[0][k] for k in ("change", "low", "high")] == pytest.approx([-0.1, -0.1 - 1.959964 * 0.046, -0.1 + 1.959964 * 0.046])


def test_verdicts_are_measurements() -> None:
    frames = history({"verdict": "watch"}, {"verdict": "overfitting", "parent": "v1"}, {**DENSE})
    above, parent = rule("verdict", limit="watch"), rule("verdict", against="parent", absolute=0)
    assert [judged(frames, above, n)[0] for n in (1, 2)] == [[], ["verdict"]]
    assert [judged(frames, parent, n)[0] for n in (1, 2)] == [[], ["verdict"]]
    assert "overfitting, +1 against the parent v1 (watch)" in check(frames, 2, [parent]).fired[0]["message"]
    assert judged(frames, above, 3) == ([], [], ["not measured for this version"])


@pytest.mark.parametrize("metric", versions.HARDWARE)
def test_what_the_hardware_decides_compares_on_the_same_only(metric: str) -> None:
    name = f"{metric}/x"
    slow, gpu = {name: 9.0, "parent": "v1"}, {"hardware": "GPU"}
    frames = history({name: 1.0}, slow, {**slow, **gpu}, {**DENSE, name: 1.0, **gpu})
    asked = [rule(metric, against=other, relative=0.1, direction="lower") for other in ("parent", "best", "dense")]
    fired, _, skipped = judged(frames, asked, 2)
    assert fired == [name, name] and len(skipped) == 1 and "the same hardware (CPU, 2 cores)" in skipped[0]
    fired, _, skipped = judged(frames, asked, 3)
    assert fired == [name] and len(skipped) == 2 and all("the same hardware (GPU)" in why for why in skipped)
    others = history({"nmse/x": 1.0}, {"nmse/x": 2.0, "parent": "v1", "hardware": "GPU"})
    assert judged(others, rule("nmse", against="parent", relative=0.1))[0] == ["nmse/x"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_not_a_number_fires_and_is_no_reference(bad: float | None) -> None:
    frames = history({"nmse/x": 0.1}, {"nmse/x": bad, "parent": "v1"}, {"nmse/x": 0.1, "parent": "v2"})
    rules = [rule("nmse", against="parent", relative=0.1), rule("nmse", limit=1), rule("nmse", against="best", absolute=0)]
    found = check(frames, 2, rules)
    assert [row["message"] for row in found.fired] == ["nmse/x is not a number."] * 3
    fired, passed, skipped = judged(frames, rules, 3)
    assert (fired, passed, skipped) == ([], ["nmse/x", "nmse/x"], ["the history does not hold nmse/x of the parent v2"])


def test_what_each_reference_is() -> None:
    def found(against: str, version: int = 6) -> str | None:
        fired = check(frames, version, [rule("nmse", against=against, absolute=0)]).fired
        return fired[0]["reference"] if fired else None

    frames = history(
        {**DENSE, "nmse/x": 0.01},
        {"nmse/x": 0.03, "tag": "first"},
        {"nmse/x": 0.01, "sparsity": 0.2},  # less was pruned: no fair reference
        {"nmse/x": 0.02, "sparsity": 0.6},
        {"nmse/x": 0.01, "model": "other"},
        {"nmse/x": 0.5, "parent": "v2", "version": "abcdef"},
        {"nmse/x": 0.001},  # later than what is checked
        {**DENSE, "nmse/x": 0.02},
    )
    assert [found(a) for a in ("parent", "dense", "best", "first", "v4", "v7")] == ["v2", "v8", "v4", "v2", "v4", "v7"]
    assert found("dense", 8) == "v1" and found("best", 2) is None
    assert judged(frames, rule("nmse", against="v5", absolute=0), 6)[2] == ["the history does not hold v5 of the same model (tiny)"]
    assert judged(frames, rule("nmse", against="abc", absolute=0), 6)[2] == ["abc is this version itself"]
    assert judged(frames, rule("nmse", against="parent", absolute=0), 7)[2] == ["this version has no parent"]
    none = "the history does not hold an earlier pruned version that is at least as sparse"
    assert judged(frames, rule("nmse", against="best", absolute=0), 2)[2] == [none]
    assert judged(frames, rule("nmse", against="dense", absolute=0), 1)[2] == ["the history does not hold an earlier dense version"]
    assert judged(frames, rule("nmse", against="dense", absolute=0), 5)[2] == ["the history does not hold a dense version of the same model (other)"]


def test_references_answered_the_same_items_where_they_can() -> None:
    frames = history({**DENSE, "perplexity/a": SAME}, {**DENSE, "perplexity/a": SAME[:5]}, {"perplexity/a": WORSE}, {"perplexity/a": WORSE[:5]})
    by_dense, by_best = rule("perplexity", against="dense", relative=0), rule("perplexity", against="best", absolute=0)
    assert check(frames, 3, [by_dense]).fired[0]["reference"] == "v1"
    assert judged(frames, by_best, 4)[2][0].endswith("at least as sparse with the same items of perplexity/a")
    rows = [{"value": v, "stderr": 0.1, "n": 9, "sample": s} for v, s in ((20.0, "a"), (25.0, "b"), (25.0, "c"))]
    other = history({**DENSE, "perplexity/a": rows[0]}, {"perplexity/a": rows[1]}, {"perplexity/a": {**rows[2], "stderr": None}})
    alert = check(other, 2, [by_dense]).fired[0]
    assert alert["message"].endswith("They answered different items.")
    errors = 0.1 / 25, 0.1 / 20
    half = stats.t.ppf(0.975, 8 * (errors[0] ** 2 + errors[1] ** 2) ** 2 / (errors[0] ** 4 + errors[1] ** 4)) * math.hypot(*errors)
    assert alert["low"] == pytest.approx(25 / 20 * math.exp(-half) - 1)


def test_a_version_that_was_measured_twice_counts_as_last_measured() -> None:
    frames = history({"version": "a", "nmse/x": 0.1}, {"version": "a", "nmse/x": 0.2}, {"parent": "a", "nmse/x": 0.2})
    assert judged(frames, rule("nmse", against="parent", absolute=0)) == ([], ["nmse/x"], [])
    assert check(frames, "a", [rule("nmse", limit=0.15)]).number == 2


def test_what_is_not_compared_is_said() -> None:
    frames = history({"nmse/x": 0.0, "accuracy/boolq": 0.5}, {"nmse/x": 0.1, "parent": "v1"})
    assert judged(frames, rule("nmse", against="parent", relative=0.1))[2] == ["the parent v1 has 0 there, from which no relative change is defined"]
    others = rule("nmse", limit=1, technique="LR", model="tiny")
    found = check(frames, None, [rule("accuracy", limit=0.1), others, rule("speed", limit=1, direction="lower")])
    assert [s[1:] for s in found.skipped] == [
        ("accuracy/boolq", "not measured for this version"),
        ("nmse", "the rule is for technique LR"),
        ("speed", "not measured for this version"),
    ]
    assert not found.fired and not found.passed and not found.failed
    assert "not measured" in alerts.describe(found) and "0 errors, 0 warnings; 0 passed, 3 skipped" in alerts.describe(found)


def test_test_sets_by_pattern() -> None:
    frames = history({"nmse/wiki": 0.1, "nmse/wikitext2": 0.1, "nmse/news": 0.1})
    for pattern, names in (("wiki", ["nmse/wiki"]), ("wiki*", ["nmse/wiki", "nmse/wikitext2"]), ("*", ["nmse/wiki", "nmse/wikitext2", "nmse/news"])):
        assert judged(frames, rule("nmse", limit=0.05, test_set=pattern))[0] == names


def test_a_version_that_nobody_knows() -> None:
    frames = history({"tag": "good", "nmse/x": 1.0, "version": "abc1"}, {"version": "abc2"})
    with pytest.raises(ConfigError, match="rule 'r': against is 'godo'; .* best, a tag or an id: the last versions are abc2, good"):
        check(frames, None, [rule("nmse", against="godo", absolute=0)])
    for name in ("nobody", "", 3, "abc"):
        with pytest.raises(ConfigError, match="version is .* the last versions are abc2, good"):
            check(frames, name)
    assert check(frames, "good").number == 1 and check(frames).number == 2
    with pytest.raises(ConfigError, match="No version is recorded yet"):
        check((frames[0][:0], frames[1][:0]))


def fired() -> alerts.Report:
    frames = history({"nmse/x": 0.1, "tag": "v:1"}, {"nmse/x": 0.3, "error ratio/x": math.nan, "parent": "v1"})
    rules = [Rule("a: 10 %, or more", "error ratio", limit=2, severity="warning"), Rule("b", "nmse", against="parent", relative=0.1)]
    return check(frames, None, rules)


def test_errors_come_first_and_are_annotated() -> None:
    assert alerts.describe(fired()).splitlines() == [
        "Version v2 (number 2): 1 error, 1 warning; 0 passed, 0 skipped.",
        "error    b: nmse/x is 0.3, +200.0% against the parent v:1 (0.1); allowed is +10.0%.",
        "warning  a: 10 %, or more: error ratio/x is not a number.",
    ]
    assert alerts.annotations(fired()).splitlines() == [
        "::error title=reconkit%3A b::v2: nmse/x is 0.3, +200.0%25 against the parent v:1 (0.1); allowed is +10.0%25.",
        "::warning title=reconkit%3A a%3A 10 %25%2C or more::v2: error ratio/x is not a number.",
    ]


def test_text_of_runs_cannot_write_lines_of_its_own() -> None:
    frames = history({"nmse/a\n::error::mine\x1b[2J": 0.5})
    report = check(frames, None, [rule("nmse", limit=0.1)])
    assert alerts.describe(report).count("\n") == 1 and "\x1b" not in alerts.describe(report)
    assert alerts.annotations(report).count("\n") == 0
    skipped = check(frames, None, [rule("nmse", against="parent", absolute=0)])
    assert alerts.describe(skipped).count("\n") == 1 and "skipped  r: nmse/a?::error" in alerts.describe(skipped)


def test_alerts_are_kept_once(tmp_path: Path) -> None:
    with Store(tmp_path / "history.sqlite") as store:
        for number, value in ((1, 0.1), (2, 0.5)):
            facts = {**FACTS, "version": f"v{number}", "created": f"2026-01-0{number}T00:00:00Z", "parent": "v1" if number == 2 else None}
            store.append(facts, [measured("nmse/x", value), measured("nmse/y", value)])
        rules = [rule("nmse", against="parent", relative=0.1)]
        first = store.add_alerts(check(store, None, rules).fired)
        assert [(row["test_set"], row["change"]) for row in first] == [("x", pytest.approx(4)), ("y", pytest.approx(4))]
        assert store.add_alerts(check(store, None, rules).fired) == []
        kept = store.alerts()
        assert list(kept.test_set) == ["x", "y"] and list(kept.reference) == ["v1", "v1"] and list(kept.rule) == ["r", "r"]
        assert kept.message[0] == first[0]["message"] and kept.created[0] == first[0]["created"]


def test_alerts_are_sent_on_as_lines(tmp_path: Path) -> None:
    out = tmp_path / "got it.jsonl"
    code = f"import sys, pathlib; pathlib.Path({str(out)!r}).write_text(sys.stdin.read())"
    alerts.send(alerts.command(f"{sys.executable} -c {shlex.quote(code)}"), fired().fired)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["rule"] for row in rows] == ["b", "a: 10 %, or more"]
    assert rows[0]["value"] == 0.3 and rows[1]["value"] is None and rows[1]["reference"] is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([sys.executable, "-c", "raise SystemExit(3)"], "ended with status 3"),
        (["no-such-command"], "cannot be started"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], "took more than 1 seconds"),
    ],
    ids=["fails", "is not there", "hangs"],
)
def test_a_command_that_fails_is_named(words: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "TIMEOUT", 1)
    with pytest.raises(RuntimeError, match=f"not sent on: {words[0]} {says}.*kept in the history"):
        alerts.send(words, fired().fired)


@pytest.mark.parametrize("text", ["", "  ", "sh -c 'x"])
def test_a_command_must_have_words(text: str) -> None:
    with pytest.raises(ConfigError, match="--send is .* a command, its quotes closed"):
        alerts.command(text)


def test_a_long_history_is_checked_in_a_moment(tmp_path: Path) -> None:
    """1,000 versions of 50 metrics, items kept for ten; 40 rules against three references, one regression planted."""
    random = np.random.default_rng(0)
    nll = random.normal(3, 0.3, 32).tolist()
    with Store(tmp_path / "history.sqlite") as store:
        for number in range(1, 1001):
            worse = 0.2 if number == 1000 else 0.0
            rows = [measured(f"perplexity/t{i}", [round(x + (worse if i == 3 else 0), 4) for x in nll]) for i in range(10)]
            rows += [measured(f"nmse/t{i}", 0.1) for i in range(40)]
            facts = {**FACTS, "version": f"v{number}", "created": f"2026-01-01T{number:06}", "parent": f"v{number - 1}" if number > 1 else None}
            if number == 1:
                facts |= DENSE
            store.append(facts, rows)
        rules = [Rule(f"{m} {a}", m, against=a, relative=0.05) for m in ("perplexity", "nmse") for a in ("parent", "dense", "best", "v500")]
        start = time.perf_counter()
        report = check(store, None, rules)
        seconds = time.perf_counter() - start
    assert [(row["rule"], row["test_set"]) for row in report.fired] == [(f"perplexity {a}", "t3") for a in ("parent", "dense", "best", "v500")]
    assert len(report.passed) == 4 * 50 - 4 and not report.skipped
    assert seconds < 2

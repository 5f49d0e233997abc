"""Rules over the history of versions: what got worse, beyond what is allowed and beyond its noise.

A rule judges a measurement of one version, once for each test set that it names:

- with `limit`, the value itself: it fires when the value is worse than the limit and its 95 % interval excludes the limit;
- with `against` and `relative` or `absolute`, the change from a reference: it fires when the change is worse than what is allowed
  and the 95 % interval of the change excludes no change. Where there is no interval (errors, sizes, times), the change decides.

The interval is that of `versions.change`: paired where both answered the same items, else Welch's from both standard errors. An
absolute change of perplexity is the ratio's, times the reference's value; a relative change of an accuracy is the difference over the
reference's value. A rule over many test sets asks many questions: allow some change, as one in forty fires by chance at 0.
The interval is about these two versions on such test text: another calibration draw of the same technique may move more.

References, always of the same model:

- parent: the version that it follows;
- dense: the latest dense version; for a dense version an earlier one;
- best: the best earlier pruned version that is at least as sparse and answered the same items (where these are known);
- a tag or an id.

A version that was measured more than once counts as last measured. The dense model and named versions that answered other items are
compared by Welch's interval, and the alert says so. Times, memory, speed, energy and money compare only on the same class of hardware.

A measurement of the checked version that is not a number fires. What cannot be compared (no parent, other hardware, not measured)
is listed as skipped, with the reason.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from . import statistics
from .config import ConfigError, require
from .history import called
from .rules import REFERENCES, SEVERITIES, VERDICTS, Rule, better, matches
from .rules import load_rules as load_rules
from .versions import HARDWARE, SHARES, Change, name_of
from .versions import change as changed

if TYPE_CHECKING:
    from .history import Store

SPARSER = 0.005  # sparsities closer than this are one: masks round to whole weights
TIMEOUT = 30  # seconds for the command that alerts are sent to


class Outcome(NamedTuple):
    """A rule that did not fire on a test set, and why."""

    rule: str
    measurement: str
    why: str


@dataclass(frozen=True)
class Report:
    """What the rules say about one version."""

    number: int
    name: str
    fired: list[dict[str, Any]]
    "Rows for `Store.add_alerts`; errors first."
    passed: list[Outcome]
    "`why` is empty, or says that a change is within its noise."
    skipped: list[Outcome]

    @property
    def failed(self) -> bool:
        """Whether an error fired."""
        return any(row["severity"] == "error" for row in self.fired)


def check(history: Store | tuple[pd.DataFrame, pd.DataFrame], version: str | int | None = None, rules: Sequence[Rule] = ()) -> Report:
    """What the rules say about a version; nothing is written.

    Args:
        history: a store, or its versions and measurements.
        version: a tag, an id or the beginning of one, or a number; None: the newest.

    Raises:
        ConfigError: no version is recorded or called so, or a rule is against a version that nobody knows.
    """
    versions, measurements = history if isinstance(history, tuple) else (history.versions(), history.measurements())
    versions = versions.set_index("number", drop=False).rename_axis(None)
    if versions.empty:
        raise ConfigError("No version is recorded yet, so there is nothing to check.")
    for rule in rules:
        if rule.against not in (None, *REFERENCES):
            _find(versions, rule.against, f"{rule.where}: against", f"{', '.join(REFERENCES)}, a tag or an id: ")
    own = versions.iloc[-1] if version is None else _find(versions, version, "version", "a tag, an id or a number: ")
    asked = measurements[measurements.metric.isin({rule.metric for rule in rules})]
    groups = dict(list(asked.groupby(["metric", "test_set"], sort=False))) | {("verdict", ""): _verdicts(versions)}
    fired: list[dict[str, Any]] = []
    passed: list[Outcome] = []
    skipped: list[Outcome] = []
    for rule in rules:
        other = [f"{word} {getattr(rule, word)}" for word in ("model", "technique", "hardware") if not matches(own[word], getattr(rule, word))]
        if other:
            skipped.append(Outcome(rule.name, rule.metric, f"the rule is for {', '.join(other)}"))
            continue
        missing = []
        sets = {name: group for (metric, name), group in groups.items() if metric == rule.metric and matches(name, rule.test_set)}
        candidates = (versions[:0], "") if rule.against is None else _candidates(rule, own, versions)
        for test_set, group in sets.items():
            places = np.flatnonzero(group.number == own.number)
            if not len(places):
                missing.append(test_set)
                continue
            result = _judge(rule, own, group.iloc[places[-1]], group, *candidates)
            if isinstance(result, dict):
                fired.append({**result, "message": _line(result["message"] + _by_tokens(measurements, rule.metric, test_set, own.number))})
            else:
                done, why = result
                (passed if done else skipped).append(Outcome(rule.name, name_of(rule.metric, test_set), why))
        if missing or not sets:
            names = ", ".join(name_of(rule.metric, name) for name in missing) or name_of(rule.metric, "" if rule.test_set == "*" else rule.test_set)
            skipped.append(Outcome(rule.name, names, "not measured for this version"))
    fired.sort(key=lambda row: SEVERITIES.index(row["severity"]))
    return Report(int(own.number), str(own["name"]), fired, passed, skipped)


def _by_tokens(measurements: pd.DataFrame, metric: str, test_set: str, number: int) -> str:
    """What an alert of the error ratio adds: the same ratio of the token NMSE, on which a few massive activations have no weight."""
    place = (measurements.number == number) & (measurements.metric == f"token {metric}") & (measurements.test_set == test_set)
    known = measurements.value[place].dropna() if metric == "error ratio" else ()
    return f" By token NMSE the ratio is {float(known.iloc[-1]):.4g}." if len(known) else ""


def _find(versions: pd.DataFrame, name: Any, field: str, possible: str) -> pd.Series:
    """The last row of the version with that number, tag, id or beginning of an id."""
    found = versions[versions.number == name] if isinstance(name, int) else called(versions, name)
    recent = ", ".join(dict.fromkeys(str(n) for n in versions["name"].iloc[:-6:-1]))
    require(found.version.nunique() == 1, field, name, f"{possible}the last versions are {recent}")
    return found.iloc[-1]


def _verdicts(versions: pd.DataFrame) -> pd.DataFrame:
    judged = versions[versions.verdict.isin(VERDICTS)]
    return judged[["number", "version"]].assign(
        metric="verdict", test_set="", value=judged.verdict.map(VERDICTS.index).astype(float), direction="lower", sample=None, items=None
    )


def _judge(rule: Rule, own: pd.Series, row: pd.Series, group: pd.DataFrame, found: pd.DataFrame, which: str) -> dict[str, Any] | tuple[bool, str]:
    """An alert, or whether the comparison was done and what is to be said; `found` are the versions to compare with, called `which`."""
    value, name = _number(row["value"]), name_of(rule.metric, row["test_set"])
    if not math.isfinite(value):
        return _alert(rule, own, row, f"{name} is not a number.")
    sign = -1 if (rule.direction or better(rule.metric, row["test_set"], row.get("direction"))) == "higher" else 1
    if rule.against is None:
        beyond = _beyond(sign * (value - rule.allowed), 0)
        low, high = _interval(row)
        if not beyond or low <= rule.allowed <= high:
            return True, f"{name} is {_show(rule.metric, value)}, worse than the limit by no more than its noise" if beyond else ""
        limit = _show(rule.metric, rule.allowed)
        message = f"{name} is {_show(rule.metric, value)}{_between(low, high, row.get('n'), '.4g')}; the worst that is allowed is {limit}."
        return _alert(rule, own, row, message, change=value - rule.allowed, low=low - rule.allowed, high=high - rule.allowed)
    if found.empty:
        return False, which
    other = _reference(rule, row, group, found, which, sign)
    if isinstance(other, str):
        return False, other
    known = found.loc[other["number"]]
    called = {"parent": "the parent ", "dense": "the dense model ", "best": "the best so far, "}.get(rule.against, "") + str(known["name"])
    relative, base = rule.relative is not None, float(other["value"])
    if relative and base == 0 and value != 0:
        return False, f"{called} has 0 there, from which no relative change is defined"
    if value == base or not _beyond(sign * (value - base) / (abs(base) if relative else 1), rule.allowed):
        return True, ""  # the interval takes a bootstrap, and decides nothing here
    change, low, high, _, n = compare(row, other, relative=relative)
    differs = _text(row.get("sample")) and _text(other.get("sample")) and row["sample"] != other["sample"]
    if differs and math.isnan(low):
        return False, f"{called} answered other items, and there are no standard errors"
    form = "+.1%" if relative else "+.4g"
    moved = f"{change:{form}}{_between(low, high, n, form)}"
    if low <= 0 <= high:
        return True, f"{name} changed by {moved} against {called}, within its noise"
    message = f"{name} is {_show(rule.metric, value)}, {moved} against {called} ({_show(rule.metric, base)}); "
    message += f"allowed is {sign * rule.allowed:{form}}." + (" They answered different items." if differs else "")
    facts = {"reference": str(known["version"]), "reference_value": base, "change": change, "low": low, "high": high}
    return _alert(rule, own, row, message, **facts)


def _candidates(rule: Rule, own: pd.Series, versions: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The versions that a rule may compare with, and how they are called; none, and why."""
    others = versions[versions.number != own.number]
    if rule.against == "parent":
        if not _text(own.parent):
            return others[:0], "this version has no parent"
        found, which = others[others.version == own.parent], f"the parent {own.parent}"
    elif rule.against == "dense":
        found, which = others[others.technique == "dense"], "a dense version"
        if own.technique == "dense":
            found, which = found[found.number < own.number], "an earlier dense version"
    elif rule.against == "best":
        known = (others.number < own.number) & (others.technique != "dense") & ~(others.sparsity.astype(float) < _number(own.sparsity) - SPARSER)
        found, which = others[known], "an earlier pruned version that is at least as sparse"
    else:
        chosen = _find(versions, rule.against, rule.where, "")
        if chosen.version == own.version:
            return others[:0], f"{rule.against} is this version itself"
        found, which = others[others.version == chosen.version], str(chosen["name"])
    columns = {"model": "of the same model", **({"hardware": "on the same hardware"} if rule.metric in HARDWARE else {})}
    if found.empty:
        return found, f"the history does not hold {which}"
    for column, what in columns.items():
        found = found[found[column] == own[column]]
        if found.empty:
            return found, f"the history does not hold {which} {what} ({own[column]})"
    return found, which


def _reference(rule: Rule, row: pd.Series, group: pd.DataFrame, found: pd.DataFrame, which: str, sign: int) -> pd.Series | str:
    """The measurement that this one is compared with, or why there is none."""
    values = group.value.to_numpy(float)
    usable = np.isin(group.number, found.number) & np.isfinite(values)
    if not usable.any():
        return f"the history does not hold {name_of(rule.metric, row['test_set'])} of {which}"
    if _text(row.get("sample")):
        same = (group["sample"] == row["sample"]).to_numpy(bool)
        if rule.against == "best":
            usable &= same | group["sample"].isna().to_numpy()
        elif (usable & same).any():
            usable &= same
        if not usable.any():
            return f"the history does not hold {which} with the same items of {name_of(rule.metric, row['test_set'])}"
    places = np.flatnonzero(usable)
    return group.iloc[places[np.argmin(sign * values[places])] if rule.against == "best" else places[-1]]


def compare(own: Mapping[str, Any], other: Mapping[str, Any], *, relative: bool = False) -> Change:
    """The change of a measurement from `other` to `own`, and its 95 % interval.

    Args:
        own, other: rows of `Store.measurements`.
        relative: as a share of the other's value.

    Returns:
        As `versions.change`, in one unit; low and high are NaN where a measurement has no noise, infinite for a single item.
    """
    found = changed(own, other)
    base = abs(float(other["value"])) or 1.0
    share = own["metric"] not in SHARES
    scale = 1.0 if share == relative else base if share else 1 / base
    return found._replace(value=found.value * scale, low=_number(found.low) * scale, high=_number(found.high) * scale)


def _interval(row: Mapping[str, Any]) -> tuple[float, float]:
    """95 % interval of a measurement, NaN without noise, infinite for a single item."""
    if row.get("n") == 1:
        return -math.inf, math.inf
    stderr, low, high, n = (_number(row.get(name)) for name in ("stderr", "low", "high", "n"))
    if math.isnan(stderr):
        return math.nan, math.nan
    if not (math.isnan(low) or math.isnan(high)):
        return low, high
    found = statistics.student(statistics.Measured(_number(row["value"]), stderr, None if math.isnan(n) else int(n)))
    return found.low, found.high


def _beyond(worse: float, allowed: float) -> bool:
    return worse > allowed and not math.isclose(worse, allowed, rel_tol=1e-9, abs_tol=1e-12)  # 0.5 - 0.48 is not more than 0.02


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _show(metric: str, value: float) -> str:
    if metric == "verdict":
        return VERDICTS[int(value)]
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}"


def _between(low: float, high: float, n: Any, form: str) -> str:
    if math.isnan(low) or math.isnan(high):
        return ""
    return f" ({low:{form}} to {high:{form}}{'' if math.isnan(_number(n)) else f', n = {n:.0f}'})"


def _line(text: str) -> str:
    """Text of runs can neither begin a line of its own nor move the cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _alert(rule: Rule, own: pd.Series, row: pd.Series, message: str, **facts: Any) -> dict[str, Any]:
    return {
        "number": int(own.number),
        "version": str(own.version),
        "name": str(own["name"]),
        "rule": rule.name,
        "severity": rule.severity,
        "metric": rule.metric,
        "test_set": str(row["test_set"]),
        "against": rule.against,
        "reference": None,
        "value": _number(row["value"]),
        "reference_value": math.nan,
        "change": math.nan,
        "low": math.nan,
        "high": math.nan,
        "limit": float(rule.allowed),
        "message": _line(message),
        **facts,
    }


def describe(report: Report) -> str:
    """A report for the terminal: what fired, errors first; what is within its noise; what was skipped and why."""
    count = {word: sum(row["severity"] == word for row in report.fired) for word in SEVERITIES}
    fired = ", ".join(f"{n} {word}{'s' * (n != 1)}" for word, n in count.items())
    lines = [f"Version {report.name} (number {report.number}): {fired}; {len(report.passed)} passed, {len(report.skipped)} skipped."]
    lines += [f"{row['severity']:<8} {row['rule']}: {row['message']}" for row in report.fired]
    lines += [f"{'passed':<8} {rule}: {why}" for rule, _, why in report.passed if why]
    grouped: dict[tuple[str, str], list[str]] = {}
    for rule, measurement, why in report.skipped:
        grouped.setdefault((rule, why), []).append(measurement)
    lines += [f"{'skipped':<8} {rule}: {', '.join(names)}: {why}" for (rule, why), names in grouped.items()]
    return "\n".join(map(_line, lines))


def annotations(report: Report) -> str:
    """The alerts as annotations of GitHub Actions, one a line."""
    lines = []
    for row in report.fired:
        title = _escape(f"reconkit: {row['rule']}").replace(":", "%3A").replace(",", "%2C")
        lines.append(f"::{row['severity']} title={title}::{_escape(row['name'] + ': ' + row['message'])}")
    return "\n".join(lines)


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def command(text: str) -> list[str]:
    """The words of a command line.

    Raises:
        ConfigError: there are none, or a quote is left open.
    """
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    require(bool(words), "--send", text, "a command, its quotes closed")
    return words


def send(words: Sequence[str], alerts: Sequence[Mapping[str, Any]]) -> None:
    """Give the alerts to a command, one line of JSON each on its standard input; no number is null.

    Raises:
        RuntimeError: the command cannot be started, fails, or takes more than 30 seconds.
    """
    plain = ({key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()} for row in alerts)
    lines = "".join(json.dumps(row) + "\n" for row in plain)
    try:
        subprocess.run(words, input=lines, text=True, encoding="utf-8", timeout=TIMEOUT, check=True)
    except subprocess.TimeoutExpired:
        problem = f"took more than {TIMEOUT} seconds"
    except subprocess.CalledProcessError as error:
        problem = f"ended with status {error.returncode}"
    except OSError as error:
        problem = f"cannot be started ({error.strerror})"
    else:
        return
    raise RuntimeError(f"The alerts were not sent on: {words[0]} {problem}. They are kept in the history.")

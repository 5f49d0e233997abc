"""Rules: which measurement of a version is judged, against what, and how much worse it may be; `alerts` says what they mean.

A rule that no history could answer, or that can never fire, is refused before anything is checked.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from . import data
from .config import ConfigError, RunConfig, one_of, require
from .history import RENAMED
from .versions import direction

DEFAULT = Path("papermill_runs") / "alerts.toml"
VERDICTS = ("fine", "watch", "overfitting")
"From good to bad; as a measurement, the place in this list."
SEVERITIES = ("error", "warning")
DIRECTIONS = ("lower", "higher")
REFERENCES = ("parent", "dense", "best")


class Metric(NamedTuple):
    least: float
    most: float
    test_sets: tuple[str, ...]


ERRORS = Metric(0, math.inf, ("calibration", "extra", *data.NAMED))
RATIOS = Metric(0, math.inf, data.NAMED)
METRICS = {
    "perplexity": Metric(1, math.inf, (*data.NAMED, "self")),
    "accuracy": Metric(0, 1, ("cloze", *RunConfig.tasks, *(f"{task} (acc_norm)" for task in RunConfig.tasks))),
    "nmse": ERRORS,
    "mse": ERRORS,
    "token_nmse": ERRORS,
    "token_nmse_90": ERRORS,
    "error ratio": RATIOS,
    "token error ratio": RATIOS,
    "verdict": Metric(0, len(VERDICTS) - 1, ("",)),
    "sparsity": Metric(0, 1, ("",)),
    "data per parameter": Metric(0, math.inf, ("",)),
    "seconds": Metric(0, math.inf, ("prune", "evaluate")),
    "money": Metric(0, math.inf, ("prune", "evaluate", "million tokens/*")),
    "gpu_hours": Metric(0, math.inf, ("prune", "evaluate")),
    "joules": Metric(0, math.inf, ("prune", "evaluate")),
    "memory": Metric(0, math.inf, ("gpu", "rss")),
    "speed": Metric(0, math.inf, ("first_token_seconds/*", "prefill_tokens_per_second/*", "decode_tokens_per_second/*", "peak_bytes/*")),
    "size": Metric(0, math.inf, ("parameters", "bytes")),
}
"What runs measure, between which values; a history may hold more."
ANY = Metric(-math.inf, math.inf, ())
LESS = ("size", "verdict")
"Less is better for a rule, though the history leaves it open."


@dataclass(frozen=True)
class Rule:
    """One rule.

    Raises:
        ConfigError: a value that is not possible, or a rule that can never fire.
    """

    name: str
    "Said in every alert."
    metric: str
    "perplexity, accuracy, nmse, token_nmse, error ratio, verdict, seconds, … "
    test_set: str = "*"
    "A name or a pattern such as boolq*; each test set that matches is judged by itself."
    against: str | None = None
    "parent, dense, best, a tag or an id; None: the value itself is judged."
    relative: float | None = None
    "Allowed change in the worse direction, as a share of the reference's value."
    absolute: float | None = None
    "The same in the measurement's own unit."
    limit: float | str | None = None
    "Worst allowed value, without `against`; a word for the verdict."
    direction: str | None = None
    "lower or higher: which is better; None: the measurement's own."
    severity: str = "error"
    "error or warning."
    model: str = "*"
    technique: str = "*"
    hardware: str = "*"
    "Patterns: versions that the rule is for."
    source: str = ""
    "File that it stands in, for messages."

    def __post_init__(self) -> None:
        for word in ("name", "metric", "test_set", "severity", "model", "technique", "hardware", "source"):
            value = getattr(self, word)
            require(isinstance(value, str) and value.isprintable(), f"{self.where}: {word}", value, "one line of text")
        require(bool(self.name.strip()), f"{self.where}: name", self.name, "one line of text")
        require(self.metric not in RENAMED, f"{self.where}: metric", self.metric, f"{RENAMED.get(self.metric)!r}, its new name")
        require(self.severity in SEVERITIES, f"{self.where}: severity", self.severity, one_of(SEVERITIES))
        require(self.direction in (None, *DIRECTIONS), f"{self.where}: direction", self.direction, one_of(DIRECTIONS))
        own = "" if self.metric == "speed" else better(self.metric, "")  # of speed, the test set decides
        require(not own or self.direction in (None, own), f"{self.where}: direction", self.direction, f"{own}, which is better for {self.metric}")
        given = {word: getattr(self, word) for word in ("relative", "absolute", "limit") if getattr(self, word) is not None}
        wanted = "limit alone, or relative or absolute together with against"
        wanted = wanted if self.against is None else "relative or absolute, one of them, together with against"
        possible = [["limit"]] if self.against is None else [["relative"], ["absolute"]]
        require(list(given) in possible, f"{self.where}: what it allows", ", ".join(given) or "missing", wanted)
        text = isinstance(self.against, str) and bool(self.against) and self.against.isprintable()
        require(self.against is None or text, f"{self.where}: against", self.against, f"{', '.join(REFERENCES)}, a tag or an id")
        self._can_fire()

    def _can_fire(self) -> None:
        """Refuse a limit beyond which no value lies, or on which all do."""
        metric, higher = METRICS.get(self.metric, ANY), (self.direction or better(self.metric, self.test_set)) == "higher"
        if self.metric == "verdict":
            require(self.relative is None, f"{self.where}: relative", self.relative, "absolute, or a limit: verdicts have no ratio")
            require(self.against is not None or self.limit in VERDICTS[:-1], f"{self.where}: limit", self.limit, one_of(VERDICTS[:-1]))
        word = next(w for w in ("relative", "absolute", "limit") if getattr(self, w) is not None)
        value = self.allowed
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        require(number, f"{self.where}: {word}", value, "a number")
        if word == "limit":
            least, most = metric.least, metric.most
            fits = least < value <= most if higher else least <= value < most
            ends = f"above {least:g}" if higher else f"at least {least:g}"
            ends += "" if math.isinf(most) else f" and at most {most:g}" if higher else f" and below {most:g}"
            require(fits, f"{self.where}: limit", value, f"{ends}, since {self.metric} lies between {least:g} and {most:g}")
            return
        span = metric.most - metric.least if word == "absolute" else 1.0 if higher else math.inf
        unit = "as a share, such as 0.02" if word == "relative" else f"in the unit of {self.metric}"
        possible = f"at least 0 {unit}" + ("" if math.isinf(span) else f", and below {span:g}, or the rule can never fire")
        require(0 <= value < span, f"{self.where}: {word}", value, possible)

    @property
    def where(self) -> str:
        """How a message names the rule."""
        return f"{self.source}: rule {self.name!r}" if self.source else f"rule {self.name!r}"

    @property
    def allowed(self) -> Any:
        """The limit, or the allowed change, as a number."""
        found = next(v for v in (self.relative, self.absolute, self.limit) if v is not None)
        return VERDICTS.index(found) if self.metric == "verdict" and found in VERDICTS else found


def load_rules(path: str | Path = DEFAULT, known: pd.DataFrame | None = None) -> list[Rule]:
    """The rules of a TOML file: one [[rule]] table each, with the fields of `Rule`.

    Args:
        known: measurements of the history; then its metrics and test sets are possible as well.

    Raises:
        ConfigError: no such file, no TOML, no rule, an unknown key, metric or test set, one name twice, or a rule that can never
            fire; the message names the file, the rule and what is possible.
    """
    file = Path(path)
    if not file.is_file():
        example = '[[rule]] name = "worse text", metric = "perplexity", against = "parent", relative = 0.02'
        raise ConfigError(f"There is no file of rules {file}; name one with --rules, or write one with a line for each field, such as {example}.")
    try:
        written = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file.name} is not valid TOML: {error}.") from None
    unknown = [key for key in written if key != "rule"]
    require(not unknown, f"{file.name}: the key", ", ".join(unknown), "rule, as in [[rule]]")
    rows = written.get("rule", [])
    tables = isinstance(rows, list) and len(rows) > 0 and all(isinstance(row, dict) for row in rows)
    require(tables, f"{file.name}: rule", rows, "one [[rule]] table or more")
    rules = [_rule(file.name, i, row) for i, row in enumerate(rows, 1)]
    names = [rule.name for rule in rules]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"{file.name}: name", ", ".join(twice), "given to one rule only")
    for rule in rules:
        _check_known(rule, known)
    return rules


def _rule(file: str, place: int, row: Mapping[str, Any]) -> Rule:
    where = f"{file}: rule {row.get('name', place)!r}"
    keys = tuple(f.name for f in fields(Rule) if f.name != "source")
    unknown = [key for key in row if key not in keys]
    require(not unknown, f"{where}: the key", ", ".join(unknown), one_of(keys))
    for key in ("name", "metric"):
        require(key in row, f"{where}: {key}", "missing", "one line of text")
    return Rule(**row, source=file)


def _check_known(rule: Rule, known: pd.DataFrame | None) -> None:
    """The metric and the test set are among those that runs measure or the history holds, and which direction is better is known."""
    held = pd.DataFrame({"metric": [], "test_set": [], "direction": []}) if known is None else known
    metrics = sorted({*METRICS, *held.metric})
    require(rule.metric in metrics, f"{rule.where}: metric", rule.metric, one_of(tuple(metrics)))
    held = held[held.metric == rule.metric].drop_duplicates(["test_set", "direction"])
    sets = tuple(dict.fromkeys([*held.test_set, *METRICS.get(rule.metric, ANY).test_sets]))
    matching = [name for name in sets if matches(name, rule.test_set) or fnmatchcase(rule.test_set, name)]
    require(bool(matching), f"{rule.where}: test_set", rule.test_set, f"{one_of(sets)}, or a pattern" if any(sets) else "left out")
    own = {better(rule.metric, row.test_set, row.direction) for row in held.itertuples() if row.test_set in matching}
    own |= {better(rule.metric, name) for name in matching if name not in set(held.test_set)}
    require(own == {""} or rule.direction is None or own == {rule.direction}, f"{rule.where}: direction", rule.direction, " or ".join(sorted(own)))
    wanted = f"{one_of(DIRECTIONS)}: which {rule.metric} is better"
    require(rule.direction is not None or "" not in own, f"{rule.where}: direction", "missing", wanted)


def matches(value: Any, pattern: str) -> bool:
    """Whether a name is the pattern, or fits it."""
    return value == pattern or fnmatchcase(str(value), pattern)


def better(metric: str, test_set: str, written: Any = "") -> str:
    """Which is better, "" where nobody can say."""
    return written if isinstance(written, str) and written else direction(metric, test_set) or ("lower" if metric in LESS else "")

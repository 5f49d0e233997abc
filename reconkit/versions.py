"""A run as a version in the history: its measurements as rows, and how two versions compare.

A version is a run; `tag` names it, `parent` says which one it follows. The name of a measurement in `Run.metrics` is metric/test set, cut
at the first stroke.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from . import statistics
from .config import to_dict
from .history import Store

ENDS = ("/low", "/high")
BETTER = {
    "perplexity": "lower", "nmse": "lower", "mse": "lower", "token_nmse": "lower", "token_nmse_90": "lower", "error ratio": "lower",
    "token error ratio": "lower", "accuracy": "higher", "seconds": "lower", "memory": "lower", "money": "lower", "joules": "lower",
    "gpu_hours": "lower",
}  # fmt: skip
"Which way a metric is better; the others say nothing of the kind by themselves."
UNITS = {
    "perplexity": "", "nmse": "", "mse": "", "token_nmse": "", "token_nmse_90": "", "error ratio": "ratio", "token error ratio": "ratio",
    "accuracy": "share", "seconds": "s", "memory": "bytes", "joules": "J", "gpu_hours": "h", "sparsity": "share",
}  # fmt: skip
HARDWARE = ("seconds", "memory", "speed", "joules", "gpu_hours", "money")
"Metrics that compare only on one class of hardware."
SHARES = ("accuracy",)
"Metrics whose change is a difference; others change by a share of what was there."
RATIOS = {"error ratio": "nmse", "token error ratio": "token_nmse"}
"Held-out over calibration error of the last block, and the error that it is a ratio of."


def name_of(metric: str, test_set: str) -> str:
    """The flat name: metric/test set."""
    return f"{metric}/{test_set}" if test_set else metric


def split(name: str) -> tuple[str, str]:
    """(metric, test set) of a flat name."""
    metric, _, test_set = name.partition("/")
    return metric, test_set


def direction(metric: str, test_set: str = "") -> str:
    """ "lower" or "higher" is better, or "" where neither is."""
    if metric == "speed":
        return "higher" if "per_second" in test_set else "lower"
    return BETTER.get(metric, "")


def facts(run: Any) -> dict[str, Any]:
    """What the history keeps of a run besides its measurements, but for its parent."""
    how, spent = run.config.prune, [run.metrics.get(f"seconds/{part}") for part in ("prune", "evaluate")]
    paid = [run.metrics[name] for name in ("money/prune", "money/evaluate") if name in run.metrics]
    asked = {name: run.record["made_from"][name] for name in ("configuration", "model", "texts", "tasks")}
    return {
        "version": run.id,
        "model": run.config.model,
        "configuration": hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12],
        "commit": run.record.get("commit"),
        "hardware": hardware(run.record["environment"]),
        "created": run.record["created"],
        "seconds": sum(s for s in spent if s is not None),
        "cost": sum(paid) if paid else None,
        "verdict": run.record["verdict"] if how else None,
        "reasons": run.record["reasons"] if how else [],
        "corpus": run.config.corpus,
        "criterion": how.criterion if how else None,
        "technique": how.technique if how else "dense",
        "pattern": how.pattern if how else None,
        "sparsity": run.metrics["sparsity"],
        "settings": json.dumps(to_dict(run.config)),
        "environment": json.dumps(run.record["environment"]),
    }


def hardware(environment: Mapping[str, Any]) -> str:
    """The class within which times and memory compare: the GPU, or the processor with its cores, and the threads that were used."""
    if environment.get("gpu"):
        return str(environment["gpu"])
    return f"{environment.get('processor') or environment['system']}, {environment['cores']} cores, {environment['threads']} threads"


@lru_cache
def commit() -> str | None:
    """The git commit of these sources, with a + where they were changed since; None where they are in no such tree."""
    here = Path(__file__).parent
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str:
        asked = {"cwd": here, "env": plain, "capture_output": True, "text": True, "check": True, "timeout": 5}
        return subprocess.run(["git", *words], **asked).stdout.strip()

    try:
        if not git("ls-files", "--error-unmatch", Path(__file__).name):
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def measurements(run: Any) -> list[dict[str, Any]]:
    """The rows of a run: every measurement with its interval, and for those of single items what each of them gave."""
    rows = {}
    for name, value in run.metrics.items():
        if name.endswith(ENDS):
            continue
        metric, test_set = split(name)
        row = {"metric": metric, "test_set": test_set, "value": value, "low": run.metrics.get(f"{name}/low"), "high": run.metrics.get(f"{name}/high")}
        rows[name] = {**row, "unit": UNITS.get(metric, ""), "direction": direction(metric, test_set)}
    for metric, error in RATIOS.items():
        calibration = run.metrics.get(f"{error}/calibration")
        for name, value in run.metrics.items():
            kind, source = split(name)
            if kind == error and source not in ("calibration", "extra") and calibration:
                about = {"metric": metric, "test_set": source, "unit": UNITS[metric], "direction": "lower"}
                rows[f"{metric}/{source}"] = {**about, "value": value / calibration}
    for row in run.record["evaluation"]["perplexity"]:
        articles = row.get("articles")  # an old record has none
        stderr = row["value"] * statistics.standard_error(row["nll"], articles)  # of exp, by the delta method
        items = {"nll": row["nll"], "article": articles}
        about = {"stderr": stderr, "n": row.get("n", len(row["nll"])), "sample": row["samples"], "items": json.dumps(items)}
        rows[f"perplexity/{row['corpus']}"] |= about
    if cloze := run.record["evaluation"].get("cloze"):
        items = {"right": cloze["right"], "article": cloze.get("article", cloze["sample"])}
        about = {"stderr": statistics.standard_error(*items.values()), "n": len(set(items["article"])), "sample": cloze["items"]}
        rows["accuracy/cloze"] |= {**about, "items": json.dumps(items)}
    for row in run.record["evaluation"].get("zero_shot") or []:
        found = rows[f"accuracy/{row['task']}" + ("" if row["metric"] == "acc" else " (acc_norm)")]
        found |= {"stderr": row.get("stderr"), "n": row.get("n"), "sample": row.get("items")}
        found |= {"items": json.dumps(row["right"])} if "right" in row else {}
    return list(rows.values())


class Change(NamedTuple):
    """How a measurement differs from another version's."""

    value: float
    "A difference for accuracies, else a share of the other's value."
    low: float | None
    "Bounds of the 95 % interval; None where a measurement has no noise, such as an error or a time."
    high: float | None
    paired: bool
    "Both answered the same items."
    n: int | None = None
    "Articles, texts or items that the interval is over, of the smaller set where they differ."


def change(own: Mapping[str, Any], other: Mapping[str, Any]) -> Change:
    """How a measurement differs from another version's, of two rows of `Store.measurements`.

    The 95 % interval is paired where both answered the same items: `statistics.perplexity_ratio` over articles, `statistics.difference`
    over items, of cloze over articles. Else it is Welch's from both standard errors, of perplexities on the scale of their logs.
    It is about the two versions, each of one calibration draw.
    """
    if own.get("items") and other.get("items") and own.get("sample") and own["sample"] == other.get("sample"):
        return _paired(own["metric"], *(json.loads(row["items"]) for row in (own, other)))
    value, reference = float(own["value"]), float(other["value"])
    scale = abs(reference) if own["metric"] not in SHARES and reference else 1.0
    rows = [_measured(row) for row in (own, other)]
    if not all(math.isfinite(row.stderr) or row.n == 1 for row in rows):
        return Change((value - reference) / scale, None, None, False)
    if own["metric"] == "perplexity":
        found: statistics.Interval = statistics.welch_ratio(*rows)
        return Change(found.value - 1, found.low - 1, found.high - 1, False, found.n or None)
    found = statistics.welch(*rows)
    return Change(found.value / scale, found.low / scale, found.high / scale, False, found.n or None)


def _paired(metric: str, own: Any, other: Any) -> Change:
    """The change of items as `measurements` keeps them, or as it once did: without articles, or by sample."""
    told = [row if isinstance(row, dict) else {} for row in (own, other)]
    articles = next((a for row in told if (a := row.get("article", row.get("sample"))) is not None), None)
    a, b = (row.get("nll", row.get("right")) if isinstance(row, dict) else row for row in (own, other))
    if metric == "perplexity":
        found: statistics.Interval = statistics.perplexity_ratio(a, b, articles)
        return Change(found.value - 1, found.low - 1, found.high - 1, True, found.n)
    found = statistics.difference(a, b, articles)
    return Change(found.value, found.low, found.high, True, found.n)


def _measured(row: Mapping[str, Any]) -> statistics.Measured:
    """The summary of a row; its standard error is NaN where there is none."""
    stderr, n = (math.nan if row.get(name) is None else float(row[name]) for name in ("stderr", "n"))
    return statistics.Measured(float(row["value"]), stderr, None if math.isnan(n) else int(n))


def columns(rows: pd.DataFrame, of: str = "value") -> pd.DataFrame:
    """A row a version (its number), a column a measurement (its flat name), of the store's long table."""
    named = rows.assign(name=[name_of(*pair) for pair in zip(rows.metric, rows.test_set, strict=True)])
    return named.pivot(index="number", columns="name", values=of)[list(dict.fromkeys(named["name"]))].astype(float)


def wide(store: Store) -> pd.DataFrame:
    """One row a version, as `runs.history`: how it was made, its verdict, and every measurement in a column of its own."""
    versions, rows = store.versions(), store.measurements()
    if versions.empty:
        return pd.DataFrame()
    parts = [columns(rows, of).add_suffix(end) for of, end in zip(("value", "low", "high"), ("", *ENDS), strict=True)]
    values = pd.concat(parts, axis="columns").dropna(axis="columns", how="all")
    order = [name + end for name in parts[0] for end in ("", *ENDS)]
    values = values[[name for name in order if name in values]]
    told = ["version", "created", "tag", "parent", "model", "corpus", "criterion", "technique", "pattern", "verdict", "commit", "hardware"]
    facts = versions.set_index("number")[told].rename(columns={"version": "id"})
    facts.insert(6, "count", [json.loads(text)["count"] for text in versions.settings])
    return facts.join(values).reset_index(drop=True)


def front(table: pd.DataFrame, quality: str, cost: str) -> pd.Series:
    """Which rows no other one beats: at most as dear and better, or cheaper and as good (the Pareto front), as booleans.

    Args:
        table: rows with the columns `quality` and `cost`, of which the direction is that of their metric; cost: less is better.
    """
    sign = -1.0 if direction(*split(quality)) == "higher" else 1.0
    known = pd.DataFrame({"q": table[quality].astype(float) * sign, "c": table[cost].astype(float)}).dropna()
    at_cost = known.groupby("c").q.min()  # sorted by cost
    cheaper = at_cost.cummin().shift(fill_value=math.inf)
    kept = (known.q == known.c.map(at_cost)) & (known.q < known.c.map(cheaper))
    return kept.reindex(table.index, fill_value=False)

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
from typing import Any

import pandas as pd
import torch

from . import evaluation, zeroshot
from .config import Z95, to_dict
from .history import Store

ENDS = ("/low", "/high")
BETTER = {
    "perplexity": "lower", "nmse": "lower", "mse": "lower", "gap": "lower", "accuracy": "higher", "seconds": "lower", "memory": "lower",
    "money": "lower", "joules": "lower", "gpu_hours": "lower",
}  # fmt: skip
"Which way a metric is better; the others say nothing of the kind by themselves."
UNITS = {
    "perplexity": "", "nmse": "", "mse": "", "gap": "ratio", "accuracy": "share", "seconds": "s", "memory": "bytes", "joules": "J",
    "gpu_hours": "h", "sparsity": "share",
}  # fmt: skip
HARDWARE = ("seconds", "memory", "speed", "joules", "gpu_hours", "money")
"Metrics that compare only on one class of hardware."
SHARES = ("accuracy",)
"Metrics whose change is a difference; others change by a share of what was there."


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
    calibration = run.metrics.get("nmse/calibration")
    for name, value in run.metrics.items():
        source = name.removeprefix("nmse/")
        if name.startswith("nmse/") and source not in ("calibration", "extra") and calibration:
            rows[f"gap/{source}"] = {"metric": "gap", "test_set": source, "value": value / calibration, "unit": UNITS["gap"], "direction": "lower"}
    for row in run.record["evaluation"]["perplexity"]:
        found = rows[f"perplexity/{row['corpus']}"]
        half = (row["high"] - row["low"]) / 2 / Z95
        found |= {"stderr": half, "n": len(row["nll"]), "sample": row["samples"], "items": json.dumps(row["nll"])}
    if cloze := run.record["evaluation"].get("cloze"):
        items = json.dumps({"right": cloze["right"], "sample": cloze["sample"]})
        half = (cloze["high"] - cloze["low"]) / 2 / Z95
        rows["accuracy/cloze"] |= {"stderr": half, "n": cloze["n"], "sample": cloze["items"], "items": items}
    for row in run.record["evaluation"].get("zero_shot") or []:
        found = rows[f"accuracy/{row['task']}" + ("" if row["metric"] == "acc" else " (acc_norm)")]
        found |= {"stderr": row.get("stderr"), "n": row.get("n"), "sample": row.get("items")}
        found |= {"items": json.dumps(row["right"])} if "right" in row else {}
    return list(rows.values())


def change(own: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float | None, float | None, bool]:
    """How a measurement differs from another version's: (change, low, high, paired).

    Accuracies change by a difference, others by a share of the other's value. The 95 % interval is paired where both answered the
    same items (perplexity: bootstrap over sequences; cloze: clustered by text), else it comes from both standard errors; a measurement
    without any, such as an error or a time, has none.
    """
    if own.get("items") and other.get("items") and own.get("sample") and own["sample"] == other.get("sample"):
        a, b = json.loads(own["items"]), json.loads(other["items"])
        if own["metric"] == "perplexity":
            value, low, high = evaluation.perplexity_ratio(torch.tensor(a), torch.tensor(b))
            return value - 1, low - 1, high - 1, True
        if isinstance(a, dict):
            paired = torch.tensor(a["right"]) - torch.tensor(b["right"])
            value, error = float(paired.double().mean()), evaluation.clustered_error(paired, torch.tensor(a["sample"]))
            return value, value - Z95 * error, value + Z95 * error, True
        table = zeroshot.compare({"": {"acc": a}}, {"": {"acc": b}})
        return *map(float, table.loc[0, ["difference", "low", "high"]]), True
    value, reference = float(own["value"]), float(other["value"])
    share = own["metric"] not in SHARES
    found = (value - reference) / abs(reference) if share and reference else value - reference
    errors = [_number(row.get("stderr")) for row in (own, other)]
    if None in errors:
        return found, None, None, False
    half = Z95 * math.hypot(*errors) / (abs(reference) if share and reference else 1.0)
    return found, found - half, found + half, False


def _number(value: Any) -> float | None:
    return None if value is None or value != value else float(value)


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

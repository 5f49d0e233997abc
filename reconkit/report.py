"""The terminal's tables, drawn from the run records and the history."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import data, runs, statistics, testsets, versions
from .assets import cache_dir
from .config import one_of, require, to_dict
from .overfit import verdict

if TYPE_CHECKING:
    from pandas import DataFrame

EMPTY = "No run is recorded yet; `reconkit suite run papermill_runs/smoke.toml` makes some in minutes."
FIRST = ("id", "created", "tag", "parent", "model", "corpus", "criterion", "technique", "pattern", "sparsity", "verdict")
"Columns that lead the table, in this order, where the history has them."
TEXTS = {
    "wiki": "Wikipedia articles that are none of the calibration's",
    "news": "news stories, another domain",
    "pydocs": "prose of Python's docstrings, a technical domain",
}
BOUNDS = ("/low", "/high")
"Interval ends: in the export, not in the table."


def arrange(history: DataFrame) -> DataFrame:
    """The history newest first, the describing columns in front, then the measurements without their interval ends and empty columns."""
    table = history.iloc[::-1]
    first = [c for c in FIRST if c in table]
    measured = [c for c in table.columns if "/" in str(c) and not str(c).endswith(BOUNDS)]
    return table[first + measured].dropna(axis="columns", how="all")


def show(value: Any) -> str:
    """A cell: floats to four figures, bytes and times are left to their columns' units."""
    if value is None or value != value:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}"
    return str(value)


HOW = ("criterion", "technique", "pattern", "sparsity", "corpus", "count")
"How a version was pruned, in a line."


def best(history: DataFrame, metric: str, cost: str, limit: int) -> str:
    """The versions that no other one beats in quality and cost, the cheapest first, and how they were pruned.

    Args:
        history: `runs.history()`.
        metric, cost: columns of it.

    Raises:
        ConfigError: no version has such a measurement; the message lists those there are.
    """
    metrics = [c for c in history.columns if "/" in str(c) and not str(c).endswith(BOUNDS)]
    require(metric in metrics, "--metric", metric, one_of(tuple(metrics)))
    require(cost in metrics and cost != metric, "--cost", cost, one_of(tuple(m for m in metrics if m != metric)))
    require(limit > 0, "--limit", limit, "a whole number of at least 1")
    pruned = history[history.technique != "dense"]
    pruned = pruned.drop_duplicates("id", keep="last")
    front = pruned[versions.front(pruned, metric, cost)].sort_values(cost)
    if front.empty:
        return f"No pruned version has both {metric} and {cost}."
    columns = [c for c in ("id", "tag", *HOW) if c in front] + [cost, metric]
    more = "more" if versions.direction(*versions.split(metric)) == "higher" else "less"
    told = f"{len(front)} of {len(pruned)} pruned versions are beaten by none: {cost} grows downwards ({more} {metric} is better)"
    return f"{text_table(front[columns].dropna(axis='columns', how='all').head(limit))}\n\n{told}."


def remembered(history: DataFrame, id: str) -> str:
    """A version whose record is gone: what the history keeps of it."""
    row = history[history.id == id].iloc[-1].dropna()
    return f"{_pairs(row.to_dict())}\n\nIts record was deleted to keep the cache within its limit; this is from the history."


def describe(run: Any) -> str:
    """A recorded run in the terminal: how it was made, what was measured, what to know."""
    facts = {"run": run.id, "folder": run.folder, **_flat(to_dict(run.config))}
    word, reasons = verdict(run)
    parts = [_pairs(facts), _pairs(run.metrics), _pairs({"verdict": " ".join([word, *(f"({reason})" for reason in reasons)])})]
    return "\n\n".join([*parts, *(["\n".join(run.notes)] if run.notes else [])])


def summary(result: Any) -> str:
    """A finished pruning in the terminal: final block's error by source, verdict, cost, notes."""
    last = result.errors[result.errors["block"] == result.errors["block"].max()]
    word, reasons = verdict(result)
    facts = {
        "sparsity": result.sparsity,
        "time": clock(result.seconds),
        "peak memory": ", ".join(f"{size(n)} {name}" for name, n in result.peak_memory.items() if n),
        "verdict": " ".join([word, *(f"({reason})" for reason in reasons)]),
    }
    return "\n".join([text_table(last), "", _pairs(facts), *result.notes])


def evaluation(record: dict[str, Any]) -> str:
    """An evaluation record in the terminal, as one table: each figure with its 95 % interval (times: quartiles), of how many units, and
    its change."""
    from pandas import DataFrame

    rows = []
    for r in record.get("perplexity") or []:
        change = _change("{:+.1%}", *(r[f"ratio{end}"] - 1 for end in ENDS)) if "ratio" in r else ""
        of = f"{r['tokens']} tokens" + (f", {r['n']} articles" if "n" in r else "")
        rows.append((f"perplexity, {r['corpus']}", r["value"], _span(r["low"], r["high"]), of, change))
    scores = [{"task": "cloze", "metric": "acc", **record["cloze"]}] if record.get("cloze") else []
    for r in [*scores, *(_zero_shot(row) for row in record.get("zero_shot") or [])]:
        paired = r.get("difference")
        change = _change("{:+.1f} points", *(100 * r[f"difference{end}"] for end in ENDS)) if paired is not None and paired == paired else ""
        of = f"{len(r['right'])} items, {r['n']} articles" if r["task"] == "cloze" and "article" in r else f"{r['n']} items"
        rows.append((f"{r['metric']}, {r['task']}", r["value"], _span(r["low"], r["high"]), of, change))
    timing = {(r["model"], r["batch"], r["measure"]): r for r in record.get("speed") or []}
    for (model, batch, measure), r in timing.items():
        other = timing.get(("against" if model == "this" else "this", batch, measure))
        faster = f"{r['value'] / other['value']:.2f} times" if other and model != "against" else ""
        name = {"this": "", "against": "the other's "}.get(model, f"{model}: ") + measure.replace("_", " ")
        of = f"quartiles of {r['n']} turns" if "n" in r else "quartiles"
        rows.append((f"{name}, batch {batch}", r["value"], _span(r["low"], r["high"]), of, faster))
    rows += [(f"{part}, {name}", value, "", "", "") for part in ("size", "cost") for name, value in (record.get(part) or {}).items()]
    table = DataFrame(rows, columns=["measure", "value", "95 %", "of", "against the other"])
    return text_table(table.loc[:, (table != "").any()])


ENDS = ("", "_low", "_high")


def _zero_shot(row: dict[str, Any]) -> dict[str, Any]:
    """The interval of the value and that of the difference apart, of which the row has the latter where something was compared."""
    right = round(row["value"] * row["n"])
    own = statistics.proportion([1] * right + [0] * (row["n"] - right))
    return {**row, "difference_low": row["low"], "difference_high": row["high"], "low": own.low, "high": own.high}


def _span(low: float, high: float) -> str:
    return f"{show(float(low))} to {show(float(high))}"


def changed(metric: str, value: float, low: float | None, high: float | None, n: float | None = None) -> str:
    """A change as `versions.change` has it, with its interval where it has one, and the units that this is over."""
    form, scale = ("{:+.1f} points", 100) if metric in versions.SHARES else ("{:+.1%}", 1)
    return form.format(scale * value) if low is None or low != low else _change(form, scale * value, scale * low, scale * high, n)


def _change(form: str, value: float, low: float, high: float, n: float | None = None) -> str:
    of = "" if n is None or n != n else f", n = {n:.0f}"
    return f"{form.format(value)} ({form.format(low)} to {form.format(high)}{of})"


def test_sets() -> str:
    """The sets on which a pruned model is compared with its original: fixed texts, and those made for a model."""
    import pandas as pd

    fixed = [
        {
            "kind": corpus,
            "size": f"{n:,} characters" if (n := data.characters(corpus, "test")) else "not fetched yet",
            "seed": "of the run",
            "fingerprint": testsets.text_sum(corpus),
            "about": about,
        }
        for corpus, about in TEXTS.items()
    ]
    table = pd.DataFrame([*fixed, *testsets.listed()], columns=["kind", "size", "model", "seed", "fingerprint", "about"])
    return f"Test sets\n{text_table(table.astype(object).where(table.notna(), ''))}\n\nCache"


def cached() -> str:
    """What lies in the cache: every asset, model and run, with its size."""
    folder = cache_dir()
    sizes = {f"{part.name}/{entry.name}": runs.size(entry) for part in _folders(folder) for entry in _folders(part)}
    sizes |= {part.name: runs.size(part) for part in _folders(folder) if not _folders(part)}
    total = f"{size(sum(sizes.values()))} in {folder}, limit {size(runs.cache_limit())} (RECONKIT_CACHE_LIMIT)"
    return "\n".join([*(f"{size(count):>10}  {name}" for name, count in sizes.items()), total])


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir())


def size(count: float) -> str:
    """Bytes in the unit that reads best."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def _pairs(facts: dict[str, Any]) -> str:
    width = max(map(len, facts), default=0)
    return "\n".join(f"{name:<{width}}  {show(value)}" for name, value in facts.items())


def text_table(table: DataFrame) -> str:
    """A table for the terminal."""
    whole = table.astype(object).where(table.notna(), "")
    return whole.to_string(index=False, formatters=[show] * table.shape[1])


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 2:05, 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

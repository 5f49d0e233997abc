"""Runs of one notebook with different parameters: a manifest from a grid before, one table and one figure for each swept parameter after."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from . import assets, plots, runs
from .config import require

FOLDER = "sweep"
SHOWN = ("nmse/", "perplexity/", "accuracy/", "seconds/prune")
"Beginnings of the measurements that are drawn; a notebook that has none of them shows its first ones."
PANELS = 4
SEED = "seed"


def grid(words: Sequence[str]) -> dict[str, list[Any]]:
    """What `criterion=wanda,sparsegpt seed=0,1` asks for; a value is TOML, a bare word stands for itself, and brackets around all are allowed.

    Raises:
        ConfigError: a word is not NAME=VALUES.
    """
    found: dict[str, list[Any]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        require(equals == "=" and name.isidentifier() and text.strip() != "", "grid", word, "NAME=VALUES, such as criterion=wanda,sparsegpt")
        whole = _toml(text)
        values = whole if isinstance(whole, list) else [_toml(part.strip()) for part in text.strip().removeprefix("[").removesuffix("]").split(",")]
        require(len(values) > 0 and "" not in values, name, text, "one value or more, and none of them empty")
        require(name not in found, "grid", word, "given once for each parameter")
        found[name] = values
    return found


def _toml(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def manifest(notebook: str, asked: Mapping[str, Sequence[Any]], minutes: float) -> str:
    """The [[run]] tables of every combination, as TOML."""
    parts = []
    for values in itertools.product(*asked.values()):
        chosen = dict(zip(asked, values, strict=True))
        name = "-".join(_short(key, value) for key, value in chosen.items())
        lines = [f"{key} = {_written(value)}" for key, value in chosen.items()]
        parts.append("\n".join(["[[run]]", f'notebook = "{notebook}"', f'name = "{name}"', f"minutes = {minutes:g}", "[run.parameters]", *lines]))
    return "\n\n".join(parts) + "\n"


def _short(name: str, value: Any) -> str:
    text = re.sub(r"[^A-Za-z0-9._+-]+", "-", ("" if isinstance(value, str) else name) + str(value)).strip("-")
    return re.sub(r"^[^A-Za-z0-9]+", "", text) or name


def _written(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # nan and inf in TOML
    return json.dumps(value, ensure_ascii=False)  # strings, numbers, booleans and lists of them are the same in TOML


def tables(entries: Sequence[Any], folder: Path) -> dict[str, tuple[list[str], pd.DataFrame]]:
    """For each notebook that ran several times: the parameters that differ, and a row a run with these and all its numbers.

    Runs that are no whole grid of what differs are no sweep: two scales of one notebook in a suite, say.

    Args:
        entries: of a suite, with name, notebook and parameters.
        folder: of that suite.
    """
    found = {}
    by_notebook: dict[Path, list[Any]] = {}
    for e in entries:
        by_notebook.setdefault(e.notebook.resolve(), []).append(e)
    for notebook, some in by_notebook.items():
        texts = pd.DataFrame([{k: _written(v) for k, v in e.parameters.items()} for e in some])
        swept = [name for name in texts if texts[name].nunique() > 1]
        whole = math.prod(texts[name].nunique() for name in swept) == len(texts[swept].drop_duplicates())
        rows = [{"run": e.name, **{n: _plain(e.parameters[n]) for n in swept}, **(runs.saved(folder / e.name / "metrics.json") or {})} for e in some]
        if swept and whole:
            found[notebook.stem] = (swept, pd.DataFrame(rows))
    return found


def _plain(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def write(entries: Sequence[Any], folder: Path) -> str:
    """Write `sweep/<notebook>.csv` and `sweep/<notebook>-<parameter>.png`, .svg and .csv; returns their section of the index, "" without a sweep."""
    parts = []
    for stem, (swept, table) in tables(entries, folder).items():
        there = folder / FOLDER
        with assets.writing(there / f"{stem}.csv") as partial:
            table.to_csv(partial, index=False)
        known = [c for c in table.columns.drop(["run", *swept]) if table[c].notna().any()]
        main = [c for c in known if c.startswith(SHOWN) and not c.startswith("perplexity/dense")]
        measures = (main or known)[:PANELS]
        pictures = ""
        for name in swept if measures else []:
            others = table[[s for s in swept if s not in (name, SEED)]]  # runs of several seeds share a place, and a mean
            by = others.astype(str).agg(", ".join, axis=1) if len(others.columns) else pd.Series("all runs", index=table.index)
            axes = plots.swept(table.assign(others=by), name, measures, "others")
            plots.save(axes, f"{stem}-{name}", table[["run", *swept, *measures]], there)
            plots.close(axes)
            file = f"{FOLDER}/figures/{stem}-{name}"
            pictures += f'<a href="{file}.svg"><img src="{file}.png" alt="{html.escape(f"{stem} by {name}")}"></a>'
        shown = table[["run", *swept, *measures]].to_html(index=False, border=0, escape=True, na_rep="", float_format="{:.5g}".format)
        said = f"By {', '.join(swept)}; the first {len(measures)} of {len(known)} measurements. All: {FOLDER}/{stem}.csv."
        parts.append(f"<h2>Sweep of {html.escape(stem)}</h2><p>{html.escape(said)}</p><div>{pictures}</div>{shown}")
    return "\n".join(parts)

"""Versions side by side: what changed on every test set, the error block by block, and where they begin to write something else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import pandas as pd

from . import plots, report, versions
from .runs import Run

ANSWERED = ("perplexity", "accuracy")
KINDS = (*ANSWERED, "nmse", "token_nmse", "token_nmse_90")
COLUMNS = ["version", "kind", "set", "value", "other", "change", "low", "high", "n", "paired", "said"]


@dataclass(frozen=True)
class Fork:
    """What two versions write from one prompt."""

    prompt: str
    common: list[str]
    "Texts of the tokens that both write first."
    first: list[str]
    "What the first version goes on with."
    second: list[str]

    @property
    def at(self) -> int | None:
        """The number of the first token that differs, from 0; None where none does."""
        return len(self.common) if self.first or self.second else None


def name(run: Run) -> str:
    return run.config.tag or run.id


def table(others: Sequence[Run], against: Run) -> pd.DataFrame:
    """What changed from `against` to each of the others on every test set that both answered.

    Returns:
        version, kind (perplexity, accuracy, nmse, token_nmse, token_nmse_90), set, value, other, change (a difference for accuracies,
        else a share), low, high (95 %; none for errors), n (articles, texts or items that the interval is over), paired (both answered
        the same items), said ("better", "worse", "within noise"). All is about these versions: of a technique, only several
        calibration seeds tell (`statistics.ratio`).
    """
    known = {(row["metric"], row["test_set"]): row for row in versions.measurements(against)}
    rows = []
    for run in others:
        for row in versions.measurements(run):
            other = known.get((row["metric"], row["test_set"]))
            if row["metric"] not in KINDS or other is None or row["test_set"].endswith(" (acc_norm)"):
                continue
            found = versions.change(row, other)
            said = _said(found.value, found.low, found.high, row["direction"])
            about = (name(run), row["metric"], row["test_set"], row["value"], other["value"])
            rows.append((*about, found.value, found.low, found.high, found.n, found.paired, said))
    return pd.DataFrame(rows, columns=COLUMNS).astype({"low": float, "high": float, "n": float})


def _said(change: float, low: float | None, high: float | None, direction: str) -> str:
    """Without an interval any change counts."""
    low, high = (change, change) if low is None else (low, high)
    if low <= 0 <= high or change != change:
        return "within noise" if change else "same"
    return "better" if (change < 0) == (direction == "lower") else "worse"


def notes(found: pd.DataFrame, others: Sequence[Run], against: Run) -> list[str]:
    """What to know before reading the table that was `found`."""
    said = []
    for run in others:
        if run.config.model != against.config.model:
            said.append(f"{name(run)} is of {run.config.model}, {name(against)} of {against.config.model}: only what both answered compares.")
    unpaired = found[~found.paired & found.kind.isin(ANSWERED)]
    if len(unpaired):
        sets = ", ".join(dict.fromkeys(unpaired.set))
        said.append(f"Other items were answered on {sets}: the intervals are Welch's, of both standard errors, and wide.")
    return said


def fork(first: dict[str, Any], second: dict[str, Any]) -> Fork:
    """Two records of `evaluation.generations` from one prompt."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first["tokens"], second["tokens"], strict=False)))
    return Fork(first["prompt"], first["pieces"][:same], first["pieces"][same:], second["pieces"][same:])


def generations(first: Run, second: Run) -> list[Fork]:
    """What two versions write from the prompts that both were given; empty where none was (`evaluate` with generations)."""
    known = {row["prompt"]: row for row in second.record["evaluation"].get("generations") or []}
    rows = first.record["evaluation"].get("generations") or []
    return [fork(row, known[row["prompt"]]) for row in rows if row["prompt"] in known]


def visible(text: str) -> str:
    """With its line ends seen."""
    return text.replace("\n", "⏎").replace("\t", "⇥")


def text(forks: Sequence[Fork], first: str, second: str) -> str:
    """The generations in the terminal; the first token that differs stands between » and «."""
    parts = []
    for found in forks:
        at = "the same" if found.at is None else f"the same for {found.at} tokens"
        parts.append(f"{visible(found.prompt)} …  ({at})")
        for word, own in ((first, found.first), (second, found.second)):
            marked = f"»{own[0]}«{''.join(own[1:])}" if own else ""
            parts.append(f"  {word}: {visible(''.join(found.common) + marked)}")
    return "\n".join(parts)


class Generations:
    """The generations of two versions in a notebook or a page, with the first token that differs marked."""

    def __init__(self, first: Run, second: Run) -> None:
        self.names, self.forks = (name(first), name(second)), generations(first, second)

    def _repr_html_(self) -> str:
        rows = []
        for found in self.forks:
            cells = [f"<em>{_escaped(found.prompt)}</em>"]
            for own in (found.first, found.second):
                marked = f"<mark>{_escaped(own[0])}</mark>{_escaped(''.join(own[1:]))}" if own else ""
                cells.append(_escaped("".join(found.common)) + marked)
            look = "text-align:left;vertical-align:top;white-space:normal"
            rows.append("<tr>" + "".join(f'<td style="{look}">{cell}</td>' for cell in cells) + "</tr>")
        head = "".join(f"<th>{html.escape(word)}</th>" for word in ("prompt", *self.names))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"

    def __repr__(self) -> str:
        return text(self.forks, *self.names)


def _escaped(part: str) -> str:
    return html.escape(visible(part))


def overlay(runs: Sequence[Run]) -> Any:
    """The NMSE after each block on the calibration samples, a line a version."""
    errors = pd.concat([run.errors[run.errors.source == "calibration"].assign(version=name(run)) for run in runs])
    return plots.error_by_block(errors, by="version")


def _shown(found: pd.DataFrame, against: Run) -> pd.DataFrame:
    """The table as it is read, changes and their intervals as text."""
    change = [report.changed(*row) for row in found[["kind", "change", "low", "high", "n"]].itertuples(index=False)]
    shown = found.assign(change=change)[["version", "kind", "set", "other", "value", "change", "paired", "said"]]
    return shown.rename(columns={"other": name(against)})


def in_terminal(found: pd.DataFrame, others: Sequence[Run], against: Run) -> str:
    """The table that was `found`, what to know of it, and where the versions begin to write something else."""
    parts = [report.text_table(_shown(found, against).drop(columns="paired")) if len(found) else "They answered no test set in common."]
    parts += notes(found, others, against)
    parts += [text(forks, name(against), name(run)) for run in others if (forks := generations(against, run))]
    return "\n\n".join(parts)


def page(found: pd.DataFrame, others: Sequence[Run], against: Run) -> str:
    """One self-contained HTML page of the table that was `found`, pictures, generations; every text of a run is escaped."""
    body = _shown(found, against).to_html(index=False, escape=True, border=0, na_rep="", float_format="{:.4g}".format)
    drawn = [plots.differences(found)[0]] if len(found) else []  # of whose figure all panels are
    pruned = [run for run in (*others, against) if len(run.errors)]
    pictures = [plots.as_svg(axes) for axes in (*drawn, *([overlay(pruned)] if pruned else []))]
    both = {name(run): Generations(against, run) for run in others}
    written = [f"<h2>{html.escape(called)}</h2>{pair._repr_html_()}" for called, pair in both.items() if pair.forks]
    title = html.escape(f"{', '.join(map(name, others))} against {name(against)}")
    said = "".join(f"<p>{html.escape(note)}</p>" for note in notes(found, others, against))
    figures = "".join(f"<figure>{picture}</figure>" for picture in pictures)
    return PAGE.format(title=title, notes=said, table=body, figures=figures, generations="".join(written))


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>reconkit: {title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 75rem; padding: 0 1rem; color: #222; background: #fff; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }}
th, td {{ padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left; }}
figure {{ margin: 1.5rem 0; }} figure svg {{ max-width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
{notes}
<div class="wide">{table}</div>
{figures}
<div class="wide">{generations}</div>
</body>
</html>
"""

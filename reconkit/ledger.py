"""The paper's claims, each beside what the notebooks of a suite measured. Tables only; `suite` writes them."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from . import paper, runs

COLUMNS = ["number", "claim", "places", "published", "run", "here", "expected here", "measured", "holds", "why"]


def collect(folder: Path, names: Iterable[str]) -> pd.DataFrame:
    """One row for each claim of a notebook that answers a claim of the paper, in the paper's order; a claim nobody answered has one empty row.

    Args:
        folder: of a suite; its runs wrote `claims.json` by `runs.save_claims`.
        names: of these runs, in their order.

    Returns:
        number, claim, places, published: the paper's; run, here (the claim as the notebook has it), expected here, measured,
        holds ("yes", "no", "" where nothing was run) and why, the reason where it does not hold.
    """
    rows = []
    for name in names:
        for row in runs.saved(folder / name / "claims.json") or []:
            if row.get("of"):
                told = {key: row.get(key, "") for key in ("expected here", "measured", "holds", "why")}
                rows.append({"number": int(row["of"]), "run": name, "here": row["claim"], **told})
    own = pd.DataFrame(rows, columns=["number", *COLUMNS[4:]])
    return paper.table("claims").merge(own, on="number", how="left").fillna("")[COLUMNS]


def verdict(rows: pd.DataFrame) -> str:
    """Of the rows of one claim: "holds here", "holds in part", "not shown here" or "not run".

    What a small run does not show is not refuted by it, and what one shows holds for its model.
    """
    said = set(rows.holds) - {""}
    return {frozenset(): "not run", frozenset({"yes"}): "holds here", frozenset({"no"}): "not shown here"}.get(frozenset(said), "holds in part")


def as_html(table: pd.DataFrame) -> str:
    """A section for the index of a suite."""
    parts = []
    for (number, claim), rows in table.groupby(["number", "claim"], sort=False):
        first = rows.iloc[0]
        lines = "".join(
            f"<tr><td><a href='{html.escape(r.run)}/notebook.ipynb'>{html.escape(r.run)}</a></td>"
            + "".join(f"<td>{html.escape(r[name])}</td>" for name in ("here", "expected here", "measured", "holds", "why"))
            + "</tr>"
            for _, r in rows[rows.run != ""].iterrows()
        )
        head = "<tr><th>notebook</th><th>claim here</th><th>expected here</th><th>measured</th><th>holds</th><th>why not</th></tr>"
        parts.append(
            f"<h3>{number}. {html.escape(claim)}: {verdict(rows)}</h3><p>Published ({html.escape(first.places)}): {html.escape(first.published)}.</p>"
            + (f"<table>{head}{lines}</table>" if lines else "")
        )
    return "<h2>What the paper claims</h2>" + "".join(parts)


def as_markdown(table: pd.DataFrame, home: str) -> str:
    """A table for a page on a repository: one row a claim of the paper.

    Args:
        home: relative address of the folder with the published runs.
    """
    lines = ["| | the paper claims | published | measured here | |", "|---|---|---|---|---|"]
    for (number, claim), rows in table.groupby(["number", "claim"], sort=False):
        found = "<br>".join(
            f"{'✓' if r.holds == 'yes' else '✗'} {r.here}: {r.measured} ([{r.run[:2]}]({home}/{r.run}/notebook.ipynb)){f'; {r.why}' if r.why else ''}"
            for _, r in rows[rows.run != ""].iterrows()
        )
        cells = (str(number), claim, f"{rows.iloc[0].published} ({rows.iloc[0].places})", found or "not run yet", f"**{verdict(rows)}**")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def written_into(page: str, name: str, text: str) -> str:
    """The page with `text` between `<!-- ledger of NAME -->` and `<!-- end of ledger -->`; a page without that mark stays as it is."""
    start, end = f"<!-- ledger of {name} -->", "<!-- end of ledger -->"
    before, mark, rest = page.partition(start)
    if not mark or end not in rest:
        return page
    return f"{before}{start}\n\n{text}\n\n{end}{rest.partition(end)[2]}"

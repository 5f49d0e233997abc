"""The paper's claims, each beside what the notebooks of a suite measured. Tables only; `suite` writes them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from . import paper, runs

COLUMNS = ["number", "claim", "places", "published", "run", "here", "expected here", "measured", "holds", "why"]
MARKS = {"yes": "✓", "no": "✗", "not resolvable": "?"}


def error_changes(pairs: Mapping[str, tuple[runs.Run, runs.Run]], source: str = "calibration") -> pd.DataFrame:
    """How the last block's error changes from the first to the second run of each pair, in the paper's measure and over tokens.

    Returns:
        One row a pair, under its name: nmse_before, nmse_after, token_before, token_after (median over tokens), nmse and
        token_nmse (relative changes), agree (whether their signs do not differ).
    """
    rows = {}
    for name, (before, after) in pairs.items():
        a, b = before.final_errors.loc[source], after.final_errors.loc[source]
        nmse, token = b.nmse / a.nmse - 1, b.token_nmse / a.token_nmse - 1
        rows[name] = (a.nmse, b.nmse, a.token_nmse, b.token_nmse, nmse, token, not nmse * token < 0)
    columns = ["nmse_before", "nmse_after", "token_before", "token_after", "nmse", "token_nmse", "agree"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def describe_changes(changes: pd.DataFrame) -> str:
    """`error_changes` as the text of a claim: NMSE and token NMSE, and for which pairs their directions differ."""
    parts = [
        f"{r.Index} {r.nmse_before:.3f} → {r.nmse_after:.3f} (token NMSE {r.token_before:.3f} → {r.token_after:.3f})" for r in changes.itertuples()
    ]
    return "; ".join(parts) + disagreement(changes)


def disagreement(changes: pd.DataFrame) -> str:
    """The end of a text about `error_changes`: for which pairs the directions of the two measures differ; nothing where they agree."""
    apart = " and ".join(changes.index[~changes.agree.astype(bool)])
    return f"; the two measures disagree in direction for {apart}" if apart else ""


def collect(folder: Path, names: Iterable[str]) -> pd.DataFrame:
    """One row for each claim of a notebook that answers a claim of the paper, in the paper's order; a claim nobody answered has one empty row.

    Args:
        folder: of a suite; its runs wrote `claims.json` by `runs.save_claims`.
        names: of these runs, in their order.

    Returns:
        number, claim, places, published: the paper's; run, here (the claim as the notebook has it), expected here, measured,
        holds ("yes", "no", "not resolvable", "" where nothing was run) and why, the reason where it does not hold.
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
    """Of the rows of one claim: "holds here", "holds in part", "not shown here", "not resolvable here" or "not run".

    What a small run does not show is not refuted by it, and what one shows holds for its model.
    """
    said = set(rows.holds) - {""}
    if "yes" in said:
        return "holds here" if said == {"yes"} else "holds in part"
    return "not shown here" if "no" in said else "not resolvable here" if said else "not run"


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
            f"{MARKS[r.holds]} {r.here}: {r.measured} ([{r.run[:2]}]({home}/{r.run}/notebook.ipynb)){f'; {r.why}' if r.why else ''}"
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

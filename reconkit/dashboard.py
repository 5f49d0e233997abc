"""The dashboard: one HTML page of the whole history, which needs no network and no server.

Charts are plotly's and are drawn when they come into view. Tables are plain HTML, which a few lines of script sort and filter. Every text
that comes from a run is escaped.
"""

from __future__ import annotations

import html
import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from . import runs, versions
from .config import ConfigError
from .history import Store
from .plots import COLOURS
from .report import changed, show

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

CHARTS = {
    "perplexity": "Perplexity",
    "accuracy": "Accuracy, zero-shot and cloze",
    "nmse": "Reconstruction error: NMSE after the last block",
    "token_nmse": "Reconstruction error: token NMSE after the last block, median over tokens",
    "token_nmse_90": "Reconstruction error: token NMSE after the last block, 90th percentile over tokens",
    "error ratio": "Error ratio: held-out over calibration NMSE",
    "token error ratio": "Error ratio by token NMSE: held-out over calibration",
    "seconds": "Time to prune and to evaluate, in seconds",
    "speed": "Speed of generation",
    "memory": "Peak memory, in bytes",
    "size": "Size",
    "money": "Cost, in money",
    "joules": "Energy, in joules",
}
"Trends in this order, where the history has them."
OTHER = COLOURS[-1]
SHOWN = 6  # versions of which the error by block is drawn at once
KEPT = 40  # and that can be chosen
MEASURED = 16  # measurements in the table of versions, which should filter at once
FACTS = ("name", "technique", "criterion", "pattern", "sparsity", "model", "parent", "verdict", "created")
PLACES = ("name", "version", "commit", "hardware", "python", "torch", "transformers", "system")


def report(out: str | Path) -> Path | None:
    """Write the page of the whole history.

    Args:
        out: the file; its folder is made where it is missing.

    Returns:
        The file, or None where no version is recorded yet (then nothing is written).

    Raises:
        ConfigError: plotly is not installed.
    """
    with runs.open_history() as store:
        if store.versions().empty:
            return None
        text = page(store)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def page(store: Store) -> str:
    """The page of a history that is not empty.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError("The dashboard's charts are made with plotly, which is not installed; install it with: pip install plotly") from None
    known, rows, alerts = store.versions(), store.measurements(), store.alerts()
    names = dict(zip(known.version, known["name"], strict=True))  # a version that was measured again keeps its name
    known["parent"] = known.parent.map(names).fillna(known.parent)
    newest = known.iloc[-1]
    beside = _beside(known, rows)
    charts = {title: figure for title, figure in _charts(known, rows, store) if figure is not None}
    sections = [_section(f"chart-{i}", title, f'<div class="chart" data-figure="{i}"></div>') for i, title in enumerate(charts)]
    data = json.dumps([json.loads(figure.to_json()) for figure in charts.values()]).replace("</", "<\\/")
    tables = [
        _section("alerts", "Alerts", _alerts(alerts)),
        _section("comparison", f"{newest['name']} beside others", _table(beside, "comparison")),
        _section("versions", "Versions", _table(_versions(known, rows, alerts), "versions")),
        _section("environment", "Where they were made", _table(_environments(known), "environment")),
    ]
    title = f"{len(known)} versions of {', '.join(dict.fromkeys(known.model.astype(str)))}"
    parts = {
        "title": html.escape(title),
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "tiles": _tiles(newest, rows[rows.number == newest.number], alerts, beside),
        "first": tables[0] + tables[1],
        "charts": "\n".join(sections),
        "last": tables[2] + tables[3],
        "data": data,
        "plotly": get_plotlyjs(),
    }
    text = PAGE
    for name, value in parts.items():  # one by one: the values hold braces
        text = text.replace(f"@{name}@", value, 2 if name == "title" else 1)
    return text


def _section(anchor: str, title: str, body: str) -> str:
    return f'<section id="{anchor}"><h2>{html.escape(title)}</h2>{body}</section>'


def _charts(known: pd.DataFrame, rows: pd.DataFrame, store: Store) -> Iterable[tuple[str, Figure | None]]:
    for metric, title in CHARTS.items():
        part = rows[(rows.metric == metric) & rows.value.notna()].groupby("test_set").filter(lambda one: one.value.any())
        yield title, _trend(known, part, metric in versions.HARDWARE) if len(part) else None
    yield "Error after each block", _blocks(known, store)
    quality = next(iter(sorted(rows[rows.metric == "perplexity"].test_set.unique(), key="wiki".__ne__)), None)
    if quality is not None:
        yield f"Quality against cost: perplexity on {quality}, seconds to prune", _front(known, rows, f"perplexity/{quality}", "seconds/prune")


def _figure(x: str, y: str) -> Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        template="none", margin={"l": 60, "r": 10, "t": 10, "b": 50}, hovermode="closest",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}, showlegend=True,
        xaxis={"title": {"text": x}, "automargin": True}, yaxis={"title": {"text": y}, "automargin": True},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"size": 13},
    )  # fmt: skip
    return figure


def _trend(known: pd.DataFrame, rows: pd.DataFrame, by_hardware: bool) -> Figure:
    """A measurement of every version in the order of recording: a line a test set, model and, for times, class of hardware."""
    facts = known.set_index("number")
    rows = rows.assign(where=rows.number.map(facts.hardware) if by_hardware else "", model=rows.number.map(facts.model))
    models = rows.model.nunique() > 1
    figure = _figure("version, in the order of recording", "")
    for i, ((test_set, model, where), part) in enumerate(rows.groupby(["test_set", "model", "where"], sort=False, dropna=False)):
        said = [text for text in (test_set, model if models else "", where) if isinstance(text, str) and text]
        own = facts.loc[part.number]
        told = [
            f"{_safe(name)}<br>{created}<br>commit {_safe(commit) if commit else 'unknown'}" + (f"<br>n = {n:.0f}" if n == n else "")
            for name, created, commit, n in zip(own["name"], own.created, own.commit, part.n.astype(float), strict=True)
        ]
        interval = part.low.notna() & part.high.notna()
        spread = {"type": "data", "symmetric": False, "array": (part.high - part.value).where(interval), "thickness": 1, "width": 2}
        figure.add_scatter(
            x=part.number, y=part.value, name=_safe(", ".join(said)), mode="lines+markers", hovertext=told, hoverinfo="text+y+name",
            line={"color": COLOURS[i % 7], "dash": ("solid", "dash", "dot")[i // 7 % 3]}, marker={"size": 6},
            error_y={**spread, "arrayminus": (part.value - part.low).where(interval)} if interval.any() else None,
        )  # fmt: skip
    few = known if len(known) <= 12 else known.iloc[:: -(-len(known) // 12)]
    figure.update_xaxes(tickvals=few.number, ticktext=[_safe(_short(name)) for name in few["name"]])
    return figure


def _blocks(known: pd.DataFrame, store: Store) -> Figure | None:
    """NMSE after each block; the newest versions are drawn, others can be chosen in the legend."""
    pruned = known[known.technique != "dense"].drop_duplicates("version", keep="last")
    wanted = pruned.tail(KEPT)
    blocks = store.blocks(wanted.number)
    if blocks.empty:
        return None
    first = {newest := wanted.number.iloc[-1], *wanted.number.tail(SHOWN)}
    first |= set(wanted[wanted["name"] == wanted.set_index("number").parent[newest]].number)
    figure = _figure("block", "NMSE (share of the dense stream)")
    names = wanted.set_index("number")["name"]
    for i, (number, part) in enumerate(reversed(list(blocks.groupby("number")))):
        for source, line in part.groupby("source", sort=False):
            shown = number in first and (source == "calibration" or number == newest)
            figure.add_scatter(
                x=line.block, y=line.nmse, name=_safe(f"{_short(names[number])}, {source}"), visible=True if shown else "legendonly",
                mode="lines", line={"color": COLOURS[i % 7], "dash": "solid" if source == "calibration" else "dot"},
            )  # fmt: skip
    figure.update_yaxes(type="log")
    return figure


def _front(known: pd.DataFrame, rows: pd.DataFrame, quality: str, cost: str) -> Figure | None:
    """Every pruned version at its cost and quality; those that no other one beats are joined."""
    chosen = known[known.technique != "dense"].drop_duplicates("version", keep="last").set_index("number")
    chosen = chosen.join(versions.columns(rows).reindex(columns=[quality, cost])).dropna(subset=[quality, cost])
    if len(chosen) < 2:
        return None
    best = versions.front(chosen, quality, cost)
    figure = _figure(cost, quality)
    for part, name, colour in ((chosen[~best], "beaten by another", OTHER), (chosen[best].sort_values(cost), "beaten by none", COLOURS[2])):
        figure.add_scatter(
            x=part[cost], y=part[quality], name=name, mode="markers" if colour == OTHER else "lines+markers", marker={"size": 9, "color": colour},
            line={"shape": "hv", "color": colour}, hoverinfo="text+x+y",
            hovertext=[_safe(f"{r['name']}: {r.criterion}, {r.technique}, {r.pattern}, sparsity {show(r.sparsity)}") for _, r in part.iterrows()],
        )  # fmt: skip
    return figure


def _safe(text: Any) -> str:
    """For plotly, which reads some markup in its texts."""
    return html.escape(str(text))


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"


def _tiles(newest: pd.Series, own: pd.DataFrame, alerts: pd.DataFrame, beside: pd.DataFrame) -> str:
    """The newest version in a few figures."""
    fired = alerts[alerts.number == newest.number].severity.value_counts()
    count = {word: f"{n} {word}{'s' * (n != 1)}" for word in ("error", "warning") for n in [int(fired.get(word, 0))]}
    tiles = [("newest version", newest["name"], f"{show(newest.technique)} {show(newest.criterion)}".strip())]
    tiles.append(("verdict", show(newest.verdict) or "not pruned", ""))
    tiles.append(("alerts", count["error"], count["warning"]))
    for metric, test_set in (("perplexity", None), ("accuracy", None), ("nmse", "calibration"), ("error ratio", None), ("seconds", "prune")):
        part = own[(own.metric == metric) & ((own.test_set == test_set) if test_set else True)]
        if len(part):
            name = versions.name_of(metric, part.test_set.iloc[0])
            changes = beside[beside.measurement == name].iloc[0].drop(["measurement", "value"])
            tiles.append((name, show(part.value.iloc[0]), next((f"{change} {against}" for against, change in changes.items() if change), "")))
    cell = '<div class="tile"><div class="what">{}</div><div class="value">{}</div><div class="beside">{}</div></div>'
    return "\n".join(cell.format(*map(html.escape, map(str, tile))) for tile in tiles)


def _beside(known: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The newest version's measurements, and how each differs from its parent's and the dense model's, with the 95 % interval."""
    newest = known.iloc[-1]
    earlier = known.iloc[:-1][known.iloc[:-1].model == newest.model]
    others = {"its parent": earlier[earlier["name"] == newest.parent], "dense": earlier[earlier.technique == "dense"]}
    own = rows[rows.number == newest.number]
    named = [versions.name_of(*pair) for pair in zip(own.metric, own.test_set, strict=True)]
    table = pd.DataFrame({"measurement": named, "value": own.value.tolist()})
    for word, part in others.items():
        if part.empty:
            continue
        other = part.iloc[-1]
        same = rows[rows.number == other.number].set_index(["metric", "test_set"])
        column = []
        for row in own.to_dict("records"):
            place = (row["metric"], row["test_set"])
            elsewhere = row["metric"] in versions.HARDWARE and other.hardware != newest.hardware
            there = same.loc[place].to_dict() if place in same.index and not elsewhere else {"value": math.nan}
            both = math.isfinite(row["value"]) and math.isfinite(there["value"])
            found = versions.change(row, there) if both else None
            column.append(changed(row["metric"], found.value, found.low, found.high, found.n) if found else "")
        table[f"against {word}" + (f" ({other['name']})" if other["name"] != word else "")] = column
    return table


def _versions(known: pd.DataFrame, rows: pd.DataFrame, alerts: pd.DataFrame) -> pd.DataFrame:
    """Newest first: how each was made and the main measurements; `reconkit runs export` has all."""
    wide = versions.columns(rows)
    main = sorted((name for name in wide if versions.split(name)[0] in CHARTS), key=lambda name: list(CHARTS).index(versions.split(name)[0]))
    wide = wide[main[:MEASURED]]
    fired = alerts.groupby("number").size() if len(alerts) else pd.Series(dtype=int)
    table = known.set_index("number")[list(FACTS)].assign(alerts=fired).join(wide)
    return table.iloc[::-1].dropna(axis="columns", how="all")


def _environments(known: pd.DataFrame) -> pd.DataFrame:
    told = pd.DataFrame([json.loads(text) if isinstance(text, str) else {} for text in known.environment])
    table = pd.concat([known.reset_index(drop=True), told.drop(columns=[c for c in told if c in known])], axis="columns")
    return table[[c for c in PLACES if c in table]].iloc[::-1]


def _alerts(alerts: pd.DataFrame) -> str:
    if alerts.empty:
        return "<p>No alert fired. <code>reconkit runs check</code> holds the newest version against papermill_runs/alerts.toml.</p>"
    table = alerts.iloc[::-1][["severity", "name", "rule", "message", "created"]].rename(columns={"name": "version"})
    return _table(table, "alerts")


def _table(table: pd.DataFrame, name: str) -> str:
    """A table whose columns sort, with a box that filters its rows."""
    head = "".join(f'<th scope="col"><button type="button">{html.escape(str(column))}</button></th>' for column in table.columns)
    body = "\n".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in table.itertuples(index=False, name=None))
    box = f'<label class="filter">filter <input type="search" aria-label="filter the table of {html.escape(name)}"> <output></output></label>'
    return f'{box}<div class="wide"><table id="table-{name}"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _cell(value: Any) -> str:
    """Numbers keep their exact value for sorting."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and value != value:
        return "<td></td>"
    return f'<td class="number" data-value="{value!r}">{show(value)}</td>' if number else f"<td>{html.escape(show(value))}</td>"


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>reconkit: @title@</title>
<style>
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ddd; --soft: #f4f4f4; --quiet: #666; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --line: #3a3a3a; --soft: #222; --quiet: #aaa; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 90rem; color: var(--ink); background: var(--paper); }
body { overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; } h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
.quiet, .beside, .what { color: var(--quiet); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 0.6rem; }
.tile { background: var(--soft); border-radius: 0.4rem; padding: 0.6rem 0.8rem; overflow-wrap: anywhere; }
.tile .value { font-size: 1.35rem; } .what, .beside { font-size: 0.85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); gap: 0 2rem; }
.charts section { min-width: 0; } .chart { height: 22rem; overflow: hidden; }
.wide { overflow: auto; max-height: 32rem; border: 1px solid var(--line); }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
td, th { overflow-wrap: normal; padding: 0.2rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
td.number { text-align: right; }
#table-alerts td, #table-environment td { white-space: normal; }
th { position: sticky; top: 0; background: var(--soft); padding: 0; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0.2rem 0.6rem; cursor: pointer; }
th button { width: 100%; text-align: left; }
th[aria-sort=ascending] button::after { content: " \\2191"; } th[aria-sort=descending] button::after { content: " \\2193"; }
.filter { display: block; margin: 0.3rem 0; } .filter input { font: inherit; width: min(20rem, 60vw); }
nav a { margin-right: 1rem; }
@media print {
  .filter, nav { display: none; } .wide { overflow: visible; max-height: none; border: 0; } table { font-size: 0.6rem; }
  td, th, th button { white-space: normal; overflow-wrap: anywhere; padding: 0.1rem 0.2rem; } .charts { display: block; }
  #table-versions :is(td, th):nth-child(n + 15) { display: none; } h2 { break-after: avoid-page; }
  section { break-inside: avoid-page; } #versions, #comparison, #alerts, #environment { break-inside: auto; }
}
</style>
</head>
<body>
<h1>@title@</h1>
<p class="quiet">As of @made@. Lower is better for perplexity, errors, error ratios, times and memory; higher for accuracy. Times and memory compare
only on one class of hardware. Bars are 95 % intervals.</p>
<nav><a href="#alerts">alerts</a><a href="#comparison">newest</a><a href="#charts">trends</a><a href="#versions">versions</a>
<a href="#environment">environment</a></nav>
<div class="tiles">
@tiles@
</div>
@first@
<div id="charts" class="charts">
@charts@
</div>
@last@
<script type="application/json" id="data">@data@</script>
<script>@plotly@</script>
<script>
"use strict";
const figures = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
function draw(place) {
  if (place.dataset.drawn) return;
  place.dataset.drawn = "yes";
  const figure = figures[place.dataset.figure], ink = dark.matches ? "#e6e6e6" : "#222", line = dark.matches ? "#3a3a3a" : "#ddd";
  const layout = Object.assign({}, figure.layout, {font: {size: 13, color: ink}});
  for (const axis of ["xaxis", "yaxis"]) layout[axis] = Object.assign({}, layout[axis], {gridcolor: line, linecolor: line, zeroline: false});
  Plotly.newPlot(place, figure.data, layout, {responsive: true, displayModeBar: false});
}
const charts = Array.from(document.querySelectorAll(".chart"));
const near = new IntersectionObserver(seen => seen.forEach(s => { if (s.isIntersecting) draw(s.target); }), {rootMargin: "300px"});
charts.forEach(chart => near.observe(chart));
window.addEventListener("beforeprint", () => charts.forEach(draw));
function key(cell) {
  return cell.dataset.value === undefined ? cell.textContent.toLowerCase() : Number(cell.dataset.value);
}
function order(a, b) {
  if (a === "" || b === "") return a === b ? 0 : a === "" ? 1 : -1;
  if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
  return typeof a === "number" ? -1 : 1;
}
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = Array.from(table.tHead.rows[0].cells), rows = Array.from(body.rows);
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keyed = rows.map(row => [key(row.cells[column]), row]);
    keyed.sort((a, b) => (a[0] === "" || b[0] === "") ? order(a[0], b[0]) : down ? order(b[0], a[0]) : order(a[0], b[0]));
    body.append(...keyed.map(pair => pair[1]));
  }));
  const box = table.closest("section").querySelector("input"), said = table.closest("section").querySelector("output");
  let texts = null;
  box.addEventListener("input", () => {
    texts = texts || rows.map(row => row.textContent.toLowerCase());
    const words = box.value.toLowerCase().split(" ").filter(Boolean);
    let left = 0;
    rows.forEach((row, i) => { const fits = words.every(word => texts[i].includes(word)); row.hidden = !fits; left += fits; });
    said.textContent = words.length ? left + " of " + rows.length : "";
  });
}
</script>
</body>
</html>
"""

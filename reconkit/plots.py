"""One function a figure, `(data) -> Axes`. The only room that knows matplotlib and seaborn.

A word has one colour in every figure. The colours stay apart for colour-blind readers and, being evenly spaced in
lightness, in grey print; markers and dashes say the same once more.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

COLOURS = ("#E69F00", "#009E73", "#0072B2", "#882255", "#CC79A7", "#56B4E9", "#767676")
"Okabe and Ito's hues and two of Tol's; lightness of the first four falls from 70 to 30."
INK = "#222222"
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), "-")
ORDER = {
    "technique": ("LR", "BR", "BR+GP", "BR+GP+CR", "BR+CR", "wide windows"),
    "criterion": ("magnitude", "wanda", "sparsegpt"),
    "source": ("calibration", "extra", "wiki", "news", "pydocs", "self"),
    "arm": ("alone", "equal steps", "self-generated", "more real text"),
    "layers": ("attention", "feed-forward", "all"),
}
"What a word's colour is counted from; words that are not here follow in their order of appearance."
NAMES = {
    "block": "block",
    "nmse": "NMSE (share of the dense stream)",
    "mse": "MSE (mean square per scalar)",
    "token_nmse": "Token NMSE, median over tokens",
    "token_nmse_90": "Token NMSE, 90th percentile over tokens",
    "sparsity": "sparsity (share of weights that are zero)",
    "epoch": "epoch",
    "loss": "loss (MSE against the target)",
    "value": "perplexity",
    "ratio": "error ratio (held-out NMSE / calibration NMSE)",
    "token_ratio": "error ratio (held-out / calibration token NMSE, medians)",
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "wiki": "wiki (calibration's domain)",
    "self": "self (its own text)",
}
WIDTH, HEIGHT = 4.2, 3.0  # inches of one panel
GAP = 11.0  # points between two names of ends
_ENDS: WeakKeyDictionary[Axes, tuple[int, list[Any]]] = WeakKeyDictionary()  # of each axes, to which side they are written, and the names
LEGEND = 48  # letters of a legend's row, marks included: a wider one would push its panel aside

plt.rcParams.update(
    {
        "figure.dpi": 110,
        "savefig.dpi": 160,
        "savefig.bbox": "tight",
        "svg.hashsalt": "reconkit",
        "svg.fonttype": "none",
        "font.size": 9.5,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK,
        "axes.grid": True,
        "grid.color": "#e5e5e5",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5,
    }
)


def save(figure: Axes | Figure | np.ndarray, name: str, data: pd.DataFrame | Mapping[str, Any], out_dir: str | Path) -> None:
    """Write `figures/<name>.png`, `.svg` and what was drawn as `data/<name>.csv` under `out_dir`; "" writes nothing."""
    canvas = figure if isinstance(figure, Figure) else np.ravel(figure)[0].get_figure()
    _spread(canvas)  # limits and labels may have been set since
    if not str(out_dir):
        return
    for kind in ("figures", "data"):
        (Path(out_dir) / kind).mkdir(parents=True, exist_ok=True)
    canvas.savefig(Path(out_dir) / "figures" / f"{name}.png")
    canvas.savefig(Path(out_dir) / "figures" / f"{name}.svg", metadata={"Date": None})
    pd.DataFrame(data).to_csv(Path(out_dir) / "data" / f"{name}.csv", index=False)


def close(figure: Axes | Figure | np.ndarray) -> None:
    """Forget a figure that was saved; only notebooks show them."""
    plt.close(figure if isinstance(figure, Figure) else np.ravel(figure)[0].get_figure())


def as_svg(ax: Axes) -> str:
    """The figure of `ax` as an <svg> element, for a page that needs no other file."""
    out = io.StringIO()
    ax.get_figure().savefig(out, format="svg", metadata={"Date": None})
    plt.close(ax.get_figure())
    return out.getvalue()[out.getvalue().index("<svg") :]


def as_png(figure: Figure) -> bytes:
    """The figure as a PNG; it is closed."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    plt.close(figure)
    return picture.getvalue()


def looks(by: str, words: Sequence[Any]) -> dict[Any, dict[str, Any]]:
    """Colour, marker and dash of each word, the same in every figure."""
    known = [*ORDER.get(by, ()), *(w for w in words if w not in ORDER.get(by, ()))]
    return {w: {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "linestyle": DASHES[i % 7]} for i, w in enumerate(known) if w in words}


def lines(data: pd.DataFrame, x: str, y: str, by: str, *, ax: Axes | None = None, log: bool = True, labels: bool = True, title: str = "") -> Axes:
    """One line for each word in `by`, labelled where it ends.

    Args:
        data: one row a point, with the columns `x`, `y`, `by`.
    """
    ax = ax or _panels(1)[0]
    ends = []
    for word, look in looks(by, list(data[by].unique())).items():
        part = data[data[by] == word].sort_values(x)
        ax.plot(part[x], part[y], **look, markevery=max(1, len(part) // 8))
        ends.append((float(part[x].iloc[-1]), float(part[y].iloc[-1]), NAMES.get(word, str(word)).split(" (")[0], look["color"]))
    _axes(ax, x, y, log)
    if title:
        ax.set_title(title)
    if labels:
        _label_ends(ax, ends)
    return ax


def line_panels(data: pd.DataFrame, x: str, y: str, by: str, panels: str, *, log: bool = True) -> np.ndarray:
    """`lines` once for each word in the column `panels`, on a shared y axis; returns the axes."""
    words = _sorted(panels, data[panels].unique())
    axes = _panels(len(words), sharey=True)
    for ax, word in zip(axes, words, strict=True):
        lines(data[data[panels] == word], x, y, by, ax=ax, log=log, title=NAMES.get(word, str(word)))
        if ax is not axes[0]:
            ax.set_ylabel("")
    return axes


def error_by_block(errors: pd.DataFrame, by: str = "source", y: str = "nmse") -> Axes:
    """The error between the dense and the sparse hidden states after each block, on a log scale: it compounds.

    Args:
        errors: columns block, `by` and `y`.
        y: nmse, mse, token_nmse or token_nmse_90, see `streams.Errors`; rows without a number are left out, as old records have no token NMSE.
    """
    errors = errors.dropna(subset=[y])
    return lines(errors, "block", y, by)


def training_curves(training: pd.DataFrame, windows: Sequence[str]) -> np.ndarray:
    """Loss by epoch of chosen windows, training and held-out samples; each against its own value before training."""
    chosen = training[training.window.isin(list(windows))].copy()
    start = chosen[chosen.epoch == 0].set_index(["window", "source"]).loss
    chosen["relative"] = [row.loss / start[row.window, row.source] for row in chosen.itertuples()]
    axes = line_panels(chosen.assign(window="block " + chosen.window), "epoch", "relative", "source", "window", log=False)
    axes[0].set_ylabel("loss / loss before training")
    return axes


def course(errors: pd.DataFrame, training: pd.DataFrame, title: str) -> Figure:
    """A pruning under way: the error after each block so far, and the losses of the window that is trained now.

    Args:
        errors: block, source, nmse.
        training: window, epoch, source, loss.
        title: lines above the panels; those too long for these are broken.
    """
    window = training[training.window == training.window.iloc[-1]] if len(training) else training
    drawn = [(part, *axes) for part, *axes in ((errors, "block", "nmse", ""), (window, "epoch", "loss", "window")) if len(part)]
    panels = _panels(len(drawn))
    for ax, (part, x, y, named) in zip(panels, drawn, strict=True):
        lines(part, x, y, "source", ax=ax, title=f"{named} {part[named].iloc[0]}" if named else "").set_ylabel(y.upper() if y == "nmse" else y)
    figure = panels[0].get_figure()
    broken = [part for line in title.splitlines() for part in textwrap.wrap(line, 50 * len(drawn))]
    figure.suptitle("\n".join(broken), fontsize=8.5, x=0.01, ha="left")
    return figure


def perplexity(data: pd.DataFrame, by: str, rows: str, dense: Mapping[str, float] | None = None) -> np.ndarray:
    """Perplexity with its 95 % interval: a panel for each corpus, a row for each word in `rows`, a colour for each in `by`.

    Args:
        data: columns corpus, value, low, high, `by` and `rows`; where there is a column n, the units of the intervals are named.
        dense: the dense model's perplexity on each corpus, drawn as a line.
    """
    corpora = _sorted("source", data.corpus.unique())
    words, kinds = _sorted(rows, data[rows].unique()), looks(by, list(data[by].unique()))
    axes = _panels(len(corpora), sharey=True, height=0.9 + 0.42 * len(words))
    for ax, corpus in zip(axes, corpora, strict=True):
        part = data[data.corpus == corpus]
        for shift, (kind, look) in zip(np.linspace(-0.22, 0.22, len(kinds)) if len(kinds) > 1 else [0.0], kinds.items(), strict=True):
            points = part[part[by] == kind].set_index(rows).reindex(words)
            place = np.arange(len(words)) + shift
            ax.errorbar(
                points.value,
                place,
                xerr=_bars(points),
                fmt=look["marker"],
                color=look["color"],
                capsize=2,
                linewidth=1,
                label=NAMES.get(kind, kind),
            )
        if dense is not None:
            ax.axvline(dense[corpus], color=INK, linewidth=1)
            place = {"xycoords": ("data", "axes fraction"), "xytext": (0, 2), "textcoords": "offset points"}
            ax.annotate("dense", (dense[corpus], 1), **place, ha="center", color=INK, fontsize=8)
        _plain_log(ax, "x")
        ax.set_xlabel(f"perplexity on {corpus}{_units(part)}")
        ax.set_yticks(range(len(words)), [NAMES.get(w, str(w)) for w in words])
        ax.margins(y=0.12)
    axes[0].invert_yaxis()
    if len(kinds) > 1 and by != rows:
        axes[0].get_figure().legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(kinds))
    return axes


def changes(data: pd.DataFrame, by: str, rows: str = "set", *, label: str = "change", ax: Axes | None = None) -> Axes:
    """Differences with their intervals: a row for each word in `rows`, a colour for each in `by`, a line where nothing changes.

    Args:
        data: columns value, low, high, `by` and `rows`; where there is a column n, the units of the intervals are named, on the
            axis where all have the same number, else with each row.
        label: of the axis.
    """
    words, kinds = _sorted(rows, data[rows].unique()), looks(by, list(data[by].unique()))
    common = "n" in data and data.n.nunique() == 1
    ax = ax or _panels(1, width=1.4 * WIDTH, height=1.1 + 0.16 * len(words) * (1 + len(kinds)))[0]
    for shift, (kind, look) in zip(np.linspace(-0.28, 0.28, len(kinds)) if len(kinds) > 1 else [0.0], kinds.items(), strict=True):
        points = data[data[by] == kind].set_index(rows).reindex(words)
        place = np.arange(len(words)) + shift
        ax.errorbar(
            points.value, place, xerr=_bars(points), fmt=look["marker"], color=look["color"], capsize=2, linewidth=1, label=NAMES.get(kind, kind)
        )
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.set_yticks(range(len(words)), [NAMES.get(w, str(w)) + ("" if common else _units(data[data[rows] == w])) for w in words])
    ax.set_xlabel(label + (_units(data) if common else ""))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+,.5g}%" if value else "0"))
    ax.margins(y=0.12)
    ax.invert_yaxis()
    if len(kinds) > 1:
        longest = max(len(str(NAMES.get(kind, kind))) for kind in kinds)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=max(1, min(len(kinds), LEGEND // (longest + 6))))
    return ax


def differences(data: pd.DataFrame) -> np.ndarray:
    """`changes` once for each kind of measurement, a colour a version, and which side is better.

    Args:
        data: `comparison.table`.
    """
    names = {
        "perplexity": "perplexity, relative change (lower is better)",
        "nmse": "final NMSE, relative change (lower is better)",
        "token_nmse": "final token NMSE (median), relative change (lower is better)",
        "accuracy": "accuracy, difference (higher is better)",
    }
    kinds = [kind for kind in names if kind in set(data.kind)]
    rows = max(data[data.kind == kind].set.nunique() for kind in kinds)
    axes = _panels(len(kinds), width=min(1.2, 3.6 / len(kinds)) * WIDTH, height=1.4 + 0.16 * rows * (1 + data.version.nunique()))
    for ax, kind in zip(axes, kinds, strict=True):
        part = data[data.kind == kind].rename(columns={"value": "measured"})
        part = part.assign(value=part.change, low=part.low.fillna(part.change), high=part.high.fillna(part.change))
        changes(part, "version", label=names[kind], ax=ax)
        if ax is not axes[0] and ax.get_legend():
            ax.get_legend().remove()
    return axes


def by_seed(data: pd.DataFrame, arm: str, measures: Sequence[str], *, dense: Mapping[str, float] | None = None) -> np.ndarray:
    """A panel for each measure: a row for each word in `arm`, a small point for each seed, a large one for their mean.

    Args:
        data: one row a run, with the columns `arm`, seed and the measures; the points of one seed are joined by a thin line.
        dense: the dense model's value of a measure, drawn as a line.
    """
    words = _sorted(arm, data[arm].unique())
    kinds = looks(arm, words)
    axes = _panels(len(measures), sharey=True, height=0.9 + 0.42 * len(words))
    for ax, measure in zip(axes, measures, strict=True):
        table = data.pivot_table(index=arm, columns="seed", values=measure).reindex(words)
        for seed in table:
            ax.plot(table[seed], range(len(words)), color="#c8c8c8", linewidth=0.8, zorder=1)
        for place, word in enumerate(words):
            look = {"color": kinds[word]["color"], "marker": kinds[word]["marker"], "linestyle": "none"}
            ax.plot(table.loc[word], [place] * table.shape[1], **look, markersize=3.5, alpha=0.7)
            ax.plot([table.loc[word].mean()], [place], **look, markersize=9, markerfacecolor="none", markeredgewidth=1.6)
        if dense and measure in dense:
            ax.axvline(dense[measure], color=INK, linewidth=1)
        ax.set_xlabel(NAMES.get(measure, measure))
        ax.set_yticks(range(len(words)), [NAMES.get(w, str(w)) for w in words])
        ax.margins(y=0.12)
    axes[0].invert_yaxis()
    return axes


def swept(data: pd.DataFrame, parameter: str, measures: Sequence[str], by: str) -> np.ndarray:
    """What a swept parameter does: a panel for each measure, a line for each word in `by`, through the mean where runs share a place.

    Args:
        data: one row a run, with the columns `parameter`, `by` and the measures; numbers are placed as numbers, all else in its order.
    """
    values = list(data[parameter].drop_duplicates())
    number = pd.api.types.is_numeric_dtype(data[parameter]) and not pd.api.types.is_bool_dtype(data[parameter])
    values = sorted(values) if number else _sorted(parameter, values)
    kinds = looks(by, list(data[by].unique()))
    axes = _panels(len(measures))
    for ax, measure in zip(axes, measures, strict=True):
        for word, look in kinds.items():
            part = data[(data[by] == word) & data[measure].notna()]
            place = part[parameter].astype(float) if number else part[parameter].map(values.index)
            ax.plot(place, part[measure], linestyle="none", marker=look["marker"], color=look["color"], alpha=0.5)
            mean = part[measure].groupby(place).mean()
            ax.plot(mean.index, mean, **look, label=NAMES.get(word, word))
        if not number:
            ax.set_xticks(range(len(values)), [NAMES.get(v, str(v)) for v in values])
            ax.margins(x=0.15)
        ax.set(xlabel=parameter, ylabel=NAMES.get(measure, measure))
    if len(kinds) > 1:
        axes[0].get_figure().legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(kinds)))
    return axes


def distributions(data: pd.DataFrame, value: str, by: str, *, label: str = "") -> Axes:
    """The share of rows up to each value, one step line for each word in `by`, on a log scale."""
    ax = _panels(1, width=1.3 * WIDTH)[0]
    for word, look in looks(by, list(data[by].unique())).items():
        values = np.sort(data[data[by] == word][value].to_numpy())
        style = {"color": look["color"], "linestyle": look["linestyle"], "label": NAMES.get(word, word)}
        ax.step(values, np.arange(1, len(values) + 1) / len(values), where="post", **style)
    _plain_log(ax, "x")
    ax.set(xlabel=label or NAMES.get(value, value), ylabel="share of texts up to it", ylim=(0, 1.02))
    ax.legend(loc="lower right")
    return ax


def bars(data: pd.DataFrame, x: str, y: str, by: str, *, dense: float | None = None, ax: Axes | None = None) -> Axes:
    """A bar for each word in `by` beside each other at every word in `x`, with its value above it."""
    ax = ax or _panels(1, width=max(1.5 * WIDTH, 1.15 * data[x].nunique()))[0]
    kinds = looks(by, list(data[by].unique()))
    order, hues = _sorted(x, data[x].unique()), _sorted(by, data[by].unique())
    sns.barplot(data, x=x, y=y, hue=by, order=order, hue_order=hues, palette={k: v["color"] for k, v in kinds.items()}, saturation=1, ax=ax)
    for container in ax.containers:
        ax.bar_label(container, fmt=lambda v: f"{v:,.0f}" if v >= 1000 else f"{v:.3g}", fontsize=7.5, padding=1)
    if dense is not None:
        ax.axhline(dense, color=INK, linewidth=1)
        ax.annotate("dense", (0, dense), xycoords=("axes fraction", "data"), xytext=(2, 2), textcoords="offset points", fontsize=8)
    ax.set_xticks(range(len(order)), [NAMES.get(w, str(w)) for w in order])
    ax.set(xlabel="", ylabel=NAMES.get(y, y))
    ax.grid(axis="x", visible=False)
    ax.legend(title="", ncols=len(hues), loc="lower left", bbox_to_anchor=(0, 1))
    return ax


def error_and_perplexity(history: pd.DataFrame, error: str, perplexity: str, *, label: str = "") -> Axes:
    """Each recorded run at its final error and its perplexity, coloured by technique, its criterion as the marker.

    Args:
        history: `runs.history()`; `error` and `perplexity` are columns of it.
        label: of the axis of `error`, where that is something else, such as a cost.
    """
    ax = _panels(1, width=1.5 * WIDTH)[0]
    techniques, criteria = looks("technique", list(history.technique.unique())), looks("criterion", list(history.criterion.unique()))
    for (technique, criterion), part in history.groupby(["technique", "criterion"], sort=False):
        look = {"color": techniques[technique]["color"], "marker": criteria[criterion]["marker"]}
        ax.plot(part[error], part[perplexity], linestyle="none", **look, label=f"{NAMES.get(criterion, criterion)} {technique}")
    ax.set(xlabel=label or f"final {error.replace('/', ', ')}", ylabel=perplexity.replace("/", " on "))
    _plain_log(ax, "x")
    _plain_log(ax, "y")
    ax.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def pareto(data: pd.DataFrame, cost: str, quality: str, *, name: str = "name", best: str = "best") -> Axes:
    """Versions at their cost and their quality; those that no other one beats are named and joined, the others are pale.

    Args:
        data: a row a version, with its `name`, and `best`: whether none beats it (`versions.front`).
    """
    ax = _panels(1, width=1.5 * WIDTH)[0]
    rest, front = data[~data[best]], data[data[best]].sort_values(cost)
    ax.plot(rest[cost], rest[quality], linestyle="none", marker="o", color=COLOURS[6], alpha=0.5, label="beaten by another")
    ax.plot(front[cost], front[quality], drawstyle="steps-post", marker="o", color=COLOURS[0], label="beaten by none")
    _axes(ax, cost, quality, False)
    ax.margins(x=0.25, y=0.15)
    _label_ends(ax, [(row[cost], row[quality], str(row[name]), INK) for _, row in front.iterrows()], left=True)  # where neither line nor version is
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return ax


def roofline(data: pd.DataFrame, limit: float, band: float) -> Axes:
    """Steps at their operations a byte and their speed, under the roof of the machine (Williams, Waterman and Patterson, 2009).

    Args:
        data: columns step, operations a byte, TFLOP/s.
        limit: TFLOP/s of a large product of matrices.
        band: gigabytes a second of a large copy.
    """
    ax = _panels(1, width=1.5 * WIDTH)[0]
    least, most = data["operations a byte"].min() / 4, data["operations a byte"].max() * 4
    x = np.geomspace(least, most, 200)
    ax.plot(x, np.minimum(limit, x * band / 1e3), color=INK, linewidth=1.2)
    ends = []
    for look, row in zip(looks("step", list(data.step)).values(), data.itertuples(index=False), strict=True):
        ax.plot(row[1], row[2], linestyle="none", color=look["color"], marker=look["marker"])
        ends.append((row[1], row[2], row[0], look["color"]))
    ax.set_xscale("log")
    _axes(ax, "operations a byte", "TFLOP/s", True)
    _label_ends(ax, ends)
    return ax


def scores(data: pd.DataFrame) -> Axes:
    """Accuracy by task with its 95 % interval, beside what guessing would give (a hollow diamond).

    Args:
        data: columns task, value, low, high, chance; where there is a column n, the number of items is named.
    """
    ax = _panels(1, width=1.3 * WIDTH, height=1.0 + 0.3 * max(len(data), 1))[0]
    place = np.arange(len(data))
    ax.errorbar(data.value, place, xerr=_bars(data), fmt="o", color=COLOURS[2], capsize=2, linewidth=1, label="accuracy")
    ax.plot(data.chance, place, linestyle="none", marker="D", markerfacecolor="none", color=INK, label="chance")
    ax.set_yticks(place, [task + _units(data[data.task == task]) for task in data.task])
    ax.set(xlabel="accuracy (95 % interval over items)", xlim=(0, 1))
    ax.invert_yaxis()
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return ax


def masks(kept: Mapping[str, np.ndarray], rows: int = 48, columns: int = 96) -> np.ndarray:
    """The upper left corner of each mask (out, in): dark where a weight is kept."""
    axes = _panels(len(kept), width=WIDTH * 0.9, height=2.5)
    for ax, (name, mask) in zip(axes, kept.items(), strict=True):
        ax.imshow(
            np.asarray(mask, dtype=bool)[:rows, :columns], cmap=ListedColormap(["#f2e2c0", COLOURS[2]]), interpolation="nearest", aspect="equal"
        )
        ax.set(title=NAMES.get(name, name), xlabel="input", ylabel="output" if ax is axes[0] else "")
        ax.grid(visible=False)
    return axes


def kept_by_input(kept: pd.DataFrame) -> Axes:
    """Share of weights kept in each input column, columns sorted by the size of their input.

    Args:
        kept: columns rank (0 = smallest input), share, criterion.
    """
    ax = lines(kept, "rank", "share", "criterion", log=False)
    ax.set(xlabel="input columns, from the smallest to the largest activation", ylabel="share of weights kept")
    return ax


def _bars(points: pd.DataFrame) -> np.ndarray:
    """Distances of low and high from value, (2, points); no bar where an interval has no bounds, as that of one unit."""
    found = np.abs(np.stack([points.value - points.low, points.high - points.value]))
    return np.where(np.isfinite(found), found, np.nan)


def _panels(count: int, *, sharey: bool = False, width: float = WIDTH, height: float = HEIGHT) -> np.ndarray:
    _, axes = plt.subplots(1, count, figsize=(width * count, height), sharey=sharey, layout="constrained", squeeze=False)
    return axes[0]


def _sorted(by: str, words: Sequence[Any]) -> list[Any]:
    known = ORDER.get(by, ())
    return sorted(words, key=lambda w: known.index(w) if w in known else len(known))


def _units(data: pd.DataFrame) -> str:
    """ " (n = 12)", or the smallest and the largest number of units; nothing where the data have none."""
    counts = data.n.dropna().astype(int) if "n" in data else pd.Series(dtype=int)
    return "" if counts.empty else f" (n = {counts.min()})" if counts.nunique() == 1 else f" (n = {counts.min()} to {counts.max()})"


def _axes(ax: Axes, x: str, y: str, log: bool) -> None:
    ax.set(xlabel=NAMES.get(x, x), ylabel=NAMES.get(y, y))
    if log:
        _plain_log(ax, "y")
    if x in ("block", "epoch"):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _plain_log(ax: Axes, axis: str) -> None:
    """A log scale with plain numbers; minor ticks are numbered too where the range is below a decade and a half."""
    getattr(ax, f"set_{axis}scale")("log")
    which = getattr(ax, f"{axis}axis")
    low, high = sorted(getattr(ax, f"get_{axis}lim")())
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    which.set_major_formatter(plain)
    decades = np.log10(high / low)
    which.set_minor_formatter(
        FuncFormatter(lambda v, _: f"{v:g}" if _first_digit(v) in (2, 5) else "")
        if 0.7 < decades < 2
        else plain
        if decades <= 0.7
        else NullFormatter()
    )
    which.set_tick_params(which="minor", labelsize=8)


def _first_digit(value: float) -> int:
    return int(f"{value:e}"[0])


def _label_ends(ax: Axes, ends: list[tuple[float, float, str, str]], *, left: bool = False) -> None:
    """Each line's name to the right of its end, moved up where ends are close; or to the left of it, moved down."""
    side, align = (-1, "right") if left else (1, "left")
    named = []
    for x, y, name, colour in ends:
        if np.isfinite(y):
            text = ax.annotate(name, (x, y), xytext=(side * 7, 0), textcoords="offset points", ha=align, va="center", color=colour, fontsize=8.5)
            text.set(annotation_clip=False, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 0.5})  # a line may pass behind it
            named.append(text)
    _ENDS[ax] = side, named
    _spread(ax.get_figure())


def _spread(figure: Figure) -> None:
    """Put names of ends apart, with the axes as they now are."""
    figure.canvas.draw()
    for ax in figure.axes:
        side, named = _ENDS.get(ax, (1, []))
        heights = [side * ax.transData.transform(text.xy)[1] * 72 / figure.dpi for text in named]
        last = -np.inf
        for height, text in sorted(zip(heights, named, strict=True), key=lambda pair: pair[0]):
            last = max(height, last + GAP)
            text.set_position((side * 7, side * (last - height)))

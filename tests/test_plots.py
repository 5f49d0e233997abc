"""Figures hold what they were given, look the same for the same word, and come with their data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

from reconkit import plots


@pytest.fixture(autouse=True)
def closed() -> None:
    yield
    plt.close("all")


def errors() -> pd.DataFrame:
    rows = [(c, t, b, 0.01 * (b + 1) * f) for c in ("magnitude", "wanda") for t, f in (("LR", 4), ("BR+GP", 1)) for b in range(5)]
    return pd.DataFrame(rows, columns=["criterion", "technique", "block", "nmse"])


def lightness(colour: str) -> float:
    """CIE L* of a colour."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(colour)]
    y = float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
    return 116 * y ** (1 / 3) - 16


def deuteranope(colour: str) -> np.ndarray:
    """What is left of a colour without the medium cones (Viénot et al., 1999), linear."""
    linear = np.array([v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(colour)])
    return np.array([[0.2931, 0.7069, 0.0], [0.2931, 0.7069, 0.0], [-0.0223, 0.0223, 1.0]]) @ linear


def test_the_main_colours_stay_apart_in_grey_and_for_colour_blind_readers() -> None:
    main = plots.COLOURS[:4]
    greys = [lightness(c) for c in main]
    assert all(a - b >= 8 for a, b in zip(greys, greys[1:], strict=False)), greys
    seen = [deuteranope(c) for c in main]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]) > 0.1
    assert max(greys) < 75, "visible on white"


def test_a_word_has_one_look_whatever_else_is_shown() -> None:
    alone, among = plots.looks("technique", ["BR+GP"]), plots.looks("technique", ["LR", "BR", "BR+GP"])
    assert alone["BR+GP"] == among["BR+GP"]
    assert len({look["color"] for look in among.values()}) == len({look["marker"] for look in among.values()}) == 3


def test_lines_are_labelled_where_they_end_and_errors_are_on_a_log_scale() -> None:
    data = errors().query("criterion == 'wanda'")
    ax = plots.lines(data, "block", "nmse", "technique")
    assert [list(line.get_ydata()) for line in ax.lines] == [data[data.technique == t].nmse.tolist() for t in ("LR", "BR+GP")]
    assert {t.get_text() for t in ax.texts} == {"LR", "BR+GP"} and ax.get_legend() is None
    assert ax.get_yscale() == "log" and ax.get_xlabel() == "block" and "NMSE" in ax.get_ylabel()


def test_labels_of_close_ends_do_not_cover_each_other() -> None:
    data = pd.DataFrame([(k, b, 1 + 1e-4 * i) for i, k in enumerate("abcd") for b in (0, 1)], columns=["kind", "block", "nmse"])
    ax = plots.lines(data, "block", "nmse", "kind")
    ax.get_figure().canvas.draw()
    boxes = sorted((t.get_window_extent() for t in ax.texts), key=lambda b: b.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))


def test_panels_share_their_scale_and_keep_the_fields_order() -> None:
    axes = plots.line_panels(errors().sample(frac=1, random_state=0), "block", "nmse", "technique", "criterion")
    assert [ax.get_title(loc="left") for ax in axes] == ["magnitude", "Wanda"] and axes[0].get_ylim() == axes[1].get_ylim()


@pytest.mark.parametrize(
    ("y", "label"),
    [
        ("nmse", "NMSE (share"), ("mse", "MSE (mean"), ("token_nmse", "Token NMSE, median over tokens"),
        ("token_nmse_90", "Token NMSE, 90th percentile over tokens"),
    ],
)  # fmt: skip
def test_each_error_by_block_is_named_and_what_was_not_measured_is_left_out(y: str, label: str) -> None:
    rows = [(s, b, 0.1 * (b + 1) if s == "wiki" or b else float("nan")) for s in ("calibration", "wiki") for b in range(3)]
    ax = plots.error_by_block(pd.DataFrame(rows, columns=["source", "block", y]), y=y)
    assert ax.get_ylabel().startswith(label)
    assert [line.get_xdata().tolist() for line in ax.lines] == [[1, 2], [0, 1, 2]]


@pytest.mark.filterwarnings("error")
def test_intervals_without_bounds_are_no_bars(tmp_path: Path) -> None:
    """Those of one unit; their points are drawn, and the other bars."""
    infinite = {"value": [1.2, 1.1], "low": [-np.inf, 1.0], "high": [np.inf, 1.3]}
    drawn = [
        plots.changes(pd.DataFrame({"set": ["wiki", "news"], "of": "all", **infinite}), "of"),
        plots.perplexity(pd.DataFrame({"corpus": "wiki", "technique": ["LR", "BR"], "of": "all", **infinite}), "of", "technique")[0],
        plots.scores(pd.DataFrame({"task": ["boolq", "rte"], "chance": 0.5, **infinite})),
    ]
    for i, ax in enumerate(drawn):
        plots.save(ax, str(i), pd.DataFrame(infinite), tmp_path)
        bars = [segment for segment in ax.containers[0].lines[2][0].get_segments() if len(segment) and np.isfinite(segment).all()]
        assert len(bars) == 1 and bars[0][:, 0] == pytest.approx([1.0, 1.3])
        assert ax.containers[0].lines[0].get_xdata().tolist() == [1.2, 1.1] and np.isfinite(ax.get_xlim()).all()


def test_training_curves_start_at_one() -> None:
    rows = [(w, e, s, (2.0 if w == "0" else 5.0) * 0.8**e) for w in ("0", "1+2") for e in range(4) for s in ("calibration", "wiki")]
    axes = plots.training_curves(pd.DataFrame(rows, columns=["window", "epoch", "source", "loss"]), ["0", "1+2"])
    assert all(line.get_ydata()[0] == 1 and line.get_ydata()[-1] == pytest.approx(0.8**3) for ax in axes for line in ax.lines)


def test_perplexity_has_a_panel_for_each_corpus_with_intervals_and_the_dense_model() -> None:
    rows = [(c, t, d, 20.0, 18.0, 23.0) for c in ("wanda", "sparsegpt") for t in ("LR", "BR") for d in ("wiki", "news")]
    data = pd.DataFrame(rows, columns=["criterion", "technique", "corpus", "value", "low", "high"])
    axes = plots.perplexity(data, "technique", "criterion", dense={"wiki": 10.0, "news": 12.0})
    assert [ax.get_xlabel() for ax in axes] == ["perplexity on wiki", "perplexity on news"]
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["Wanda", "SparseGPT"]
    spread = axes[0].containers[0].lines[2][0].get_segments()[0]
    assert spread[:, 0] == pytest.approx([18, 23])
    assert axes[1].lines[-1].get_xdata()[0] == 12.0


def test_bars_show_their_values() -> None:
    data = pd.DataFrame([("wanda", "LR", 0.2), ("wanda", "BR", 0.1)], columns=["criterion", "technique", "nmse"])
    ax = plots.bars(data, "criterion", "nmse", "technique", dense=0.05)
    assert {t.get_text() for t in ax.texts} == {"0.2", "0.1", "dense"} and ax.get_ylim()[0] == 0


def test_masks_show_their_corner() -> None:
    kept = np.random.default_rng(0).random((60, 120)) > 0.5
    axes = plots.masks({"wanda": kept, "magnitude": ~kept}, rows=10, columns=20)
    assert np.array_equal(axes[0].images[0].get_array(), kept[:10, :20]) and axes[1].get_title(loc="left") == "magnitude"


def test_saved_figures_come_with_their_data_and_are_the_same_each_time(tmp_path: Path) -> None:
    files = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        plots.save(plots.lines(errors().query("criterion == 'wanda'"), "block", "nmse", "technique"), "name", errors(), folder)
        files.append({p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")})
    assert set(files[0]) == {"figures/name.png", "figures/name.svg", "data/name.csv"} and files[0] == files[1]
    assert pd.read_csv(tmp_path / "a" / "data" / "name.csv").equals(errors())
    plots.save(plt.figure(), "name", errors(), "")


def test_changes_have_a_row_for_each_set_and_a_line_at_nothing() -> None:
    rows = [(s, c, v, v - 0.1, v + 0.1) for s, v in (("wiki", 0.2), ("self", -0.3)) for c in ("magnitude", "wanda")]
    ax = plots.changes(pd.DataFrame(rows, columns=["set", "criterion", "value", "low", "high"]), "criterion", label="change of perplexity")
    assert [t.get_text().split(" ")[0] for t in ax.get_yticklabels()] == ["wiki", "self"] and ax.get_xlabel() == "change of perplexity"
    assert [c.lines[0].get_xdata().tolist() for c in ax.containers] == [[0.2, -0.3]] * 2
    assert 0 in [line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1]


def test_intervals_name_their_units_and_an_infinite_one_has_no_bars() -> None:
    rows = [("wiki", 0.2, 0.1, 0.3, 4), ("self", -0.3, -np.inf, np.inf, 4)]
    data = pd.DataFrame(rows, columns=["set", "value", "low", "high", "n"]).assign(of="x")
    ax = plots.changes(data, "of", label="change")
    assert ax.get_xlabel() == "change (n = 4)" and [t.get_text() for t in ax.get_yticklabels()] == [
        "wiki (calibration's domain)",
        "self (its own text)",
    ]
    first, second = ax.containers[0].lines[2][0].get_segments()
    assert first[:, 0] == pytest.approx([0.1, 0.3]) and not np.isfinite(second).any()
    assert np.isfinite(ax.get_xlim()).all()
    ax = plots.changes(data.assign(n=[4, 9]), "of", label="change")
    assert ax.get_xlabel() == "change" and [t.get_text().rsplit(" (", 1)[1] for t in ax.get_yticklabels()] == ["n = 4)", "n = 9)"]
    [panel] = plots.perplexity(data.assign(corpus="wiki", n=[4, 9], value=2.0, low=1.0, high=3.0), "set", "of")
    assert panel.get_xlabel() == "perplexity on wiki (n = 4 to 9)"


def test_each_seed_has_a_point_and_the_mean_a_larger_one() -> None:
    rows = [(arm, seed, 10 + place + seed) for place, arm in enumerate(["alone", "self-generated"]) for seed in (0, 1, 2)]
    [ax] = plots.by_seed(pd.DataFrame(rows, columns=["arm", "seed", "nmse"]), "arm", ["nmse"], dense={"nmse": 9.0})
    points = [line.get_xdata().tolist() for line in ax.lines if line.get_linestyle() == "None"]
    assert points == [[10, 11, 12], [11], [11, 12, 13], [12]]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["alone", "self-generated"]


def test_distributions_rise_to_one() -> None:
    data = pd.DataFrame({"text": ["own"] * 4 + ["real"] * 2, "perplexity": [8.0, 2.0, 4.0, 16.0, 3.0, 9.0]})
    ax = plots.distributions(data, "perplexity", "text", label="perplexity of a text")
    assert [line.get_xdata().tolist() for line in ax.lines] == [[2, 4, 8, 16], [3, 9]]
    assert ax.lines[0].get_ydata()[-1] == 1 and ax.get_xscale() == "log" and ax.get_xlabel() == "perplexity of a text"


def test_scores_stand_beside_chance() -> None:
    data = pd.DataFrame({"task": ["boolq", "rte"], "value": [0.6, 0.5], "low": [0.5, 0.3], "high": [0.65, 0.7], "n": [90, 8], "chance": 0.5})
    ax = plots.scores(data)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["boolq (n = 90)", "rte (n = 8)"] and ax.lines[-1].get_xdata().tolist() == [0.5, 0.5]
    [bars] = ax.containers
    assert np.allclose([s[:, 0] for s in bars.lines[2][0].get_segments()], [[0.5, 0.65], [0.3, 0.7]])
    assert not plots.scores(data[:0]).get_yticklabels(), "nothing was asked"


def test_names_of_ends_stay_apart_when_the_axes_change_after_them(tmp_path: Path) -> None:
    data = pd.DataFrame({"x": [1, 2] * 3, "y": [1, 1.0, 1, 1.3, 1, 1.6], "of": ["a", "a", "b", "b", "c", "c"]})
    ax = plots.lines(data, "x", "y", "of", log=False)
    ax.set_ylim(0, 40)
    plots.save(ax, "ends", data, tmp_path)
    low, middle, high = sorted(text.get_window_extent().y0 for text in ax.texts)
    assert min(middle - low, high - middle) == pytest.approx(plots.GAP * ax.get_figure().dpi / 72, abs=1)
    plots.close(ax)

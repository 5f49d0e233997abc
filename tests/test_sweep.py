"""Sweeps: a manifest from a grid, and one table and one figure for each swept parameter."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest

from reconkit import plots, suite, sweep
from reconkit.cli import main
from reconkit.config import ConfigError


def test_words_become_a_grid() -> None:
    words = [
        "criterion=wanda,sparsegpt",
        'technique=["LR", "BR+GP"]',
        "seed=0,1",
        "rate=0.5",
        'held_out=[["wiki"], []]',
        "on=true,false",
        "c=[wanda, x]",
    ]
    assert sweep.grid(words) == {
        "criterion": ["wanda", "sparsegpt"],
        "technique": ["LR", "BR+GP"],
        "seed": [0, 1],
        "rate": [0.5],
        "held_out": [["wiki"], []],
        "on": [True, False],
        "c": ["wanda", "x"],
    }


@pytest.mark.parametrize("word", ["criterion", "=a", "a=", "two words=1", "a=[]", "a=b,"])
def test_a_word_that_is_none_is_named(word: str) -> None:
    with pytest.raises(ConfigError, match="is"):
        sweep.grid([word])


def test_a_parameter_is_swept_once() -> None:
    with pytest.raises(ConfigError, match="once"):
        sweep.grid(["seed=0", "seed=1"])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    book = nbformat.v4.new_notebook()
    text = 'criterion: str = "x"\nrate: float = 0.5\nseed: int = 0\nparts: list = []\nout_dir: str = ""'
    book.cells = [nbformat.v4.new_code_cell(text, metadata={"tags": ["parameters"]})]
    (tmp_path / "notebooks").mkdir()
    nbformat.write(book, tmp_path / "notebooks" / "00_start_here.ipynb")
    (tmp_path / "papermill_runs").mkdir()
    return tmp_path


def test_new_writes_every_combination(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = home / "papermill_runs" / "mine.toml"
    assert main(["suite", "new", str(file), "criterion=wanda,sparsegpt", "seed=0,1", 'parts=[["a b"], []]']) == 0
    assert "8 runs" in capsys.readouterr().out
    entries = suite.load_manifest(file).entries
    assert len({e.name for e in entries}) == 8 and entries[0].name == "wanda-seed0-parts-a-b"
    chosen = {(e.parameters["criterion"], e.parameters["seed"], tuple(e.parameters["parts"])) for e in entries}
    assert chosen == {(c, s, p) for c in ("wanda", "sparsegpt") for s in (0, 1) for p in (("a b",), ())}


@pytest.mark.parametrize("word", ["nothing=1", "seed=a", "criterion=1"])
def test_a_grid_that_no_notebook_can_run_leaves_no_file(home: Path, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = home / "papermill_runs" / "mine.toml"
    assert main(["suite", "new", str(file), word]) == 2 and not file.exists()
    assert word.partition("=")[0] in capsys.readouterr().err


def swept(home: Path, *words: str) -> suite.Suite:
    suite.new(home / "papermill_runs" / "mine.toml", words)
    found = suite.load_manifest(home / "papermill_runs" / "mine.toml")
    for i, e in enumerate(found.entries):
        (found.folder / e.name).mkdir(parents=True)
        (found.folder / e.name / "metrics.json").write_text(json.dumps({"nmse/calibration": 0.1 + i, "perplexity/wiki": 20.0 + i, "other": 1.0}))
    return found


def test_one_table_and_one_figure_for_each_swept_parameter(home: Path) -> None:
    found = swept(home, "criterion=wanda,sparsegpt", "seed=0,1", "rate=0.25")
    suite.index(found)
    table = pd.read_csv(found.folder / "sweep" / "00_start_here.csv")
    assert table.columns.tolist() == ["run", "criterion", "seed", "nmse/calibration", "perplexity/wiki", "other"] and len(table) == 4
    assert sorted(p.name for p in (found.folder / "sweep" / "figures").glob("*.png")) == ["00_start_here-criterion.png", "00_start_here-seed.png"]
    assert sorted(p.name for p in (found.folder / "sweep" / "data").iterdir()) == ["00_start_here-criterion.csv", "00_start_here-seed.csv"]
    page = (found.folder / "index.html").read_text()
    assert "Sweep of 00_start_here" in page and 'src="sweep/figures/00_start_here-seed.png"' in page


def test_a_suite_without_a_sweep_has_no_such_section(home: Path) -> None:
    found = swept(home, "criterion=wanda")
    assert sweep.write(found.entries, found.folder) == "" and not (found.folder / "sweep").exists()


def test_runs_of_several_seeds_share_a_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = swept(home, "criterion=wanda,sparsegpt", "seed=0,1", "rate=0.1,0.2")
    drawn = {}
    draw = plots.swept
    monkeypatch.setattr(plots, "swept", lambda data, name, measures, by: drawn.update({name: set(data[by])}) or draw(data, name, measures, by))
    sweep.write(found.entries, found.folder)
    assert drawn["criterion"] == {"0.1", "0.2"} and len(drawn["seed"]) == 4
    assert not plt.get_fignums()


def test_what_is_no_whole_grid_is_no_sweep(home: Path) -> None:
    def entry(name: str, notebook: str, **parameters: object) -> suite.Entry:
        return suite.Entry(name, home / "notebooks" / notebook, parameters)

    scales = [entry("a", "00_start_here.ipynb", model="x", count=1), entry("b", "00_start_here.ipynb", model="y", count=2)]
    assert sweep.tables(scales, home) == {}, "two of four"
    assert sweep.tables([*scales, entry("c", "00_start_here.ipynb", model="x", count=2)], home) == {}, "three of four"
    solution = [scales[0], entry("s", "solutions/00_start_here.ipynb", model="x", limit=1)]
    assert sweep.tables(solution, home) == {}, "a notebook and its solutions are two"


def test_a_notebook_without_the_usual_measurements_shows_its_first(home: Path) -> None:
    found = swept(home, "seed=0,1")
    for e in found.entries:
        (found.folder / e.name / "metrics.json").write_text(json.dumps({"ratio/x": 1.0, "effect/y": 2.0}))
    assert "first 2 of 2 measurements" in sweep.write(found.entries, found.folder)
    assert (found.folder / "sweep" / "figures" / "00_start_here-seed.png").is_file()


def test_another_notebook_needs_a_grid(home: Path) -> None:
    with pytest.raises(ConfigError, match="with a grid"):
        suite.new(home / "papermill_runs" / "mine.toml", notebook="01_two")


def test_runs_that_failed_leave_gaps(home: Path) -> None:
    found = swept(home, "seed=0,1,2")
    (found.folder / found.entries[1].name / "metrics.json").unlink()
    _, table = sweep.tables(found.entries, found.folder)["00_start_here"]
    assert table["perplexity/wiki"].isna().tolist() == [False, True, False]
    assert "Sweep of" in sweep.write(found.entries, found.folder)


def test_the_figure_goes_through_the_means() -> None:
    data = pd.DataFrame({"seed": [0, 0, 1], "m": [1.0, 3.0, 5.0], "others": ["a", "a", "a"]})
    ax = plots.swept(data, "seed", ["m"], "others")[0]
    assert [list(line.get_ydata()) for line in ax.lines] == [[1.0, 3.0, 5.0], [2.0, 5.0]]
    plt.close("all")

"""The notebooks as files: their shape, their links, and that the solutions run."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import pytest

from reconkit import book, ledger, paper, suite

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
both = pytest.mark.parametrize("file", NOTEBOOKS + SOLUTIONS, ids=lambda f: f"{f.parent.name}/{f.stem}")
each = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.stem)


def cells(file: Path, kind: str) -> list[Any]:
    return [c for c in nbformat.read(file, as_version=4).cells if c.cell_type == kind]


def test_they_are_numbered_and_each_has_solutions() -> None:
    assert [f.stem[:2] for f in NOTEBOOKS] == [*(f"{i:02}" for i in range(15)), "90"]
    assert [f.name for f in SOLUTIONS] == [f.name for f in NOTEBOOKS]


@both
def test_no_outputs_short_cells_and_literal_parameters(file: Path) -> None:
    for cell in cells(file, "code"):
        assert not cell.outputs and cell.execution_count is None
        assert len(cell.source.splitlines()) <= (25 if "solutions" in file.parts else 15) or "parameters" in cell.metadata.get("tags", [])
    found = suite.parameters(file)
    assert found["out_dir"] == "" and found["seed"] == 0


@each
def test_the_header_says_what_when_and_where_to_go(file: Path) -> None:
    header, last = cells(file, "markdown")[0].source, cells(file, "markdown")[-1].source
    assert header.startswith(f"# {file.stem[:2]} · ") and "What you will learn" in header and "2 CPU cores" in header
    place = NOTEBOOKS.index(file)
    for word, step in (("previous", -1), ("next", 1)):
        neighbour = NOTEBOOKS[place + step] if 0 <= place + step < len(NOTEBOOKS) else None
        assert (f"({neighbour.name})" in header) if neighbour else (f"{word}: [" not in header)
    assert "## Exercises" in last and f"(solutions/{file.name})" in last


@each
def test_addresses_come_from_the_projects_one_setting(file: Path) -> None:
    owner = REPOSITORY.removeprefix("https://github.com/")
    header, install = cells(file, "markdown")[0].source, cells(file, "code")[0].source
    assert f"https://colab.research.google.com/github/{owner}/blob/main/notebooks/{file.name}" in header
    assert f"git+{REPOSITORY}" in install and "-c held.txt" in install
    assert install == cells(NOTEBOOKS[0], "code")[0].source, "one set-up cell for all"


@both
def test_links_lead_somewhere(file: Path) -> None:
    for cell in cells(file, "markdown"):
        for target in re.findall(r"\]\(([^)#]+)\)", cell.source):
            if not target.startswith("https://"):
                assert (file.parent / target).resolve().exists(), target


@each
def test_it_tells_a_story(file: Path) -> None:
    prose = " ".join(c.source for c in cells(file, "markdown"))
    assert len(prose.split()) >= 350 and "Expect" in prose
    code = "\n".join(c.source for c in cells(file, "code"))
    assert code.count("plots.save(") >= 2 and "runs.save_claims(out_dir" in code and "runs.save_metrics(out_dir" in code


def test_every_notebook_is_in_the_suites() -> None:
    for name in ("smoke", "offline"):
        entries = suite.load_manifest(ROOT / "papermill_runs" / f"{name}.toml").entries
        assert {e.notebook.name for e in entries} == {f.name for f in NOTEBOOKS}


def test_the_offline_suite_is_the_notebooks_own_defaults() -> None:
    for entry in suite.load_manifest(ROOT / "papermill_runs" / "offline.toml").entries:
        known = suite.parameters(entry.notebook)
        assert entry.parameters == {k: v for k, v in known.items() if k != "out_dir"}


def test_the_contents_page_lists_every_notebook() -> None:
    page = (ROOT / "notebooks" / "README.md").read_text()
    assert all(f"({f.name})" in page for f in NOTEBOOKS)


def test_the_smoke_suite_runs_every_solution() -> None:
    entries = suite.load_manifest(ROOT / "papermill_runs" / "smoke.toml").entries
    assert {e.notebook.resolve() for e in entries} == {f.resolve() for f in NOTEBOOKS + SOLUTIONS}
    assert all(e.parameters["model"] == "tiny" for e in entries if "model" in e.parameters)


@pytest.mark.slow
def test_texts_of_ones_own_are_called_by_their_names(tmp_path: Path) -> None:
    """00 and 03 look errors and perplexities up by text, 13 makes calibration texts part of its names, too."""
    files = {name: str(tmp_path / f"{name}.txt") for name in ("own", "other", "second", "third")}
    text = (ROOT / "README.md").read_text()
    for i, file in enumerate(files.values()):
        Path(file).write_text(text[len(text) * i // 4 : len(text) * (i + 1) // 4])
    names = ("00_start_here", "03_global_propagation", "13_which_recipe")
    known = set().union(*(suite.parameters(ROOT / "notebooks" / f"{name}.ipynb") for name in names))
    given = tomllib.loads((ROOT / "papermill_runs" / "smoke.toml").read_text())["defaults"]
    given |= {"corpus": files["own"], "other": files["other"], "held_out": [files["second"]], "test": [files["second"], files["third"]]}
    lines = [f"{name} = {json.dumps(value)}" for name, value in given.items() if name in known]
    runs = [f'[[run]]\nnotebook = "{(ROOT / "notebooks" / name).as_posix()}.ipynb"\nname = "{name}"' for name in names]
    (tmp_path / "mine.toml").write_text("\n".join(["[defaults]", *lines, *runs]))
    assert suite.run(tmp_path / "mine.toml") == 0
    for file in (tmp_path / "mine").rglob("*.csv"):
        assert str(tmp_path) not in file.read_text(), f"{file} names a folder"
    for name in names:
        for cell in cells(tmp_path / "mine" / name / "notebook.ipynb", "code"):
            assert str(tmp_path) not in json.dumps(cell.outputs), f"{name} shows a folder"


@pytest.mark.parametrize("name", ["smoke", "offline", "offline-full", "colab", "paper", "speed", "regression", "regression-smoke"])
def test_every_scale_is_possible(name: str) -> None:
    """One file says what a scale is; what it asks of a notebook, the notebook has."""
    found = suite.load_manifest(ROOT / "papermill_runs" / f"{name}.toml")
    assert found.entries
    page = (ROOT / "notebooks" / "README.md").read_text()
    assert f"({Path('..', 'papermill_runs', f'{name}.toml').as_posix()})" in page
    unused = name in ("colab", "paper", "offline-full")
    assert not unused or "ot run yet" in (ROOT / "papermill_runs" / f"{name}.toml").read_text().split("[defaults]")[0]


def test_the_paper_scale_asserts_table_3() -> None:
    entries = suite.load_manifest(ROOT / "papermill_runs" / "paper.toml").entries
    [asserting] = [e for e in entries if e.parameters.get("within")]
    asked = {"published": "opt-125m", "within": 0.01, "model": "facebook/opt-125m", "test_count": 0, "test_length": 2048}
    assert {name: asserting.parameters[name] for name in asked} == asked, "the whole test texts"


@each
def test_every_figure_is_followed_by_its_reading(file: Path) -> None:
    """A picture is saved by a cell; what comes next says what is to be seen in it."""
    every = nbformat.read(file, as_version=4).cells
    for i, cell in enumerate(every):
        if cell.cell_type == "code" and "plots.save(" in cell.source:
            following = every[i + 1 : i + 2]
            said = [c for c in [cell, *following] if c.cell_type == "markdown" or "Markdown(" in c.source]
            assert said, f"{file.stem}: cell {i} shows a figure that nothing reads: {cell.source[-120:]}"


PUBLISHED = ROOT / "papermill_runs" / "published" / "offline"
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?!\w)")
SETTINGS = {256, 1024, 2048, 320, 1100}
"Of the paper: samples, tokens, steps, documents."
NO_RESULT = (
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)",  # code, formulas, addresses
    r"(?m)^(#+ .*|\*\*Time and memory.*|Solutions:.*|\s*\d+\. )",
    r"(?i)\b(notebooks?|sections?|figures?|tables?|exercises?) \d\w*((, | and | to )\d+\w*)*",
    r"\b\d+:\d+\b|\b\d+[BM]\b|(SmolLM2|LLaMA|Llama|OPT|WikiText)-\S+|\b(19|20)\d\d\b",  # patterns, names, years
    r"(llm-compressor|torch|transformers)\W+\d+(\.\d+)*( to \d+\.\d+)?|\(0\.14 installs|so that 0\.1 reads",  # versions; an example
)


def numbers(text: str) -> set[float]:
    return {float(found.replace(",", "").rstrip(".")) for found in NUMBER.findall(text)}


def known_numbers(file: Path) -> set[float]:
    """What an executed notebook computed, printed or was given, and what the paper published."""
    found = {float(v) for v in SETTINGS}
    for table in paper.TABLES:
        found |= numbers(paper.table(table).to_csv(index=False).replace(",", " "))
    for cell in cells(file, "code"):
        found |= numbers(cell.source)
        for output in cell.outputs:
            for kind, text in output.get("data", {}).items():
                found |= numbers(re.sub(r"<[^>]*>", " ", "".join(text))) if kind.startswith("text/") else set()
    for value in json.loads((file.parent / "metrics.json").read_text()).values():
        found |= {abs(value), 100 * abs(value)}
    return found


def unlinked(text: str) -> str:
    """Without what differs between a notebook and its copy elsewhere."""
    return book.EXECUTED.sub("", book.LINK.sub("]()", text))


@each
def test_the_published_copy_is_of_this_notebook(file: Path) -> None:
    executed = PUBLISHED / file.stem / "notebook.ipynb"
    given = [c for c in nbformat.read(executed, as_version=4).cells if "injected-parameters" not in c.metadata.get("tags", [])]
    told, now = ([unlinked(c.source) for c in cells] for cells in (given, nbformat.read(file, as_version=4).cells))
    assert told == now, f"run and publish {file.stem} again"


@pytest.mark.parametrize("copy", sorted(PUBLISHED.parent.rglob("notebook.ipynb")), ids=lambda p: f"{p.parts[-3]}-{p.parts[-2][:2]}")
def test_every_link_of_a_published_copy_leads_on_from_its_folder(copy: Path) -> None:
    targets = [t for cell in cells(copy, "markdown") for t in book.LINK.findall(cell.source) if not re.match(r"https?:|#", t)]
    assert len(targets) >= 4 and all((copy.parent / target.partition("#")[0]).is_file() for target in targets), targets
    copies = [t for t in targets if (copy.parent / t).resolve().is_relative_to(PUBLISHED.parent)]
    assert copies or copy.parts[-3] != "offline", "from copy to copy"


@each
def test_every_number_in_the_prose_is_within_the_tolerance_of_the_executed_copy(file: Path) -> None:
    """Results are mostly written by code; one that a paragraph quotes must be found in the executed copy."""
    known = known_numbers(PUBLISHED / file.stem / "notebook.ipynb")
    for cell in cells(file, "markdown")[1:-1]:
        text = cell.source
        for pattern in NO_RESULT:
            text = re.sub(pattern, " ", text, flags=re.DOTALL)
        for number in numbers(text):
            counted = number < 10 and number == int(number)  # "three ways" says no result
            assert counted or any(abs(number - k) <= suite.TOLERANCE * abs(k) for k in known), f"{file.stem}: nothing measured is {number:g}"


def test_the_figure_map_names_figures_that_are_there() -> None:
    page = (ROOT / "notebooks" / "README.md").read_text()
    rows = re.findall(r"^\| (?:Figure|Table)s? .*\(((\d\d)_\w+)\.ipynb\) \| (.*) \|$", page, flags=re.MULTILINE)
    assert len(rows) >= 9
    for stem, _, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            for kind in ("figures/{}.png", "figures/{}.svg", "data/{}.csv"):
                assert (PUBLISHED / stem / kind.format(name)).is_file(), f"{stem}: {name}"


def test_the_readme_has_the_ledger_of_the_published_runs() -> None:
    names = [e.name for e in suite.load_manifest(ROOT / "papermill_runs" / "offline.toml").entries]
    text = ledger.as_markdown(ledger.collect(PUBLISHED, names), "papermill_runs/published/offline")
    page = (ROOT / "README.md").read_text()
    assert ledger.written_into(page, "offline", text) == page, "publish again"
    assert "not run yet" not in text.split("|", 6)[-1] and len(text.splitlines()) == 10


def test_all_that_is_committed_of_the_executed_notebooks_stays_small() -> None:
    assert sum(f.stat().st_size for f in PUBLISHED.parent.rglob("*") if f.is_file()) < 15e6

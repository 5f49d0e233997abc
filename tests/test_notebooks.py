"""The notebooks as files: their shape, their links, and that the solutions run."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import pytest

from reconkit import suite

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
TINY = {
    "model": "tiny", "corpus": "pydocs", "held_out": ["pydocs"], "test": ["pydocs"], "count": 8, "length": 32, "epochs": 1,
    "held_out_count": 2, "test_count": 4, "test_length": 32, "evaluate": ["perplexity"],
}  # fmt: skip
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
    assert f"git+{REPOSITORY}" in install


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


ASKING = ("09_perplexity_and_zero_shot",)
"Solutions that ask zero-shot tasks."


@pytest.mark.slow
@pytest.mark.parametrize("file", [pytest.param(f, id=f.stem, marks=[pytest.mark.assets] if f.stem in ASKING else []) for f in SOLUTIONS])
def test_solutions_run(file: Path) -> None:
    """In this process, on the tiny model; the notebooks themselves are run by the smoke suite."""
    space: dict[str, Any] = {}
    for cell in cells(file, "code"):
        exec(compile(ast.parse(cell.source), file.name, "exec"), space)
        if "parameters" in cell.metadata.get("tags", []):
            space |= TINY
    assert space["model"] == "tiny"

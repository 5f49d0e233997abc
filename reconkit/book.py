"""Executed notebooks → one static HTML book with search that needs no network. The only room that knows Sphinx."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat

from .config import ConfigError, require

CONTENTS = "README.md"
"Of the folder of notebooks: the book's first page."
COPY = "notebook.ipynb"
"An executed notebook, in the folder of its run."
LINK = re.compile(r"\]\(([^)\s]+)\)")
BADGE = re.compile(r"\[!\[([^\]]*)\]\(https?://[^)]*\)\]\(([^)]*)\)")
EXECUTED = re.compile(r" · \[(?:executed copy|notebook)\]\([^)]*\)")
"At the head of a notebook, and of its executed copy: the other one."
SAVED = re.compile(r'plots\.save\([^"]*"(\w+)"')
WORDS = 40  # of the reading that a picture's alternative text has
CONF = '''"""Written by reconkit.book."""
from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project, author, html_title = "reconkit", "reconkit", "reconkit"
extensions = ["myst_nb"]
root_doc = "README"
html_theme = "sphinx_book_theme"
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "use_fullscreen_button": False, "navbar_persistent": []}
html_show_sourcelink = html_copy_source = False
html_last_updated_fmt = None
nb_execution_mode = "off"
nb_output_stderr = "remove"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]


def inline(self, node):
    self.body.append(convert(node.astext()))
    raise SkipNode


def block(self, node):
    self.body.append('<div class="math">' + convert(node.astext(), display="block") + "</div>")
    raise SkipNode


def setup(app):  # browsers draw MathML themselves; the usual renderers fetch a script
    app.add_html_math_renderer("mathml", (inline, None), (block, None))


html_math_renderer = "mathml"
'''


def build(executed: Mapping[str, Path], notebooks: Path, out: Path, repository: str) -> None:
    """Write the book to the folder `out`, which is replaced.

    Args:
        executed: by the name of the notebook, without its ending, the copy that a suite executed, in a folder of that name.
        notebooks: the folder that has README.md, the notebooks and solutions/.
        repository: address that links to what is not part of the book lead to.

    Raises:
        ConfigError: Sphinx is not installed, there is nothing to make a book of, or `out` holds something else than a book.
        RuntimeError: Sphinx failed, with its last lines.
    """
    require(len(executed) > 0, "executed notebooks", 0, "one or more; run a suite first")
    free = not out.exists() or (out.is_dir() and (not any(out.iterdir()) or (out / "searchindex.js").is_file()))
    require(free, "--out", str(out), "a new or an empty folder, or an earlier book")
    try:
        import latex2mathml  # noqa: F401
        import myst_nb  # noqa: F401
        import sphinx_book_theme  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"A book needs {error.name}, which is not installed: pip install 'reconkit[book]'.") from None
    solutions = sorted(p for p in (notebooks / "solutions").glob("*.ipynb") if p.stem in executed)
    kept = (notebooks / CONTENTS, *(notebooks / f"{name}.ipynb" for name in executed), *solutions)
    pages = {file.resolve(): file.relative_to(notebooks).as_posix() for file in kept}
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "source", Path(folder) / "book"
        (source / "solutions").mkdir(parents=True)
        (source / "conf.py").write_text(CONF, encoding="utf-8")
        for name, file in executed.items():
            _write(file, source, f"{name}.ipynb", pages, repository)
        for file in solutions:
            _write(file, source, f"solutions/{file.name}", pages, repository)
        text = paged((notebooks / CONTENTS).read_text(encoding="utf-8"), notebooks, CONTENTS, pages, repository)
        trees = [_tree("The series", sorted(executed)), _tree("Solutions", [f"solutions/{p.stem}" for p in solutions])]
        (source / CONTENTS).write_text("\n\n".join([text, *trees]), encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-b", "html", source, made], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"Sphinx failed: {' '.join(done.stderr.splitlines()[-3:])}")
        for left in (".doctrees", "_sources"):
            shutil.rmtree(made / left, ignore_errors=True)
        shutil.copy(made / "README.html", made / "index.html")
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, out)


def _tree(caption: str, pages: Sequence[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]) if pages else ""


def _write(file: Path, source: Path, page: str, pages: Mapping[Path, str], repository: str) -> None:
    book = nbformat.read(file, as_version=4)
    setup = next((cell for cell in book.cells if cell.cell_type == "code" and "ImportError" in cell.source), None)
    for cell, text in zip(book.cells, described(book), strict=True):
        if cell.cell_type == "markdown":
            cell.source = paged(cell.source, file.parent, page, pages, repository)
        elif text:
            cell.metadata["mystnb"] = {"image": {"alt": text}}
        if cell is setup:
            cell.metadata["tags"] = ["hide-input"]
    book.cells = [cell for cell in book.cells if "injected-parameters" not in cell.metadata.get("tags", [])]  # they repeat the cell before
    nbformat.write(book, source / page)


def relinked(text: str, folder: Path, lead: Callable[[Path], str]) -> str:
    """Markdown whose links to files, written for `folder`, lead where `lead` says."""

    def there(match: re.Match[str]) -> str:
        target, _, anchor = match[1].partition("#")
        if not target or re.match(r"\w+:", target):
            return match[0]
        return f"]({lead((folder / target).resolve())}{'#' + anchor if anchor else ''})"

    return LINK.sub(there, text)


def paged(text: str, folder: Path, page: str, pages: Mapping[Path, str], repository: str) -> str:
    """Markdown whose links stay in the book where it has the file, or its executed copy, and else lead to the repository; badges become words."""
    root = next((p for p in folder.resolve().parents if (p / "pyproject.toml").is_file()), folder.resolve())

    def lead(file: Path) -> str:
        other = pages.get(file, f"{file.parent.name}.ipynb" if file.name == COPY else "")
        if other in pages.values():
            return os.path.relpath(other, Path(page).parent)
        return f"{repository}/blob/main/{file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name}"

    return relinked(EXECUTED.sub("", BADGE.sub(r"[\1](\2)", text)), folder, lead)


def described(book: Any) -> list[str]:
    """An alternative text for each cell that shows a picture, "" for the others: the figure's name, and how the notebook reads it."""
    found = []
    for i, cell in enumerate(book.cells):
        outputs = cell.get("outputs", [])
        if not any(kind.startswith("image/") for o in outputs for kind in o.get("data", {})):
            found.append("")
            continue
        name = SAVED.search(cell.source)
        reading = next((t for c in book.cells[i + 1 : i + 3] if (t := _said(c))), "")
        parts = [f"Figure: {name[1].replace('_', ' ')}" if name else "Figure", " ".join(reading.split()[:WORDS])]
        found.append(". ".join(p for p in parts if p))
    return found


def _said(cell: Any) -> str:
    shown = [o.get("data", {}) for o in cell.get("outputs", [])]
    texts = [cell.source] if cell.cell_type == "markdown" else [data["text/markdown"] for data in shown if "text/markdown" in data]
    return re.sub(r"[*`>#\[\]]|\(http[^)]*\)", "", " ".join("".join(t) for t in texts)).strip()

"""The book: every link and picture resolves without a network, and its search finds."""

from __future__ import annotations

import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from conftest import browser

from reconkit import book, suite
from reconkit.config import ConfigError

ROOT = Path(__file__).parent.parent
ADDRESS = "https://example.org/me/reconkit"


def test_links_stay_in_the_book_where_it_has_the_page() -> None:
    folder = ROOT / "notebooks"
    pages = {folder / name: name for name in ("README.md", "00_start_here.ipynb", "solutions/00_start_here.ipynb")}
    text = (
        "[a](00_start_here.ipynb) [b](README.md#x) [c](01_pruning_criteria.ipynb)"
        " [d](../README.md#other) [e](https://x.y) [f](#z)"
        " · [executed copy](../papermill_runs/x/notebook.ipynb) · [![Open In Colab](https://a/b.svg)](https://colab)"
    )
    assert book.paged(text, folder, "01.ipynb", pages, ADDRESS) == (
        f"[a](00_start_here.ipynb) [b](README.md#x) [c]({ADDRESS}/blob/main/notebooks/01_pruning_criteria.ipynb)"
        f" [d]({ADDRESS}/blob/main/README.md#other) [e](https://x.y) [f](#z) · [Open In Colab](https://colab)"
    )
    assert book.paged("[up](../README.md)", folder / "solutions", "solutions/a.ipynb", pages, ADDRESS) == "[up](../README.md)"
    copy = (
        "[a](../00_start_here/notebook.ipynb) [b](../01_other/notebook.ipynb) [c](../../notebooks/README.md#x)"
        " · [notebook](../../notebooks/02.ipynb)"
    )
    assert book.paged(copy, ROOT / "papermill_runs" / "02", "02.ipynb", pages, ADDRESS) == (
        f"[a](00_start_here.ipynb) [b]({ADDRESS}/blob/main/papermill_runs/01_other/notebook.ipynb) [c](README.md#x)"
    )


def test_a_picture_is_described_by_its_name_and_its_reading() -> None:
    def code(source: str, **data: str) -> nbformat.NotebookNode:
        return nbformat.v4.new_code_cell(source, outputs=[nbformat.v4.new_output("display_data", data=data)] if data else [])

    picture, reading = {"image/png": "iVBORw0KGgo="}, {"text/markdown": "It *fell* by [9 %](https://x)."}
    pages = nbformat.v4.new_notebook(
        cells=[code('plots.save(axes, "error_by_block", t, out_dir)', **picture), code("Markdown()", **reading), code("show()", **picture), code("1")]
    )
    assert book.described(pages) == ["Figure: error by block. It fell by 9 %.", "", "Figure", ""]


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="run a suite first"):
        book.build({}, tmp_path, tmp_path / "out", ADDRESS)
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match="an earlier book"):
        book.build({"a": tmp_path}, tmp_path, tmp_path, ADDRESS)
    assert (tmp_path / "mine.txt").is_file()
    monkeypatch.setitem(sys.modules, "myst_nb", None)
    with pytest.raises(ConfigError, match=r"reconkit\[book\]"):
        book.build({"a": tmp_path}, tmp_path, tmp_path / "out", ADDRESS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The book of the published copies."""
    published = ROOT / "papermill_runs" / "published" / "offline"
    copies = {e.name: published / e.name / "notebook.ipynb" for e in suite.load_manifest(ROOT / "papermill_runs" / "offline.toml").entries}
    executed = {name: file for name, file in copies.items() if file.is_file()}
    out = tmp_path_factory.mktemp("book") / "offline"
    book.build(executed, ROOT / "notebooks", out, ADDRESS)
    return out


@pytest.mark.slow
def test_every_link_and_picture_resolves_and_nothing_is_fetched(made: Path) -> None:
    pages = sorted(p for p in made.rglob("*.html") if "_static" not in p.parts)
    assert len([p for p in pages if re.match(r"\d\d_", p.name)]) >= 28, "notebooks and solutions"
    for page in pages:
        text = page.read_text(encoding="utf-8")
        anchors = set(re.findall(r'\bid="([^"]+)"', text))
        for kind, target in re.findall(r'<(?:a|link|img|script)\b[^>]*?\b(href|src)="([^"]*)"', text):
            address, _, anchor = unescape(target).partition("#")
            if re.match(r"\w+:", address):
                assert kind == "href" and "stylesheet" not in target, f"{page.name} would fetch {target}"
                continue
            file = page.parent / unquote(address.partition("?")[0]) if address else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor and not address:
                assert unquote(anchor) in anchors, f"{page.name}: #{anchor}"
        for picture in re.findall(r"<img\b[^>]*>", text):
            assert re.search(r'alt="Figure[^"]+"', picture), f"{page.name}: {picture[:120]} has no description"


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_without_a_network_shows_pictures_formulas_and_finds(made: Path, tmp_path: Path) -> None:
    def shown(address: str) -> str:
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=8000", "--dump-dom"]
        return subprocess.run([browser(), *words, address], capture_output=True, text=True, timeout=120).stdout

    page = made / "02_layer_and_block_reconstruction.html"
    count = "'broken:'+[...document.images].filter(i=>!i.naturalWidth).length+' of '+document.images.length"
    check = f"<script>window.onload=()=>{{document.title={count}}}</script>"
    probe = page.with_name("probe.html")
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", check + "</body>"), encoding="utf-8")
    text = shown(probe.as_uri())
    assert re.search(r"<title>broken:0 of [1-9]", text) and "<math" in text and "$$" not in text
    found = shown((made / "search.html").as_uri() + "?q=overfitting")
    assert 'href="07_overfitting.html' in found

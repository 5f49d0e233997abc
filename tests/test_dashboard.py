"""The dashboard, from a history made here; what needs a browser is tried in headless Chromium."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import browser

from reconkit import dashboard, history
from reconkit.config import ConfigError

NASTY = "<img src=x onerror=document.title='broken'></script><b>"
ENVIRONMENT = json.dumps({"python": "3.11.7", "torch": "2.13.0", "system": "Linux"})


def add(store: history.Store, name: str, number: int, perplexity: float, **facts: Any) -> int:
    """A version with what a run measures."""
    told = {
        "version": name, "created": f"2026-01-01T{number // 3600:02}:{number // 60 % 60:02}:{number % 60:02}Z", "model": "tiny", "technique": "BR",
        "criterion": "wanda", "pattern": "unstructured", "sparsity": 0.5, "verdict": "fine", "hardware": "X, 2 cores", "environment": ENVIRONMENT,
    }  # fmt: skip
    rows = [
        {"metric": "perplexity", "test_set": "wiki", "value": perplexity, "low": perplexity - 2, "high": perplexity + 2, "stderr": 1.0, "n": 12},
        {"metric": "nmse", "test_set": "calibration", "value": 0.1 + number / 1000},
        {"metric": "accuracy", "test_set": "boolq", "value": 0.5, "stderr": 0.05, "n": 100},
        {"metric": "seconds", "test_set": "prune", "value": 10.0 + number},
        {"metric": "memory", "test_set": "gpu", "value": 0.0},
        {"metric": "error ratio", "test_set": "news", "value": float("nan")},
    ]  # fmt: skip
    blocks = pd.DataFrame({"block": [0, 1, 2], "source": "calibration", "nmse": [0.01, 0.05, 0.1]})
    return store.append({**told, **facts}, rows, blocks)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with history.Store(tmp_path / "history.sqlite") as found:
        add(found, "aaa", 1, 25.0, technique="dense", criterion=None, verdict=None)
        add(found, "bbb", 2, 42.125, parent="aaa", commit="0123abc")
        add(found, "ccc", 3, 37.25, parent="bbb", model="tiny", verdict="watch")
        found.tag("good", "bbb")
        yield found


class Page(HTMLParser):
    """Tags, links, and the text of table cells and tiles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def figures(text: str) -> list[dict[str, Any]]:
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1].replace("<\\/", "</"))


def test_the_page_shows_the_stores_numbers_and_needs_no_network(store: history.Store) -> None:
    text = dashboard.page(store)
    page = Page(text)
    assert not [link for link in page.links if not link.startswith("#")]
    for value in ("ccc", "good", "42.12", "37.25", "0.103", "watch", "0123abc", "3.11.7", "X, 2 cores"):
        assert value in page.cells, value
    assert "nan" not in page.cells and "None" not in page.cells
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert "Perplexity" in titles and "Error ratio" not in " ".join(titles), "nothing is drawn that has no number"
    assert "Peak memory, in bytes" not in titles, "a GPU that is not there has no memory"
    charts = [title for title in titles if title not in ("Alerts", "Versions", "Where they were made", "ccc beside others")]
    drawn = dict(zip(charts, figures(text), strict=True))
    [line] = drawn["Perplexity"]["data"]
    assert line["name"] == "wiki" and drawn["Perplexity"]["layout"]["xaxis"]["ticktext"] == ["aaa", "good", "ccc"]
    blocks = drawn["Error after each block"]["data"]
    assert [trace["name"] for trace in blocks] == ["ccc, calibration", "good, calibration"], "the dense model has none"


def test_the_newest_stands_beside_its_parent_and_the_dense_model(store: history.Store) -> None:
    table = dashboard._beside(store.versions().assign(parent=[None, "aaa", "good"]), store.measurements()).set_index("measurement")
    assert list(table.columns) == ["value", "against its parent (good)", "against dense (aaa)"]
    assert table.loc["perplexity/wiki", "against its parent (good)"].startswith("-11.6% (")
    assert (
        table.loc["accuracy/boolq", "against dense (aaa)"].startswith("+0.0 points (") and table.loc["error ratio/news", "against dense (aaa)"] == ""
    )
    assert table.loc["seconds/prune", "against its parent (good)"] == "+8.3%"
    add(store, "ddd", 4, 30.0, parent="ccc", hardware="another")
    text = dashboard.page(store)
    assert "against its parent (ccc)" in text
    table = dashboard._beside(store.versions().assign(parent=[None, "aaa", "good", "ccc"]), store.measurements()).set_index("measurement")
    assert table.loc["seconds/prune", "against its parent (ccc)"] == "", "times compare on the same hardware only"


def test_one_version_and_no_alert_are_a_page_too(tmp_path: Path) -> None:
    with history.Store(tmp_path / "one.sqlite") as one:
        add(one, "only", 1, 30.0)
        text = dashboard.page(one)
        assert "No alert fired" in text and "only beside others" in text and "against" not in "".join(Page(text).cells)
        one.add_alerts([{"number": 1, "name": "only", "rule": "r", "severity": "error", "metric": "m", "test_set": "", "message": "It is <worse>."}])
        assert "It is <worse>." in Page(dashboard.page(one)).cells


def test_markup_in_what_runs_say_is_text(store: history.Store) -> None:
    add(store, "ddd", 4, 30.0, model=NASTY, technique=NASTY, hardware=NASTY, criterion=NASTY)
    text = dashboard.page(store)
    page = Page(text)
    assert "img" not in page.tags and "b" not in page.tags and page.tags.count("script") == 3 and NASTY in page.cells
    assert "<img" not in json.dumps(figures(text))


def test_without_plotly_it_is_refused_in_a_sentence(store: history.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ConfigError, match="pip install plotly"):
        dashboard.page(store)


def test_no_history_writes_no_page(tmp_path: Path) -> None:
    assert dashboard.report(tmp_path / "page.html") is None
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tried(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(text: str, script: str, size: str = "1300,900", *, real_time: bool = False) -> dict[str, Any]:
        """What `script`, which fills the object `found` when the page is there, finds in the page; in `real_time` it cannot wait."""
        body = f"{script}; const out = document.createElement('pre'); out.id = 'found'; document.body.append(out);"
        body += "out.textContent = JSON.stringify(found);"
        begun = "const found = {}; const wait = ms => new Promise(r => setTimeout(r, ms));"
        last = f"<script>{begun} {body}</script></body>"
        if not real_time:
            last = f"<script>window.addEventListener('load', async () => {{ {begun} await wait(300); {body} }});</script></body>"
        file = tmp_path / "tried.html"
        file.write_text(text.replace("</body>", last), encoding="utf-8")
        words = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={size}", "--dump-dom"]
        words += [] if real_time else ["--virtual-time-budget=20000"]
        out = subprocess.run([browser(), *words, file.as_uri()], capture_output=True, text=True, timeout=120).stdout
        return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', out, re.DOTALL)[1]))

    return run


READ = "const cells = (id, n) => Array.from(document.querySelectorAll(`#table-${id} tbody tr:not([hidden])`), r => r.cells[n].textContent);"


@pytest.mark.browser
def test_tables_sort_and_filter(store: history.Store, tried: Callable[..., dict[str, Any]]) -> None:
    script = (
        READ
        + """
        const heads = Array.from(document.querySelectorAll('#table-versions th'));
        const place = heads.findIndex(h => h.textContent === 'perplexity/wiki');
        found.before = cells('versions', 0);
        heads[place].querySelector('button').click(); found.up = cells('versions', place); found.said = heads[place].getAttribute('aria-sort');
        heads[place].querySelector('button').click(); found.down = cells('versions', place);
        const box = document.querySelector('#versions input');
        box.value = 'WATCH'; box.dispatchEvent(new Event('input')); found.left = cells('versions', 0);
        found.count = document.querySelector('#versions output').textContent;
        box.value = ''; box.dispatchEvent(new Event('input')); found.all = cells('versions', 0).length"""
    )
    found = tried(dashboard.page(store), script)
    assert found["before"] == ["ccc", "good", "aaa"] and found["up"] == ["25", "37.25", "42.12"] == found["down"][::-1]
    assert found["said"] == "ascending" and found["left"] == ["ccc"] and found["count"] == "1 of 3" and found["all"] == 3


@pytest.mark.browser
def test_charts_are_drawn_and_markup_stays_inert(store: history.Store, tried: Callable[..., dict[str, Any]]) -> None:
    add(store, "ddd", 4, 30.0, model=NASTY, technique=NASTY, hardware=NASTY)
    script = """
        document.querySelectorAll('.chart').forEach(chart => draw(chart)); await wait(1500);
        found.drawn = Array.from(document.querySelectorAll('.chart'), c => c.querySelectorAll('svg .trace').length);
        found.images = document.querySelectorAll('img').length; found.title = document.title;
        found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth"""
    for size in ("1300,900", "500,900"):
        found = tried(dashboard.page(store), script, size)
        assert len(found["drawn"]) == 6 and all(found["drawn"]) and found["images"] == 0 and "broken" != found["title"]
        assert found["wide"] <= 0, "only tables scroll sideways"


@pytest.mark.browser
@pytest.mark.slow
def test_a_thousand_versions(tmp_path: Path, tried: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    """50 metrics each: the page is made within 10 s, and filters within 200 ms."""
    draw = np.random.default_rng(0)
    with history.Store(tmp_path / "big.sqlite") as store:
        store.base.execute("PRAGMA synchronous = OFF")
        for i in range(1000):
            sets = ("wiki", "news", "pydocs", "self", "c4", "ptb", "a", "b", "c", "d")
            rows = [
                {"metric": metric, "test_set": name, "value": draw.random(), "low": 0.0, "high": 1.0}
                for metric in ("perplexity", "accuracy", "nmse", "error ratio", "seconds") for name in sets
            ]  # fmt: skip
            told = {"version": f"v{i}", "created": "2026-01-01T00:00:00Z", "model": "tiny", "technique": ("LR", "BR")[i % 2]}
            store.append({**told, "environment": ENVIRONMENT}, rows, pd.DataFrame({"block": range(30), "source": "calibration", "nmse": 0.1}))
        start = time.perf_counter()
        text = dashboard.page(store)
        seconds = time.perf_counter() - start
    script = (
        READ
        + """
        const box = document.querySelector('#versions input'), start = performance.now();
        box.value = 'v99'; box.dispatchEvent(new Event('input')); document.body.offsetHeight; found.ms = performance.now() - start;
        found.left = cells('versions', 0).length"""
    )
    found = tried(text, script, real_time=True)
    with capsys.disabled():
        print(f"\n1,000 versions × 50 metrics: page in {seconds:.1f} s, {len(text) / 1e6:.1f} MB; filtered in {found['ms']:.0f} ms")
    assert found["left"] == 11 and 0 < found["ms"] < 200 and seconds < 10

"""The ledger: the paper's claims beside what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reconkit import ledger, paper

ROW = {"claim": "mine", "paper": "1", "expected here": "2", "measured": "3 [2, 4]"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    told = {
        "a": [{**ROW, "holds": "yes", "of": 3}, {**ROW, "holds": "no", "why": "nobody asked"}],
        "b": [{**ROW, "holds": "no", "of": 3, "why": "few | steps"}, {**ROW, "claim": "<other>", "holds": "no", "of": 7}],
    }
    for name, rows in told.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "claims.json").write_text(json.dumps(rows))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "claims.json").write_text("{")
    return tmp_path


def test_every_claim_of_the_paper_has_a_row_and_only_numbered_ones_answer(folder: Path) -> None:
    table = ledger.collect(folder, ["a", "b", "broken", "missing"])
    assert table.number.drop_duplicates().tolist() == paper.table("claims").number.tolist() == list(range(1, 9))
    third = table[table.number == 3]
    assert third.run.tolist() == ["a", "b"] and third.holds.tolist() == ["yes", "no"] and third.why.tolist() == ["", "few | steps"]
    assert "nobody asked" not in table.to_csv()


def test_verdicts(folder: Path) -> None:
    table = ledger.collect(folder, ["a", "b"])
    said = {number: ledger.verdict(rows) for number, rows in table.groupby("number")}
    assert said == {3: "holds in part", 7: "not shown here", **dict.fromkeys((1, 2, 4, 5, 6, 8), "not run")}
    assert ledger.verdict(table[(table.number == 3) & (table.run == "a")]) == "holds here"


def test_pages_say_what_the_table_says(folder: Path) -> None:
    table = ledger.collect(folder, ["a", "b"])
    page, text = ledger.as_html(table), ledger.as_markdown(table, "published/x")
    assert page.count("<h3>") == 8 and "3 [2, 4]" in page and "&lt;other&gt;" in page and "<other>" not in page
    lines = text.splitlines()
    assert len(lines) == 10 and "not run yet" in lines[2] and "(published/x/a/notebook.ipynb)" in lines[4]
    assert "few \\| steps" in lines[4] and "✓ mine" in lines[4] and "✗ mine" in lines[4] and "**holds in part**" in lines[4]


def test_only_the_marked_place_of_a_page_is_written() -> None:
    page = "a\n<!-- ledger of x -->\nold\n<!-- end of ledger -->\nb"
    once = ledger.written_into(page, "x", "new")
    assert once == "a\n<!-- ledger of x -->\n\nnew\n\n<!-- end of ledger -->\nb"
    assert ledger.written_into(once, "x", "new") == once
    assert ledger.written_into(page, "y", "new") == page and ledger.written_into("c", "x", "new") == "c"

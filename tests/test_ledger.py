"""The ledger: the paper's claims beside what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
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


@pytest.mark.parametrize(
    ("holds", "expected"),
    [
        (["not resolvable"], "not resolvable here"),
        (["no", "not resolvable"], "not shown here"),
        (["yes", "not resolvable"], "holds in part"),
        (["yes", "yes"], "holds here"),
        ([""], "not run"),
    ],
)
def test_a_claim_that_no_run_resolves_is_called_so(holds: list[str], expected: str, tmp_path: Path) -> None:
    rows = [{**ROW, "holds": word, "of": 6} for word in holds if word]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "claims.json").write_text(json.dumps(rows))
    table = ledger.collect(tmp_path, ["a"])
    assert ledger.verdict(table[table.number == 6]) == expected
    line = ledger.as_markdown(table, "published/x").splitlines()[7]
    assert f"**{expected}**" in line and line.count("? mine") == holds.count("not resolvable")


def test_both_measures_of_the_error_are_named_and_where_they_disagree() -> None:
    def run(nmse: float, token: float) -> SimpleNamespace:
        return SimpleNamespace(final_errors=pd.DataFrame({"nmse": [nmse, 9.0], "token_nmse": [token, 9.0]}, index=["calibration", "wiki"]))

    pairs = {"magnitude": (run(0.5, 0.4), run(0.6, 0.3)), "wanda": (run(0.2, 0.2), run(0.1, 0.15))}
    changes = ledger.error_changes(pairs)
    assert changes.nmse.tolist() == pytest.approx([0.2, -0.5]) and changes.token_nmse.tolist() == pytest.approx([-0.25, -0.25])
    assert changes.loc["magnitude", ["nmse_before", "nmse_after", "token_before", "token_after"]].tolist() == [0.5, 0.6, 0.4, 0.3]
    assert changes.agree.tolist() == [False, True] and (ledger.error_changes(pairs, "wiki").nmse == 0).all()
    text = ledger.describe_changes(changes)
    assert "magnitude 0.500 → 0.600 (token NMSE 0.400 → 0.300)" in text and text.endswith("disagree in direction for magnitude")
    assert "disagree" not in ledger.describe_changes(changes[1:])


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

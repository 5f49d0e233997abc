"""The published numbers are whole and say what the notebooks quote."""

from __future__ import annotations

import pytest

from reconkit import paper
from reconkit.config import ConfigError


def test_tables_are_those_of_the_paper() -> None:
    assert set(paper.TABLES) == {"tables_1_3", "tables_2_4", "table_6", "table_7", "figure_1b", "claims"}
    t = paper.table("tables_1_3").set_index(["model", "criterion", "technique"])
    assert len(t) == 26 and t.wikitext2_ppl["llama-7b", "magnitude", "LR"] == 17.29 and t.final_block_mse["opt-125m", "wanda", "BR+GP+CR"] == 0.004


def test_measured_perplexities_stand_beside_the_published_ones() -> None:
    measured = {("", "dense", "wikitext2"): 27.66, ("wanda", "BR", "c4"): 31.0, ("wanda", "BR", "news"): 1.0, ("other", "BR", "c4"): 1.0}
    found = paper.beside(measured, "opt-125m").set_index(["criterion", "technique", "corpus"])
    published = paper.table("tables_1_3").set_index(["model", "criterion", "technique"]).c4_ppl["opt-125m", "wanda", "BR"]
    assert len(found) == 2 and found.published["wanda", "BR", "c4"] == published
    assert found.difference["wanda", "BR", "c4"] == pytest.approx(31.0 / published - 1) and abs(found.difference["", "dense", "wikitext2"]) < 0.01
    assert paper.beside(measured, "").empty
    with pytest.raises(ConfigError, match="llama-7b"):
        paper.beside(measured, "gpt-2")


def test_the_claims_that_the_notebooks_quote_follow_from_the_tables() -> None:
    t = paper.table("tables_1_3").set_index(["model", "criterion", "technique"])
    names = ("sparsegpt", "wanda", "magnitude")
    cells = [(m, c, p) for m in ("llama-7b", "opt-125m") for c in names for p in ("wikitext2_ppl", "ptb_ppl", "c4_ppl")]
    assert sum(t[p][m, c, "BR+GP"] < t[p][m, c, "BR"] for m, c, p in cells) == 17, "GP against BR: 17 of 18"
    assert sum(t[p][m, c, "BR+GP+CR"] < t[p][m, c, "BR+GP"] for m, c, p in cells if m == "opt-125m") == 9
    assert sum(t[p][m, c, "BR+GP+CR"] < t[p][m, c, "BR+GP"] for m, c, p in cells if m == "llama-7b") == 0
    cut = [1 - t.final_block_mse["llama-7b", c, "BR+GP+CR"] / t.final_block_mse["llama-7b", c, "LR"] for c in names]
    assert (round(min(cut), 2), round(max(cut), 2)) == (0.87, 0.94)


def test_an_unknown_table_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="table_7"):
        paper.table("table_9")

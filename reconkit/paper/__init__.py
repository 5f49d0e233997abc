"""Numbers that Shin et al. (EMNLP 2024, arXiv 2406.15524) published, as tables: facts to set beside our own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from ..config import one_of, require

TABLES = tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.csv")))


def table(name: str) -> pd.DataFrame:
    """A published table: tables_1_3 (error, perplexity, accuracy), tables_2_4 (test error), table_6, table_7, figure_1b, claims.

    Raises:
        ConfigError: no table is called so.
    """
    require(name in TABLES, "table", name, one_of(TABLES))
    return pd.read_csv(Path(__file__).with_name(f"{name}.csv"))


TEXTS = {"wikitext2": "wikitext2_ppl", "ptb": "ptb_ppl", "c4": "c4_ppl"}
"Corpora that the paper reports perplexities on, and their columns in tables_1_3."


def beside(measured: Mapping[tuple[str, str, str], float], model: str) -> pd.DataFrame:
    """Measured perplexities beside those of Table 1 or 3, cell by cell.

    Args:
        measured: by (criterion, technique, corpus); the dense model's are at ("", "dense", corpus). Other corpora are left out.
        model: llama-7b or opt-125m, as the tables have it; "": nothing to compare with.

    Returns:
        criterion, technique, corpus, measured, published, difference (relative).

    Raises:
        ConfigError: the paper has no such model.
    """
    names = ["criterion", "technique", "corpus", "measured", "published", "difference"]
    if not model:
        return pd.DataFrame(columns=names)
    known = table("tables_1_3").fillna({"criterion": ""})
    require(model in set(known.model), "published", model, one_of(tuple(dict.fromkeys(known.model))))
    rows = known[known.model == model].set_index(["criterion", "technique"])
    found = [(c, t, d, value, float(rows[TEXTS[d]][c, t])) for (c, t, d), value in measured.items() if d in TEXTS and (c, t) in rows.index]
    return pd.DataFrame([(*row, row[3] / row[4] - 1) for row in found], columns=names)

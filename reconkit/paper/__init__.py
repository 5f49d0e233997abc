"""Numbers that Shin et al. (EMNLP 2024, arXiv 2406.15524) published, as tables: facts to set beside our own."""

from __future__ import annotations

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

"""What was measured, of every version, for good: an SQLite file to which rows are only ever added.

It knows nothing of models and run folders: `runs` says what a version is. Several processes may write at once, and one that is
killed leaves either all rows of a version or none. Frames:

    versions      number (in order of recording), version (the run's id), tag, name (tag or version), parent (a version), model,
                  configuration (sum of what was asked), commit, hardware (times compare only within one), created (UTC), seconds,
                  cost, verdict, reasons, corpus, criterion, technique, pattern, sparsity, settings and environment (JSON)
    measurements  number, version, metric, test_set, value (NaN: not finite), low, high (95 %), stderr, n, unit, direction
                  ("lower" or "higher" is better, or ""), sample (sum of the items that were answered), items (JSON, by item)
    blocks        number, block, source, nmse
    alerts        see `ALERTS`
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from .assets import cache_dir
from .config import ConfigError, require

SCHEMA = 1
WAIT = 60.0  # seconds that a writer waits for another one
FACTS = {
    "version": "TEXT NOT NULL", "parent": "TEXT", "model": "TEXT", "configuration": "TEXT", "commit": "TEXT", "hardware": "TEXT",
    "created": "TEXT NOT NULL", "seconds": "REAL", "cost": "REAL", "verdict": "TEXT", "reasons": "TEXT", "corpus": "TEXT",
    "criterion": "TEXT", "technique": "TEXT", "pattern": "TEXT", "sparsity": "REAL", "settings": "TEXT", "environment": "TEXT",
}  # fmt: skip
MEASURED = {
    "metric": "TEXT NOT NULL", "test_set": "TEXT NOT NULL", "value": "REAL", "low": "REAL", "high": "REAL", "stderr": "REAL",
    "n": "INTEGER", "unit": "TEXT", "direction": "TEXT", "sample": "TEXT", "items": "TEXT",
}  # fmt: skip
BLOCKS = {"block": "INTEGER NOT NULL", "source": "TEXT NOT NULL", "nmse": "REAL"}
ALERTS = {
    "created": "TEXT NOT NULL", "number": "INTEGER NOT NULL", "version": "TEXT", "name": "TEXT", "rule": "TEXT NOT NULL", "severity": "TEXT",
    "metric": "TEXT", "test_set": "TEXT NOT NULL", "against": "TEXT", "reference": "TEXT", "value": "REAL", "reference_value": "REAL",
    "change": "REAL", "low": "REAL", "high": "REAL", "limit": "REAL", "message": "TEXT",
}  # fmt: skip
TAGS = {"tag": "TEXT NOT NULL", "version": "TEXT NOT NULL", "created": "TEXT NOT NULL"}
TABLES = {
    "versions": (FACTS, ', UNIQUE ("version", "created")'),
    "measurements": ({"number": "INTEGER NOT NULL", **MEASURED}, ', UNIQUE ("number", "metric", "test_set")'),
    "blocks": ({"number": "INTEGER NOT NULL", **BLOCKS}, ', UNIQUE ("number", "block", "source")'),
    "tags": (TAGS, ""),
    "alerts": (ALERTS, ', UNIQUE ("number", "rule", "test_set")'),
}


RENAMED = {"gap": "error ratio"}
"Metrics whose rows were once written under another name; they are read under the new one."


class Damaged(RuntimeError):
    """The file is not, or no longer, a whole history."""


def named() -> bool:
    """Whether RECONKIT_HISTORY names the file."""
    return bool(os.environ.get("RECONKIT_HISTORY"))


def path() -> Path:
    """RECONKIT_HISTORY, or history.sqlite in the cache."""
    return Path(os.environ["RECONKIT_HISTORY"]) if named() else cache_dir() / "history.sqlite"


def check_name(field: str, name: str) -> None:
    """Refuse a name of a version that could be a path, or markup.

    Raises:
        ConfigError: the name.
    """
    fit = isinstance(name, str) and re.fullmatch(r"[\w.+-]{1,100}", name) is not None and ".." not in name
    require(fit, field, name, "up to 100 letters, digits and . _ + -, without ..")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Store:
    """An open history; use it in a `with`."""

    def __init__(self, file: str | Path | None = None) -> None:
        """Open, or make, the file.

        Raises:
            ConfigError: a newer reconkit wrote it.
            Damaged: it cannot be read; the message says what of it can be saved.
            OSError: no room, or no permission.
        """
        self.file = Path(file) if file else path()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self._said():
            self.base = sqlite3.connect(self.file, timeout=WAIT, isolation_level=None)
            found = self.base.execute("PRAGMA user_version").fetchone()[0]
            if found > SCHEMA:
                self.base.close()
                raise ConfigError(f"{self.file.name} was written by a newer reconkit (history {found}, known here: {SCHEMA}); update reconkit.")
            self._log_ahead()
            self.base.execute("PRAGMA synchronous = FULL")
            if found < SCHEMA:
                self._make()

    def _log_ahead(self) -> None:
        # SQLite waits for a lock, but not to turn one that it has into another: of two that open a new file at once, one is refused
        until = time.monotonic() + WAIT
        while True:
            try:
                self.base.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
            time.sleep(0.01)

    def _make(self) -> None:
        with self._writing():
            for table, (columns, more) in TABLES.items():
                names = ", ".join(f'"{name}" {kind}' for name, kind in columns.items())
                self.base.execute(f'CREATE TABLE IF NOT EXISTS "{table}" (id INTEGER PRIMARY KEY, {names}{more})')
                for word in ("UPDATE", "DELETE"):
                    self.base.execute(
                        f'CREATE TRIGGER IF NOT EXISTS "{table} {word}" BEFORE {word} ON "{table}" '
                        "BEGIN SELECT RAISE(ABORT, 'rows of the history are only ever added'); END"
                    )
            self.base.execute(f"PRAGMA user_version = {SCHEMA}")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.base.close()

    def append(self, facts: Mapping[str, Any], measurements: Sequence[Mapping[str, Any]], blocks: pd.DataFrame | None = None) -> int | None:
        """Add a version with all its measurements, or nothing; returns its number, or None where it is there already.

        Args:
            facts: columns of `versions`, without number, tag and name.
            measurements: columns of `measurements`, without number and version; a value that is not finite is kept as none.
            blocks: block, source, nmse.

        Raises:
            ConfigError: a name that is none.
            Damaged, OSError: the file is not whole, or the disk is full; nothing of the version was added.
        """
        check_name("version", facts["version"])
        with self._said(), self._writing():
            last = self.base.execute("SELECT created FROM versions ORDER BY id DESC LIMIT 1").fetchone()
            if self.base.execute('SELECT 1 FROM versions WHERE "version" = ? AND created = ?', (facts["version"], facts["created"])).fetchone():
                return None
            number = self._insert("versions", FACTS, [facts])
            self._insert("measurements", TABLES["measurements"][0], ({"number": number, **row} for row in measurements))
            if blocks is not None:
                self._insert("blocks", TABLES["blocks"][0], ({"number": number, **row} for row in blocks.to_dict("records")))
        if last and (today := now()) < last[0]:
            print(f"The clock went back, from {last[0]} to {today}; the history keeps the order of recording.", file=sys.stderr)
        return number

    def _insert(self, table: str, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> int:
        names = list(columns)
        told = f'INSERT INTO "{table}" ({", ".join(map(_quoted, names))}) VALUES ({", ".join("?" * len(names))})'
        last = 0
        for row in rows:
            last = self.base.execute(told, [_plain(row.get(name)) for name in names]).lastrowid
        return last

    def tag(self, tag: str, version: str) -> None:
        """Give a version a name; the latest word on a name counts."""
        check_name("tag", tag)
        with self._said(), self._writing():
            self._insert("tags", TAGS, [{"tag": tag, "version": version, "created": now()}])

    def add_alerts(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Keep alerts, each once for a number, rule and test set; returns those that are new, with when that was."""
        new = []
        with self._said(), self._writing():
            for row in ({"created": now(), **row} for row in rows):
                key = (row["number"], row["rule"], row["test_set"])
                if not self.base.execute('SELECT 1 FROM alerts WHERE "number" = ? AND rule = ? AND test_set = ?', key).fetchone():
                    self._insert("alerts", ALERTS, [row])
                    new.append(row)
        return new

    def versions(self) -> pd.DataFrame:
        """One row a version, oldest first."""
        found = self._read("SELECT id AS number, * FROM versions ORDER BY id").drop(columns="id")
        # a name belongs to the version that got it last, and a version has the last of its names
        tags = self._read("SELECT tag, version FROM tags ORDER BY id").drop_duplicates("tag", keep="last").drop_duplicates("version", keep="last")
        tag = found.version.map(tags.set_index("version").tag) if len(found) else pd.Series(dtype=object)
        found.insert(2, "tag", tag.astype(object).where(tag.notna(), None))
        found.insert(3, "name", found.tag.where(found.tag.notna(), found.version))
        return found

    def measurements(self, numbers: Iterable[int] | None = None, metric: str | None = None) -> pd.DataFrame:
        """The measurements of all, or of some, versions."""
        names = None if metric is None else [metric, *(old for old, new in RENAMED.items() if new == metric)]
        asked, values = _where({"m.number": numbers, "m.metric": names})
        columns = ", ".join(f"m.{_quoted(name)}" for name in MEASURED)
        joint = "measurements m JOIN versions v ON v.id = m.number"
        return self._read(f"SELECT m.number, v.version, {columns} FROM {joint} {asked} ORDER BY m.id", values)

    def blocks(self, numbers: Iterable[int] | None = None) -> pd.DataFrame:
        """The NMSE after each block by source."""
        asked, values = _where({"number": numbers})
        return self._read(f"SELECT number, block, source, nmse FROM blocks {asked} ORDER BY id", values)

    def alerts(self) -> pd.DataFrame:
        """All alerts, oldest first."""
        return self._read("SELECT * FROM alerts ORDER BY id")

    def _read(self, query: str, values: Sequence[Any] = ()) -> pd.DataFrame:
        with self._said():
            cursor = self.base.execute(query, list(values))
            names = [column[0] for column in cursor.description]
            return _renamed(pd.DataFrame(cursor.fetchall(), columns=names))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self.base.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.base.execute("COMMIT")
        except BaseException:
            if self.base.in_transaction:
                self.base.execute("ROLLBACK")
            raise

    @contextmanager
    def _said(self) -> Iterator[None]:
        """SQLite's errors in sentences."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "full" in str(error):
                raise OSError(28, "the disk is full; the history is whole without what was to be added", str(self.file)) from error
            if "malformed" in str(error):
                raise Damaged(told(self.file)) from error
            raise OSError(5, f"the history cannot be used ({error}); look at its permissions and its disk", str(self.file)) from error
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as error:
            raise Damaged(told(self.file)) from error


def _renamed(table: pd.DataFrame) -> pd.DataFrame:
    """The metrics of old rows under their new names."""
    return table.assign(metric=table.metric.replace(RENAMED)) if "metric" in table else table


def _quoted(name: str) -> str:
    return f'"{name}"'


def _plain(value: Any) -> Any:
    """A value as SQLite keeps it; what is not finite, and what is missing, is nothing."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value)
    number = float(value)
    return (int(number) if number.is_integer() and not isinstance(value, float) else number) if math.isfinite(number) else None


def _where(conditions: Mapping[str, Iterable[Any] | None]) -> tuple[str, list[Any]]:
    parts, values = [], []
    for column, allowed in conditions.items():
        if allowed is not None:
            chosen = [_plain(value) for value in allowed]
            parts.append(f"{column} IN ({', '.join('?' * len(chosen))})")
            values += chosen
    return (f"WHERE {' AND '.join(parts)}" if parts else ""), values


def called(versions: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows of `Store.versions` with that tag, else with that id, else with ids that begin so."""
    tries = (versions.tag == name, versions.version == name, versions.version.str.startswith(name))
    return next((versions[hit] for hit in tries if name and hit.any()), versions[:0])


def joined(store: Store) -> pd.DataFrame:
    """Every measurement with the facts of its version, as one long table."""
    facts = store.versions().drop(columns=["version", "reasons"])
    return store.measurements().drop(columns="items").merge(facts, on="number", how="left")


def salvage(file: str | Path) -> dict[str, pd.DataFrame]:
    """The rows of each table that can still be read, whatever is damaged between them; the file is not touched.

    Raises:
        OSError: there is no such file.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copy(file, copy)
        if (ahead := Path(f"{file}-wal")).is_file():  # what was added last
            shutil.copy(ahead, f"{copy}-wal")
        with copy.open("r+b") as whole:  # SQLite reads nothing of a file that is shorter than it says at its beginning
            header = whole.read(32)
            size, pages = int.from_bytes(header[16:18], "big"), int.from_bytes(header[28:32], "big")
            if header.startswith(b"SQLite format 3") and size * pages < 2**40:
                whole.truncate(max(copy.stat().st_size, size * pages))
        base = sqlite3.connect(copy)
        for table, (columns, _) in TABLES.items():
            told = f'SELECT id, {", ".join(map(_quoted, columns))} FROM "{table}"'
            rows = {row[0]: row for order in ("ASC", "DESC") for row in _readable(base, f"{told} ORDER BY id {order}")}
            low, high = _gap(sorted(rows))
            rows |= {row[0]: row for id in range(low, high) for row in _readable(base, f"{told} WHERE id = {id}")}
            found[table] = _renamed(pd.DataFrame([rows[id] for id in sorted(rows)], columns=["id", *columns]))
        base.close()
    return found


def _readable(base: sqlite3.Connection, query: str) -> Iterator[Sequence[Any]]:
    """Rows up to the first that cannot be read."""
    try:
        yield from base.execute(query)
    except sqlite3.DatabaseError:
        return


def _gap(ids: Sequence[int]) -> tuple[int, int]:
    """Between what was read from one side and from the other."""
    steps = [(b - a, a, b) for a, b in zip(ids, ids[1:], strict=False)]
    _, low, high = max(steps, default=(0, 0, 0))
    return low + 1, high


def salvaged(file: str | Path) -> pd.DataFrame:
    """As `joined`, of the rows of a damaged file that can still be read."""
    found = salvage(file)
    facts = found["versions"].rename(columns={"id": "number"}).drop(columns="reasons")
    return found["measurements"].drop(columns=["id", "items"]).merge(facts, on="number", how="left")


def told(file: Path) -> str:
    """What is wrong with a file, and what of it can be saved."""
    kept = {table: len(rows) for table, rows in salvage(file).items()}
    can = f"{kept['measurements']} measurements of {kept['versions']} versions can still be read"
    how = "`reconkit runs export --salvage --out FILE.csv` saves them; then move the file away, and a new history begins from the run records"
    return f"{file} is damaged, or is no history: {can}" + (f"; {how}." if kept["measurements"] else "; move it away, and a new history begins.")

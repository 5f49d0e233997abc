"""The history: rows are only ever added, and what was acknowledged is there whatever happens."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from reconkit import history
from reconkit.config import ConfigError

WRITER = """
import sys
from reconkit import history
file, mark, start = sys.argv[1], sys.argv[2], int(sys.argv[3])
with history.Store(file) as store, open(mark, "a") as done:
    for i in range(start, 100):
        version = f"{mark[-1]}-{i}"
        rows = [{"metric": "perplexity", "test_set": f"t{k}", "value": i + k / 100} for k in range(20)]
        store.append({"version": version, "created": "2026-01-01T00:00:00Z"}, rows)
        print(version, file=done, flush=True)
"""


def facts(version: str, **more: Any) -> dict[str, Any]:
    return {"version": version, "created": "2026-01-01T00:00:00Z", **more}


def rows(*values: float) -> list[dict[str, Any]]:
    return [{"metric": "perplexity", "test_set": f"t{i}", "value": value} for i, value in enumerate(values)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "history.sqlite"


def test_what_is_added_is_read_back(file: Path) -> None:
    blocks = pd.DataFrame({"block": [0, 1], "source": "calibration", "nmse": [0.1, 0.2]})
    with history.Store(file) as store:
        assert store.versions().empty and store.measurements().empty and store.blocks().empty and store.alerts().empty
        interval = {"low": 24, "high": 27, "stderr": 0.7, "n": 12}
        measured = [{"metric": "perplexity", "test_set": "wiki", "value": 25.5, **interval, "sample": "s", "items": "[1]"}]
        assert store.append(facts("a", model="tiny", sparsity=0.5, reasons=["x"], settings="{}"), measured, blocks) == 1
        assert store.append(facts("b", parent="a"), rows(1.0, 2.0)) == 2
        assert store.append(facts("b", parent="a"), rows(1.0, 2.0)) is None, "once"
        versions = store.versions()
        assert list(versions.number) == [1, 2] and list(versions.name) == ["a", "b"] and versions.parent[1] == "a"
        assert json.loads(versions.reasons[0]) == ["x"] and versions.sparsity[0] == 0.5
        [row] = store.measurements([1]).to_dict("records")
        assert {k: row[k] for k in measured[0]} == measured[0] and row["version"] == "a" and row["number"] == 1
        assert len(store.measurements()) == 3 and list(store.measurements(metric="perplexity").number) == [1, 2, 2]
        assert store.blocks([1]).drop(columns="number").equals(blocks)
    with history.Store(file) as again:
        assert len(again.versions()) == 2
        table = history.joined(again)
        assert list(table.model[:1]) == ["tiny"] and table.model[1:].isna().all() and list(table.value) == [25.5, 1.0, 2.0]


def test_rows_of_the_gap_are_read_as_error_ratios(file: Path) -> None:
    old = [{"metric": "gap", "test_set": "news", "value": 1.5}, {"metric": "nmse", "test_set": "news", "value": 0.3}]
    alert = {"number": 1, "rule": "gap grew", "metric": "gap", "test_set": "news", "message": "gap/news is 1.5."}
    with history.Store(file) as store:
        store.append(facts("a"), old)
        store.append(facts("b"), [{**old[0], "metric": "error ratio", "value": 2.0}])
        store.add_alerts([alert])
        assert store.measurements().metric.tolist() == ["error ratio", "nmse", "error ratio"]
        assert store.measurements(metric="error ratio").value.tolist() == [1.5, 2.0] and store.measurements(metric="nmse").value.tolist() == [0.3]
        assert store.alerts().metric.tolist() == ["error ratio"] and set(history.joined(store).metric) == {"error ratio", "nmse"}
        assert store.base.execute("SELECT metric FROM measurements WHERE id = 1").fetchone() == ("gap",), "what was written stays"
    assert set(history.salvage(file)["measurements"].metric) == {"error ratio", "nmse"}


def test_rows_are_only_ever_added(file: Path) -> None:
    with history.Store(file) as store:
        store.append(facts("a"), rows(1.0))
        for table in history.TABLES:
            if table == "versions" or table == "measurements":
                for told in (f'DELETE FROM "{table}"', f'UPDATE "{table}" SET id = 7'):
                    with pytest.raises(sqlite3.IntegrityError, match="only ever added"):
                        store.base.execute(told)
        assert store.measurements().value.tolist() == [1.0]


def test_tags_name_versions_and_the_latest_word_counts(file: Path) -> None:
    with history.Store(file) as store:
        for version in ("a", "b"):
            store.append(facts(version), [])
        store.tag("good", "a")
        store.tag("first", "a")
        assert list(store.versions().name) == ["first", "b"]
        store.tag("good", "b")
        assert list(store.versions().name) == ["first", "good"] and list(store.versions().tag) == ["first", "good"]


def test_values_that_are_no_numbers_are_kept_as_none(file: Path) -> None:
    with history.Store(file) as store:
        store.append(facts("a"), rows(float("nan"), float("inf"), 3.0))
        assert store.measurements().value.isna().tolist() == [True, True, False]


@pytest.mark.parametrize("name", ["../up", "a/b", "<b>x</b>", "", "a..b", "x" * 101, "two words", "a\n"])
def test_names_that_are_paths_or_markup_are_refused(name: str, file: Path) -> None:
    with history.Store(file) as store:
        with pytest.raises(ConfigError, match="version is .*; it must be up to 100 letters"):
            store.append(facts(name), [])
        with pytest.raises(ConfigError, match="tag is "):
            store.tag(name, "a")
        assert store.versions().empty


def test_a_clock_that_goes_back_is_said_and_the_order_is_kept(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with history.Store(file) as store:
        store.append(facts("a", created="2999-05-01T00:00:00Z"), [])
        assert "clock" not in capsys.readouterr().err
        store.append(facts("b", created="2026-04-01T00:00:00Z"), [])
        assert list(store.versions().version) == ["a", "b"]
    assert "The clock went back, from 2999-05-01T00:00:00Z to 20" in capsys.readouterr().err


def test_a_newer_history_is_refused(file: Path) -> None:
    history.Store(file).base.execute(f"PRAGMA user_version = {history.SCHEMA + 1}")
    with pytest.raises(ConfigError, match=f"newer reconkit .history {history.SCHEMA + 1}, known here: {history.SCHEMA}.; update"):
        history.Store(file)


def test_a_full_disk_leaves_the_history_whole(file: Path) -> None:
    with history.Store(file) as store:
        store.append(facts("a"), rows(1.0))
        store.base.execute(f"PRAGMA max_page_count = {store.base.execute('PRAGMA page_count').fetchone()[0] + 2}")
        with pytest.raises(OSError, match="the disk is full; the history is whole"):
            store.append(facts("b"), rows(*range(20_000)))
        assert list(store.versions().version) == ["a"] and len(store.measurements()) == 1
        store.base.execute("PRAGMA max_page_count = 100000")
        assert store.append(facts("b"), rows(2.0)) == 2


def big(file: Path, count: int = 300) -> bytes:
    with history.Store(file) as store:
        for i in range(count):
            store.append(facts(f"v{i}"), rows(*range(20)))
        store.base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return file.read_bytes()


def test_a_damaged_file_says_what_can_be_saved_and_is_not_touched(file: Path) -> None:
    content = big(file)
    page, half = 4096, len(content) // 8192 * 4096
    for damaged in (content[:half] + b"\xff" * 3 * page + content[half + 3 * page :], content[: 2 * half // 3], b"not a history at all" * 500):
        file.write_bytes(damaged)
        for rest in file.parent.glob("history.sqlite-*"):
            rest.unlink()
        with pytest.raises(history.Damaged, match="is damaged, or is no history: [0-9]+ measurements of [0-9]+ versions can still be read") as error:
            with history.Store(file) as store:
                store.measurements()
                store.append(facts("new"), rows(*range(1000)))
        saved = history.salvage(file)
        assert f" {len(saved['measurements'])} measurements of {len(saved['versions'])} versions" in str(error.value)
        if damaged[:6] == b"SQLite":
            assert 0 < len(saved["measurements"]) < 300 * 20 and set(saved["measurements"].value) <= set(map(float, range(20)))
            assert "--salvage" in str(error.value) and len(history.salvaged(file)) == len(saved["measurements"])
        assert file.read_bytes() == damaged
    file.unlink()
    with pytest.raises(OSError):
        history.salvage(file)


def test_two_writers_wait_for_each_other(file: Path) -> None:
    def write(name: str) -> None:
        with history.Store(file) as store:
            for i in range(50):
                store.append(facts(f"{name}{i}"), rows(1.0, 2.0))

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, "ab"))
    with history.Store(file) as store:
        assert len(store.versions()) == 100 and len(store.measurements()) == 200


def test_two_can_make_the_same_file_at_once(tmp_path: Path) -> None:
    def make(file: Path, together: threading.Barrier) -> None:
        together.wait()
        history.Store(file).base.close()

    with ThreadPoolExecutor(2) as pool:
        for i in range(40):
            list(pool.map(make, [tmp_path / str(i)] * 2, [threading.Barrier(2)] * 2))


@pytest.mark.slow
def test_killed_writers_lose_nothing_that_was_acknowledged(file: Path, tmp_path: Path) -> None:
    """Four processes add 2,000 rows each and are killed again and again, wherever they are."""
    history.Store(file).base.close()
    marks, draw = [tmp_path / f"mark-{i}" for i in range(4)], random.Random(0)

    def done(mark: Path) -> int:
        return len(mark.read_text().splitlines()) if mark.exists() else 0

    def start(mark: Path) -> subprocess.Popen[bytes]:
        with history.Store(file) as store:  # what was added but not yet acknowledged is there as well
            known = store.versions().version
        first = max([-1, *(int(v.split("-")[1]) for v in known if v.startswith(f"{mark.name[-1]}-"))]) + 1
        return subprocess.Popen([sys.executable, "-c", WRITER, str(file), str(mark), str(first)])

    running, kills, began = {mark: start(mark) for mark in marks}, 0, time.time()
    while running:
        assert time.time() - began < 300
        time.sleep(draw.uniform(0, 0.01))
        for mark, process in list(running.items()):
            if process.poll() is not None:
                assert process.returncode in (0, -signal.SIGKILL)
                del running[mark]
                if process.returncode:
                    running[mark] = start(mark)
        if running and kills < 8 and sum(map(done, marks)) > 40 * kills:  # of 400, so that a fast disk is not through before
            os.kill(draw.choice(list(running.values())).pid, signal.SIGKILL)
            kills += 1
    acknowledged = [version for mark in marks for version in mark.read_text().splitlines()]
    with history.Store(file) as store:
        assert store.base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        versions, measured = store.versions(), store.measurements()
    assert kills == 8 and set(acknowledged) <= set(versions.version)
    assert versions.version.is_unique and len(versions) == 400
    assert len(measured) == 8000 and not measured.duplicated(["version", "metric", "test_set"]).any()
    assert (measured.groupby("version").size() == 20).all(), "all rows of a version, or none"


def test_the_file_is_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert history.path() == cache / "history.sqlite"
    monkeypatch.setenv("RECONKIT_HISTORY", str(tmp_path / "new" / "h.sqlite"))
    with history.Store() as store:
        assert store.file == tmp_path / "new" / "h.sqlite" and store.file.is_file()

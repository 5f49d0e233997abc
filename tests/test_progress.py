"""One bar, plain lines off a terminal, and the state that other processes read."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest

from reconkit import progress


def test_the_state_is_on_disk_while_it_runs_and_gone_afterwards() -> None:
    with progress.Progress("BR wanda", 10, show=False) as bar:
        bar.written = 0
        bar.step(4, block=2, loss=0.25)
        [file] = progress.folder().glob("*.json")
        state = json.loads(file.read_text())
        assert (state["done"], state["total"], state["block"], state["loss"]) == (4, 10, 2, 0.25)
        assert state["seconds_left"] == pytest.approx((state["updated"] - state["started"]) / 4 * 6)
    assert not list(progress.folder().glob("*"))


def test_what_was_done_before_does_not_count_as_fast() -> None:
    with progress.Progress("BR wanda", 1000, show=False) as bar:
        bar.step(900)
        bar.started -= 60
        bar.step(10, block=3)
        bar._write()
        state = json.loads(bar.file.read_text())
        assert state["done"] == 910 and state["seconds_left"] == pytest.approx(540, rel=0.01), "6 s a step, 90 to go"


def test_off_a_terminal_lines_are_plain_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    with progress.Progress("LR", 1000) as bar:
        for _ in range(1000):
            bar.step()
    said = out.getvalue()
    assert said.count("LR") <= 3 and "\x1b" not in said and "█" not in said


def test_nothing_is_shown_where_nothing_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Progress("LR", 2, show=False) as bar:
        bar.step(2)
    assert capsys.readouterr() == ("", "")


def test_a_full_disk_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(progress.Path, "write_text", full)
    monkeypatch.setattr(progress.Path, "open", full)
    with progress.Progress("LR", 2, show=False) as bar:
        bar.keep("errors", [(0, "wiki", 0.1, 0.02)])
        bar.say("careful")
        bar.step(2)
    assert bar.done == 2


def test_tables_are_left_row_by_row_and_once() -> None:
    with progress.Progress("BR", 4, show=False) as bar:
        rows: list[tuple[int, str]] = []
        for block in range(3):
            rows.append((block, "wiki"))
            bar.keep("errors", rows)
            bar.keep("errors", rows)
        bar.say("careful")
        kept = [json.loads(line) for line in progress.log(os.getpid()).read_text().splitlines()]
        assert kept == [*(["errors", [block, "wiki"]] for block in range(3)), ["said", "careful"]]
    assert not list(progress.folder().glob("*"))

"""Watching a prune from another process, in the terminal and in a notebook."""

from __future__ import annotations

import base64
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

from reconkit import monitor, progress, runs
from reconkit.config import ConfigError, RunConfig

PRUNE = [
    sys.executable, "-m", "reconkit", "prune", "--model", "tiny", "--corpus", "pydocs", "--count", "8", "--length", "32", "--held-out", "pydocs",
    "--technique", "BR+GP", "--criterion", "wanda",
]  # fmt: skip


STARTED: list[subprocess.Popen] = []


def start(words: Sequence[str], **options: Any) -> subprocess.Popen:
    """A process that ends with the test, however that ends."""
    STARTED.append(subprocess.Popen(words, **options))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.wait()


def write_state(pid: int, **facts: object) -> Path:
    file = progress.folder() / f"{pid}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    born = psutil.Process(pid).create_time() if psutil.pid_exists(pid) else 0.0
    state = {"pid": pid, "born": born, "title": "BR+GP wanda", "done": 3, "total": 12, "started": time.time() - 65, "updated": time.time()}
    file.write_text(json.dumps(state | {"seconds_left": 190.0, "rss": 1.5e9} | facts))
    return file


def pruning(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    """A real prune in another process, once it trains."""
    process = start([*PRUNE, "--out", str(tmp_path / "out"), *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    until = time.time() + 120
    while not (states := monitor.running(str(process.pid))) or not len(monitor.course(states[0])[1]):
        assert process.poll() is None and time.time() < until
        time.sleep(0.02)
    return process


def test_dead_processes_and_numbers_used_again_are_not_running() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    write_state(ended.pid)
    write_state(os.getppid(), born=12345.0)
    write_state(os.getpid(), block=7, epoch=2, run="abcdef", tag="mine")
    (progress.folder() / "cut.json").write_text('{"pid": ')
    [state] = monitor.running()
    assert state["pid"] == os.getpid()
    for name in (str(os.getpid()), "abcdef", "abc", "mine"):
        assert monitor.running(name) == [state]
    assert monitor.running("other") == []
    rows = [["errors", [b, "wiki", 0.1, nmse, nmse, nmse]] for b, nmse in ((5, 0.01), (6, 0.02))]
    rows += [["training", ["7", 0, "calibration", 0.5]], ["said", "news parts"]]
    progress.log(os.getpid()).write_text("".join(json.dumps(row) + "\n" for row in rows) + '["err')
    said = "\n".join(monitor.lines(state))
    for text in ("BR+GP wanda", "25%", "block 7  epoch 2", "1.5 GB RAM", "1:05 so far, about 3:10 left", "mine",
                 "loss of window 7: calibration 0.5 (from 0.5)", "NMSE after block 6: wiki 0.02 (0.01 before)", "warning: news parts"):  # fmt: skip
        assert text in said, text


def test_a_late_watcher_sees_the_whole_course_and_leaves_the_run_alone(tmp_path: Path) -> None:
    process = pruning(tmp_path, "--epochs", "4000")  # killed long before its end, on a fast machine, too
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell runs in the background begins deaf to it
    watcher = start([sys.executable, "-m", "reconkit", "watch", str(process.pid)], stdout=subprocess.PIPE, text=True, preexec_fn=heard)
    said = "".join(watcher.stdout.readline() for _ in range(3))
    assert "BR+GP wanda" in said and "loss of window" in said and "pydocs" in said
    [state] = monitor.running()
    errors, training, _ = monitor.course(state)
    assert errors.block.tolist() == [b for b in range(errors.block.nunique()) for _ in range(2)]
    assert training.epoch.iloc[0] == 0 and set(training.source) == {"calibration", "pydocs"} and state["rss"] > 1e7
    watcher.send_signal(signal.SIGINT)
    rest = watcher.communicate(timeout=30)[0]
    assert watcher.returncode == 0 and "what runs goes on" in rest
    assert process.poll() is None
    process.kill()
    process.wait()
    assert monitor.running() == [], "what a killed run leaves is not running"


def test_a_killed_child_that_nobody_waited_for_is_not_running(tmp_path: Path) -> None:
    process = pruning(tmp_path, "--epochs", "4000")  # killed long before its end, on a fast machine, too
    process.kill()
    until = time.time() + 10
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and time.time() < until:
        time.sleep(0.01)
    assert (progress.folder() / f"{process.pid}.json").exists() and monitor.running() == []
    process.wait()


def test_it_ends_with_the_run_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = pruning(tmp_path, "--epochs", "100")
    while not len(monitor.course(monitor.running()[0])[0]):  # the first block is through, the others are to come
        time.sleep(0.02)
    monitor.watch(str(process.pid), interval=0.05)
    said = capsys.readouterr().out
    process.wait(timeout=60)
    assert "NMSE after block" in said and "RAM" in said and said.strip().endswith("nothing is running any more.")
    assert process.returncode == 0 and not list(progress.folder().glob("*"))


@pytest.mark.parametrize(("rows", "shown"), [(24, 6), (4, 3)])
def test_lines_are_cut_to_a_small_terminal(rows: int, shown: int) -> None:
    write_state(os.getpid(), run="x" * 200)
    progress.log(os.getpid()).write_text("".join(json.dumps(["said", f"news parts {i}"]) + "\n" for i in range(4)))
    main, side = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 40, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    start([sys.executable, "-m", "reconkit", "watch"], stdout=side, env=environment)
    said = b""
    while not (frames := re.split(rb"\x1b\[(\d+)F\x1b\[J", said))[2:]:
        said += os.read(main, 4096)
    first, height = frames[0].replace(b"\r", b""), int(frames[1])
    assert first.count(b"\n") == height == shown and all(len(line) < 40 for line in first.split(b"\n")) and b"BR+GP" in first


def test_without_a_walk_it_shows_what_was_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    monitor.watch()
    assert "No run is recorded yet" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="No runs are called 'nobody'"):
        monitor.watch("nobody")
    with pytest.raises(ConfigError, match="Nothing called 'nobody' has begun within 0 seconds"):
        monitor.live("nobody", wait=0)


def test_a_run_under_way_is_found_by_its_id_and_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"technique": "BR", "criterion": "wanda", "epochs": 60}
    config = RunConfig("tiny", "pydocs", 8, 32, ("pydocs",), how, held_out_count=2, test=("pydocs",), test_count=2, tag="mine")
    seen: list[dict[str, Any]] = []

    def look() -> None:
        until = time.time() + 60
        while not seen and time.time() < until:
            seen.extend(monitor.running("mine"))
            time.sleep(0.02)

    looking = threading.Thread(target=look)
    looking.start()
    run = runs.run(config)
    looking.join()
    assert seen and seen[0]["run"] == run.id


@pytest.mark.slow
def test_in_a_notebook_it_is_one_figure(tmp_path: Path) -> None:
    from nbclient import NotebookClient

    code = f"""import subprocess
from reconkit import monitor
process = subprocess.Popen({[*PRUNE, "--epochs", "60", "--out", str(tmp_path / "out")]!r}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
monitor.live(str(process.pid), interval=0.2)
process.wait()"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    assert [o.output_type for o in outputs] == ["display_data", "execute_result"] and "image/png" in outputs[0].data
    assert outputs[1].data["text/plain"] == "0"
    if kept := os.environ.get("RECONKIT_TEST_PICTURES"):
        (Path(kept) / "live.png").write_bytes(base64.b64decode(outputs[0].data["image/png"]))

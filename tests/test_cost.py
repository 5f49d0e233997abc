"""Time and memory of what is wrapped."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from reconkit import cost, runs
from reconkit.config import ConfigError, PruneConfig, RunConfig


def wait_for(done: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def noted(file: Path) -> int | None:
    """The process number that `note_and_sleep` left."""
    return int(file.read_text()) if file.is_file() else None


# What follows is done in a process of its own, which imports it from here.


def surroundings() -> tuple[str | None, str, int]:
    return os.environ.get("RECONKIT_TEST_WORD"), os.getcwd(), torch.get_num_threads()


def note_and_sleep(file: Path) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(str(os.getpid()))
    partial.replace(file)
    time.sleep(120)


def refuse() -> None:
    raise ConfigError("count is 0.")


class Odd(Exception):
    def __init__(self, place: str, number: int) -> None:
        super().__init__(f"{place} has {number}")


def raise_what_cannot_be_pickled() -> None:
    raise Odd("block", 3)


def daemonic(answer: Any) -> None:
    answer.send((os.getpid(), cost.apart(os.getpid)))


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_seconds_and_peak_of_the_block_only() -> None:
    with cost.measure() as used:
        held = torch.ones(50_000_000)  # 200 MB
        time.sleep(0.1)
        del held
    assert used.seconds >= 0.1 and 150e6 < used.rss_bytes < 400e6
    with cost.measure() as little:
        time.sleep(0.05)
    assert little.rss_bytes < 50e6 and little.seconds < used.seconds


def test_a_block_that_fails_is_measured_too() -> None:
    with pytest.raises(RuntimeError), cost.measure() as used:
        time.sleep(0.05)
        raise RuntimeError
    assert used.seconds >= 0.05


def test_work_apart_has_a_process_of_its_own_and_gives_the_same() -> None:
    assert cost.apart(os.getpid) not in (os.getpid(), cost.apart(os.getpid))
    config = RunConfig("tiny", "pydocs", 4, 32, held_out=(), test=("pydocs",), test_count=2, prune=PruneConfig(technique="LR"))
    measured = cost.apart(runs.run, config)
    assert not measured.cached and measured.metrics["memory/rss"] > 0 and runs.run(config).cached


def test_surroundings_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    cost.apart(os.getpid)  # a server that runs already has another folder and other variables
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECONKIT_TEST_WORD", "mine")
    try:
        torch.set_num_threads(threads + 1)
        assert cost.apart(surroundings) == ("mine", str(tmp_path), threads + 1)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.delenv("RECONKIT_TEST_WORD")
    assert cost.apart(surroundings) == (None, str(tmp_path), threads)


@pytest.mark.parametrize("how", ["file", "stdin", "module"])
def test_a_script_without_a_guard_runs_once(how: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nfrom reconkit import cost\nprint(cost.apart(os.getpid) != os.getpid(), sys.modules['__main__'] is not None)\n")
    command = {"file": [str(script)], "stdin": ["-"], "module": ["-m", "script"]}[how]
    given = script.read_text() if how == "stdin" else None
    done = subprocess.run([sys.executable, *command], input=given, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "True True\n" and not done.stderr


def test_exceptions_come_back_as_themselves_with_their_traceback() -> None:
    with pytest.raises(ConfigError, match="count is 0") as caught:
        cost.apart(refuse)
    assert "in refuse" in str(caught.value.__cause__)
    with pytest.raises(ValueError, match="invalid literal"):
        cost.apart(int, "x")
    with pytest.raises(RuntimeError, match="Odd: block has 3") as caught:
        cost.apart(raise_what_cannot_be_pickled)
    assert "raise_what_cannot_be_pickled" in str(caught.value.__cause__)


def test_what_cannot_be_handed_over_is_said() -> None:
    with pytest.raises(TypeError, match="cannot be handed"):
        cost.apart(lambda: 1)
    with pytest.raises(TypeError, match="cannot pickle"):
        cost.apart(open, os.devnull)


def test_a_process_that_dies_is_said_with_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="kill_itself was killed by SIGKILL.*fewer samples"):
        cost.apart(kill_itself)
    with pytest.raises(RuntimeError, match="exit code 3"):
        cost.apart(os._exit, 3)


def test_an_interrupt_ends_the_process(tmp_path: Path) -> None:
    file = tmp_path / "pid"

    def interrupt() -> None:
        wait_for(file.is_file)
        time.sleep(0.5)  # until this process waits for the other one
        os.kill(os.getpid(), signal.SIGINT)

    before = sys.modules["__main__"]
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores interrupts
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            cost.apart(note_and_sleep, file)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert gone(noted(file)) and sys.modules["__main__"] is before and cost.apart(os.getpid) != os.getpid()


def test_a_killed_caller_leaves_no_process(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    code = f"import sys, pathlib; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_cost as t; "
    code += f"t.cost.apart(t.note_and_sleep, pathlib.Path({str(file)!r}))"
    caller = subprocess.Popen([sys.executable, "-c", code])
    wait_for(file.is_file)
    assert not gone(noted(file))
    caller.kill()
    caller.wait()
    wait_for(lambda: gone(noted(file)), 20)


def test_a_daemonic_process_works_in_place() -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=daemonic, args=(theirs,), daemon=True)
    process.start()
    here, there = ours.recv()
    process.join(60)
    assert here == there != os.getpid()


@pytest.mark.gpu
def test_the_gpus_peak_is_reset() -> None:
    with cost.measure() as large:
        del_me = torch.ones(50_000_000, device="cuda")
        del del_me
    with cost.measure() as small:
        torch.ones(10, device="cuda")
    assert small.gpu_bytes < large.gpu_bytes


def counter(monkeypatch: pytest.MonkeyPatch, readings: list[int] | None) -> None:
    """A stand-in for NVML on a machine with one GPU: its counter in millijoules, or a driver that has none."""

    class NVMLError(Exception):
        pass

    def total(handle: str) -> int:
        if readings is None:
            raise NVMLError("Not Supported")
        assert handle == "GPU-1234"
        return readings.pop(0)

    names = {"NVMLError": NVMLError, "nvmlInit": lambda: None, "nvmlDeviceGetHandleByUUID": str, "nvmlDeviceGetTotalEnergyConsumption": total}
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**names))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5)


def test_energy_is_the_difference_of_the_gpus_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    counter(monkeypatch, [10_000, 12_500])
    with cost.measure() as used:
        time.sleep(0.01)
    found = used.record(price_per_hour=7200)
    assert found["joules"] == 2.5 and found["gpu_bytes"] == 5
    assert found["gpu_hours"] == pytest.approx(used.seconds / 3600) and found["money"] == pytest.approx(2 * used.seconds)
    counter(monkeypatch, None)
    with cost.measure() as used:
        pass
    assert used.joules is None and "joules" not in used.record() and used.record()["gpu_hours"] > 0


def test_without_a_gpu_nothing_is_said_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with cost.measure() as used:
        pass
    assert used.record().keys() == {"seconds", "rss_bytes"}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert cost._joules() is None, "without nvidia-ml-py"


@pytest.mark.gpu
def test_a_gpu_draws_energy() -> None:
    pytest.importorskip("pynvml")
    with cost.measure() as used:
        x = torch.ones(4096, 4096, device="cuda")
        for _ in range(300):
            x = x @ x * 1e-4
    if used.joules is None:
        pytest.skip("this GPU has no counter of its energy")
    assert 0 < used.joules < 2000 * used.seconds

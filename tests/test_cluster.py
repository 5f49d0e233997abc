"""A suite on Ray gives what it gives here, whoever dies on the way; what cannot be done there is said before work starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from test_cost import gone
from test_suite import manifest, notebook

from reconkit import cluster, suite
from reconkit.config import ConfigError

SUMS = """import json, os, torch
from pathlib import Path
torch.manual_seed(value)
x = torch.randn(300, 300)
found = {"sum": float((x @ x).square().sum()), "threads": float(torch.get_num_threads())}
if out_dir:
    (Path(out_dir) / "figures").mkdir()
    (Path(out_dir) / "metrics.json").write_text(json.dumps(found))"""
LOSES_ITS_WORKER = """import os, psutil, time
from pathlib import Path
marker = Path({marker!r})
if not marker.exists() or len(marker.read_text().split()) < {times}:
    with marker.open("a") as file:
        print(os.getpid(), file=file)
    for p in psutil.Process().parents():
        if p.cmdline() and p.cmdline()[0].startswith("ray::"):
            p.kill()
    time.sleep(60)"""
FAILS = """from pathlib import Path
with Path({marker!r}).open("a") as file:
    file.write("x")
raise ValueError("no such thing")"""
TWO = '[[run]]\nnotebook = "00_one"\n[[run]]\nnotebook = "01_two"\nalone = true\n'


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A project with two notebooks that compute."""
    for number, name in ((2, "00_one"), (3, "01_two")):
        notebook(tmp_path / "notebooks" / f"{name}.ipynb", f'value: int = {number}\nout_dir: str = ""', SUMS)
    (tmp_path / "papermill_runs").mkdir()
    return tmp_path


@pytest.fixture
def ray() -> Iterator[Any]:
    """Ray, of which nothing is left afterwards."""
    found = pytest.importorskip("ray", reason="Ray is not installed (pip install 'reconkit[ray]')")
    before = signal.getsignal(signal.SIGTERM)
    yield found
    assert not found.is_initialized() and signal.getsignal(signal.SIGTERM) == before
    assert wait_for(lambda: not rays(os.getpid())), rays(os.getpid())


def rays(pid: int) -> list[str]:
    """The processes of Ray that descend from that one."""
    return [" ".join(p.cmdline()) for p in psutil.Process(pid).children(recursive=True) if "ray" in p.name()]


def wait_for(what: Callable[[], object], seconds: float = 60) -> bool:
    end = time.time() + seconds
    while not what() and time.time() < end:
        time.sleep(0.1)
    return bool(what())


def results(home: Path) -> dict[str, Any]:
    """What the entries left: files, state, reason, where that was, numbers as they are written, notebook."""
    found = {}
    for folder in sorted(p for p in (home / "papermill_runs" / "mine").iterdir() if p.is_dir()):
        facts = json.loads((folder / "status.json").read_text())
        ok = facts["state"] == "ok"
        book = suite._normalised(suite._read(folder / "notebook.ipynb")) if ok else None
        found[folder.name] = (
            sorted(p.name for p in folder.iterdir()),
            facts["state"],
            facts["reason"],
            (folder / "env.json").read_text() if ok else None,
            (folder / "metrics.json").read_text() if ok else None,
            book,
        )
    return found


@pytest.mark.slow
def test_on_ray_everything_is_as_it_is_here_and_nothing_else_is_said(home: Path, ray: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Numbers to the last bit. With one notebook at a time nobody sets its threads here, and Ray would set others."""
    file = manifest(home, TWO)
    assert suite.run(file, jobs=1) == 0
    here, said = results(home), capfd.readouterr()
    assert suite.run(file, jobs=1, force=True, on="ray") == 0
    there, also = results(home), capfd.readouterr()
    assert here == there and {"metrics.json", "figures", "env.json", "params.json"} <= set(here["00_one"][0])
    assert [line.split(" in ")[0] for line in also.out.splitlines()[:2]] == ["[1/2] 00_one: ok", "[2/2] 01_two: ok"]
    assert len(also.out.splitlines()) == len(said.out.splitlines()) and also.err == said.err == ""
    assert not [p for p in (home / "papermill_runs" / "mine").iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_a_lost_worker_changes_nothing_and_a_failure_is_no_lost_worker(
    home: Path, ray: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "RETRIES", 1)
    file = manifest(home, TWO.replace("alone = true", "") + '[[run]]\nnotebook = "02_three"\n')
    notebook(home / "notebooks" / "02_three.ipynb", code=LOSES_ITS_WORKER.format(marker=str(home / "always"), times=9))
    assert suite.run(file, only="00*") == 0
    whole = results(home)["00_one"]
    once, failed = home / "once", home / "failed"
    loses = SUMS + "\n" + LOSES_ITS_WORKER.format(marker=str(once), times=1)
    notebook(home / "notebooks" / "00_one.ipynb", 'value: int = 2\nout_dir: str = ""', loses)
    notebook(home / "notebooks" / "01_two.ipynb", code=FAILS.format(marker=str(failed)))
    assert suite.run(file, on="ray") == 1
    found, said = results(home), capsys.readouterr().out
    assert found["00_one"][:5] == whole[:5]
    kernels = [int(pid) for pid in (once.read_text() + (home / "always").read_text()).split()]
    assert len(kernels) == 1 + 2 and wait_for(lambda: all(map(gone, kernels))), "a notebook ends with its worker"
    assert failed.read_text() == "x" and "01_two: failed (cell 3: ValueError: no such thing)" in said
    assert found["01_two"][0] == ["env.json", "log.txt", "notebook.ipynb", "params.json", "status.json"]
    assert found["02_three"][:3] == (["log.txt", "params.json", "status.json"], "failed", "its worker was lost 2 times (WorkerCrashedError)")


@pytest.mark.slow
def test_an_interrupt_ends_everything(home: Path, ray: Any) -> None:
    marker = home / "pid"
    code = f"import os, time\nfrom pathlib import Path\nPath({str(marker)!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
    notebook(home / "notebooks" / "00_one.ipynb", code=code)
    words = ["suite", "run", str(manifest(home)), "--only", "00*", "--on", "ray"]
    heard = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a background job does not
    run = subprocess.Popen([sys.executable, "-c", f"{heard}from reconkit import cli; sys.exit(cli.main({words!r}))"])
    try:
        assert wait_for(lambda: marker.is_file() and marker.read_text(), 120)
        started = psutil.Process(run.pid).children(recursive=True)
        assert int(marker.read_text()) in [p.pid for p in started]
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130
        assert wait_for(lambda: all(gone(p.pid) for p in started))
    finally:
        run.kill()
        run.wait()
    assert list((home / "papermill_runs" / "mine").iterdir()) == []


@pytest.fixture
def address(ray: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster that was there before, of one node with two CPUs."""
    for name, value in cluster.QUIET.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    before = signal.getsignal(signal.SIGTERM)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0, "object_store_memory": cluster.STORE})
    yield made.address
    made.shutdown()
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_a_cluster_at_an_address_is_checked_first(home: Path, ray: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = manifest(home)
    monkeypatch.setattr(cluster.Cluster, "submit", None)
    with monkeypatch.context() as only_here, pytest.raises(ConfigError, match="does not see .*papermill_runs/mine"):
        only_here.setattr(cluster.tempfile, "NamedTemporaryFile", lambda dir, **_: _Nowhere(dir))
        suite.run(file, on="ray", address=address)
    with monkeypatch.context() as other, pytest.raises(ConfigError, match=r"other numbers, with torch .* \(here 0\); install"):
        platform = suite.runs.platform_key()
        other.setattr(suite.runs, "platform_key", lambda *_: platform | {"versions": platform["versions"] | {"torch": "0"}})
        suite.run(file, on="ray", address=address)
    with pytest.raises(ConfigError, match="No node of the Ray cluster has 99 CPUs"):
        monkeypatch.setattr(suite, "_threads", lambda jobs: 99)
        suite.run(file, on="ray", address=address)
    monkeypatch.undo()
    assert suite.run(file, on="ray", address=address) == 0


class _Nowhere:
    """A file that only this machine sees."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder / "gone")

    def __enter__(self) -> _Nowhere:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_an_address_where_nothing_answers(home: Path, ray: Any) -> None:
    for address in ("127.0.0.1:1", "127.0.0.1:99999", "auto"):
        with pytest.raises(ConfigError, match=f"No Ray cluster could be joined at {address}: "):
            suite.run(manifest(home), on="ray", address=address)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"on": "moon"}, "--on is 'moon'.*ray"),
        ({"address": "auto"}, "needs --on ray"),
        ({"on": "ray", "address": "ray://host:10001"}, "auto or HOST:PORT"),
        ({"on": "ray"}, r"pip install 'reconkit\[ray\]'"),
    ],
)
def test_what_ray_cannot_do_is_said_before_anything_starts(home: Path, words: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=says):
        suite.run(manifest(home), **words)
    assert not (home / "papermill_runs" / "mine").exists()


@pytest.mark.parametrize(("device", "runs", "options"), [("cpu", 4 + 1, {"num_cpus": 2}), ("cuda", 8, {"num_gpus": 1})])
def test_a_run_holds_its_threads_or_a_gpu(device: str, runs: int, options: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nodes = [{"Resources": {"CPU": 9.0, "GPU": 8.0}}, {"Resources": {"CPU": 3.0}}, {"Resources": {"memory": 1.0}}]
    monkeypatch.setattr(cluster, "_alive", lambda: nodes)
    asked: dict[str, Any] = {}

    def remote(*args: Any) -> str:
        asked["args"] = args
        return "ref"

    there = cluster.Cluster(device, 2, SimpleNamespace(options=lambda **given: asked.update(given) or SimpleNamespace(remote=remote)))
    assert there.slots == runs
    there.submit("a", ["-c", "pass"], tmp_path, {"OMP_NUM_THREADS": "7", "OTHER": "1"})
    assert asked["args"] == (["-c", "pass"], str(tmp_path), {"OMP_NUM_THREADS": "2", "OTHER": "1"})
    assert {name: asked.get(name) for name in options} == options and (asked["max_retries"], asked["retry_exceptions"]) == (cluster.RETRIES, False)


def test_a_process_ends_with_its_starter_and_takes_all_with_it(tmp_path: Path) -> None:
    """Which is killed without a word."""
    log = tmp_path / "log.txt"
    sleeps = "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)"
    inner = f"from reconkit import cluster; import subprocess, sys; cluster.end_with_starter(); {sleeps}; print(p.pid, flush=True); p.wait()"
    outer = f"from reconkit import cluster; import os, pathlib; cluster.launch(['-c', {inner!r}], pathlib.Path({str(log)!r}), os.environ).wait()"
    starter = subprocess.Popen([sys.executable, "-c", outer])
    try:
        assert wait_for(lambda: log.is_file() and log.read_text())
    finally:
        starter.kill()
        starter.wait()
    assert wait_for(lambda: gone(int(log.read_text())), 20)

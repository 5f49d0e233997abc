"""Where a suite's work is done: processes that end with whoever started them, here or on Ray. The only room that knows Ray."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from .config import ConfigError, require

RETRIES = 3
"Times that a run starts again because its worker was lost."
STORE = 100 * 2**20  # bytes for objects of a Ray that is started here: nothing but exit statuses goes through it
GRACE = 15.0  # seconds that cancelled runs have to end
ATTEMPT = "attempt-"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
"No telemetry, no advice about GPUs, no upload of the folder."


def launch(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start Python with these words, its output in `log`; it ends with this process if it calls `end_with_starter`."""
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def end_with_starter() -> None:
    """End this process and all that it started as soon as the process that `launch`ed it is gone, however that ended."""

    def wait() -> None:
        os.read(0, 1)  # nobody writes: it returns when the other end is closed
        _kill_all(psutil.Process().children(recursive=True))
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and everything that it started."""
    if process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(process.pid)
            _kill_all([found, *found.children(recursive=True)])
        process.wait()


def _kill_all(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def check(on: str | None, address: str | None) -> None:
    """Whether work can go where these words say.

    Raises:
        ConfigError: an unknown place, an address without Ray or of a form that Ray does not have, or Ray is not installed.
    """
    require(on in (None, "ray"), "--on", on, "ray")
    if address is not None:
        if on is None:
            raise ConfigError("--address names a Ray cluster; it needs --on ray.")
        require(re.fullmatch(r"auto|[^/\s]+:\d+", address) is not None, "--address", address, "auto or HOST:PORT, given on a node of the cluster")
    if on == "ray" and find_spec("ray") is None:
        raise ConfigError("--on ray needs Ray; install it with: pip install 'reconkit[ray]'")


@contextmanager
def connected(address: str | None, device: str, threads: int) -> Iterator[Cluster]:
    """A Ray of this machine that ends with the block, or the one at an address.

    Raises:
        ConfigError: nothing answers there, or no node has what a run needs.
        RuntimeError: Ray does not start on this machine.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    before = signal.getsignal(signal.SIGTERM)  # which Ray replaces
    try:
        _join(address, device, threads)
        there = Cluster(device, threads, ray.remote(_work))
        if device == "cpu" and any(node["Resources"].get("GPU") for node in _alive()):
            raise ConfigError("The Ray cluster has GPUs and this machine shows none: start the suite on a node with a GPU.")
        if not there.slots:
            wanted = f"{threads} CPUs, as many as --jobs gives a run" if device == "cpu" else "a GPU, as this machine has"
            raise ConfigError(f"No node of the Ray cluster has {wanted}.")
        yield there
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _join(address: str | None, device: str, threads: int) -> None:
    import ray

    quiet: dict[str, Any] = {"configure_logging": False, "logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        cores = max(os.cpu_count() or 1, threads)
        ray.init("local", num_cpus=cores, num_gpus=_gpus(device), include_dashboard=False, object_store_memory=STORE, **quiet)
        return
    try:
        if address != "auto":  # Ray itself tries for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address, **quiet)
    except (ray.exceptions.RayError, OSError, OverflowError, RuntimeError, ValueError) as error:
        raise ConfigError(f"No Ray cluster could be joined at {address}: {' '.join(str(error).split())}") from None


def _gpus(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.device_count()
    return int(device != "cpu")


def _alive() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


@dataclass(frozen=True)
class Cluster:
    """A Ray that was joined."""

    device: str
    "The kind that runs need: one GPU a run, or on a cpu its threads."
    threads: int
    "Of a run."
    work: Any
    "`_work` as Ray knows it."

    def _fit(self, node: Mapping[str, Any]) -> int:
        """Runs that the node takes at once."""
        have = node["Resources"]
        return int(have.get("CPU", 0) // self.threads) if self.device == "cpu" else int(have.get("GPU", 0))

    @property
    def slots(self) -> int:
        """Runs that the cluster takes at once."""
        return sum(self._fit(node) for node in _alive())

    def check(self, folders: Sequence[Path], files: Sequence[Path], platform: Mapping[str, Any]) -> None:
        """Whether every node that may get a run sees these folders and files and has the code and the libraries that decide numbers.

        Raises:
            ConfigError: which node does not, and what it lacks.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        look = ray.remote(num_cpus=0, max_retries=RETRIES)(_look)
        with ExitStack() as stack:
            places = {stack.enter_context(tempfile.NamedTemporaryFile(prefix=".shared-", dir=folder)).name: folder for folder in folders}
            places |= {str(file): file for file in files}
            nodes = [node for node in _alive() if self._fit(node)]
            strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
            answers = [look.options(scheduling_strategy=strategy).remote(list(places)) for strategy in strategies]
            for node, answer in zip(nodes, answers, strict=True):
                try:
                    unseen, theirs = ray.get(answer)
                    lacks = _lacks([places[file] for file in unseen], theirs, _facts(platform))
                except ray.exceptions.RayError as error:
                    lacks = f"cannot use reconkit ({_reason(error)}); install the same there as here"
                if lacks:
                    raise ConfigError(f"The Ray node {node['NodeManagerAddress']} {lacks}.")

    def submit(self, name: str, command: Sequence[str], staging: Path, variables: Mapping[str, str]) -> Task:
        """Have `python COMMAND… FOLDER` done on some node; what it leaves in that folder is in `staging` at the end, with log.txt."""
        needs = {"num_cpus": self.threads} if self.device == "cpu" else {"num_gpus": 1}
        own = {**variables, "OMP_NUM_THREADS": str(self.threads)}
        work = self.work.options(name=name, max_retries=RETRIES, retry_exceptions=False, **needs)
        return Task(work.remote(list(command), str(staging), own), staging)

    def stop(self, tasks: Sequence[Task]) -> None:
        """Cancel tasks and wait until they have ended."""
        import ray

        for task in tasks:
            ray.cancel(task.ref)
        if tasks:
            ray.wait([task.ref for task in tasks], num_returns=len(tasks), timeout=GRACE)


@dataclass
class Task:
    """Submitted work; what one asks of a process."""

    ref: Any
    staging: Path
    returncode: int | None = None

    def begun(self) -> bool:
        """Whether it has left the queue."""
        return any(self.staging.glob(f"{ATTEMPT}*")) or self.poll() is not None

    def poll(self) -> int | None:
        """The exit status once there is one; that of lost work is 1, and its log says why."""
        import ray

        if self.returncode is None and ray.wait([self.ref], timeout=0)[0]:
            try:
                self.returncode = ray.get(self.ref)
            except ray.exceptions.RayError as error:
                self.returncode = 1
                _clear(self.staging)
                (self.staging / "log.txt").write_text(_reason(error) + "\n", encoding="utf-8")
        return self.returncode


def _reason(error: Exception) -> str:
    import ray

    if isinstance(error, ray.exceptions.RayTaskError):
        return f"{type(error.cause).__name__}: {' '.join(str(error.cause).split())}"
    if isinstance(error, (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)):
        return f"its worker was lost {RETRIES + 1} times ({type(error).__name__})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _facts(platform: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be equal on all machines; the kind of device shows only where a GPU is held."""
    return {"python": platform["python"], **platform["versions"], "reconkit": platform["code"]}


def _lacks(unseen: Sequence[Path], theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    if unseen:
        return f"does not see {', '.join(map(str, unseen))}: all nodes need one file system (RECONKIT_CACHE names the cache)"
    other = [f"{part} {theirs.get(part)} (here {value})" for part, value in ours.items() if theirs.get(part) != value]
    return f"would give other numbers, with {', '.join(other)}; install the same there as here" if other else ""


def _look(files: list[str]) -> tuple[list[str], dict[str, Any]]:
    """On a node: the files that it does not see, and what it has."""
    from . import runs

    return [file for file in files if not os.path.isfile(file)], _facts(runs.platform_key("cpu"))


def _work(command: list[str], staging: str, variables: dict[str, str]) -> int:
    """On a node: the exit status of one run, in a process and a folder of its own, because a lost worker's run may still be ending in its."""
    home = Path(staging)
    _clear(home)
    own = Path(tempfile.mkdtemp(prefix=ATTEMPT, dir=home))
    shutil.copy(home / "params.json", own)
    process = launch([*command, str(own)], own / "log.txt", {**os.environ, **variables})
    try:
        while process.poll() is None:
            time.sleep(0.2)  # a cancellation comes between two looks
    finally:
        kill(process)
    for part in own.iterdir():
        os.replace(part, home / part.name)
    own.rmdir()
    return process.returncode


def _clear(staging: Path) -> None:
    """Remove what earlier attempts left."""
    for left in staging.iterdir():
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        elif left.name != "params.json":
            left.unlink(missing_ok=True)

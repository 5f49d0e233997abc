"""Seconds, peak memory, energy and money of whatever is wrapped."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any

import psutil
import torch

INTERVAL = 0.02  # seconds between two looks at the memory of the process
LINGER = 5.0  # seconds that a process has to leave by itself once it has answered
# macOS has the server as well, but its frameworks do not survive a fork.
START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() and sys.platform != "darwin" else "spawn"
PRELOAD = (
    "torch",
    "torch._dynamo",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "pandas",
    "psutil",
    "filelock",
    "scipy.stats",
    "tqdm",
)
"What the server imports once, so that a fresh process costs a fork instead of seconds. Importing them neither computes nor wakes a GPU."
_MAIN = threading.Lock()


@dataclass
class Cost:
    """What a piece of work took; complete once the block is left."""

    seconds: float = 0.0
    "Wall time."
    gpu_bytes: int = 0
    "Peak of what torch allocated on the GPU, everything that was there before included."
    rss_bytes: int = 0
    "Peak of the process's resident memory above what it was at the start."
    gpus: int = 0
    "GPUs that were held: one, where there is any."
    joules: float | None = None
    "What that GPU drew, for its other users, too; None where NVML does not tell."

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.seconds / 3600

    def record(self, price_per_hour: float | None = None) -> dict[str, float]:
        """What is known, by name: seconds, rss_bytes; on a GPU gpu_bytes, gpu_hours, joules; with a price of the machine, money."""
        found: dict[str, float] = {"seconds": self.seconds, "rss_bytes": self.rss_bytes}
        if self.gpus:
            found |= {"gpu_bytes": self.gpu_bytes, "gpu_hours": self.gpu_hours}
        if self.joules is not None:
            found["joules"] = self.joules
        if price_per_hour is not None:
            found["money"] = money(self.seconds, price_per_hour)
        return found


@contextmanager
def measure() -> Iterator[Cost]:
    """Time the block and watch its memory; the GPU's peak is reset first.

    Memory that a process freed before may be taken again unseen: peaks that are to be compared are measured `apart`.
    """
    cost, process, done = Cost(), psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(INTERVAL):
            peak = max(peak, process.memory_info().rss)

    gpu = torch.cuda.is_available()
    cost.gpus, drawn = int(gpu), _joules() if gpu else None
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        if gpu:
            torch.cuda.synchronize()
            cost.gpu_bytes, after = torch.cuda.max_memory_allocated(), _joules()
            cost.joules = after - drawn if drawn is not None and after is not None else None
        cost.seconds = time.perf_counter() - start
        done.set()
        watcher.join()
        cost.rss_bytes = max(peak, process.memory_info().rss) - before


def _joules() -> float | None:
    """What the current GPU has drawn since its driver was loaded; None where NVML, or that counter of it, is missing."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3
    except pynvml.NVMLError:
        return None


def process_peak() -> int:
    """Peak resident memory of this process since it began, in bytes."""
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def money(seconds: float, price_per_hour: float) -> float:
    """What `seconds` of a machine cost, in the currency of its price."""
    return seconds / 3600 * price_per_hour


def million_tokens(tokens_per_second: float, price_per_hour: float) -> float:
    """What serving a million tokens costs at that speed."""
    return money(1e6 / tokens_per_second, price_per_hour)


class Elsewhere(Exception):
    """The traceback of what went wrong `apart`, as the cause of the exception that is raised here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def apart(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of `work` in a fresh process of its own, so that its peak memory owes nothing to what ran before.

    The process has this one's environment, folder and number of threads, and never imports this one's script. It ends with
    this call, however that ends, and with this process. `work` must be importable, its arguments and result picklable, as
    `runs.run` and a configuration are. A daemonic process may have no children, so there the work is done in place.

    Raises:
        TypeError: `work` or an argument cannot be handed to another process.
        RuntimeError: the process was killed or ended without an answer, or it raised what cannot be pickled.
        BaseException: what `work` raised, with the traceback from there as its cause.
    """
    if multiprocessing.current_process().daemon:
        return work(*args, **kwargs)
    context = multiprocessing.get_context(START)
    if START == "forkserver":
        context.set_forkserver_preload(list(PRELOAD))  # of no effect where the server runs already
    name, process = getattr(work, "__qualname__", repr(work)), None
    ours, theirs = context.Pipe()
    try:
        with _blank_main():
            task = _packed(name, (work, args, kwargs))
            process = context.Process(target=_work, args=(theirs, task, dict(os.environ), os.getcwd(), torch.get_num_threads()))
            _start(process, name)
        theirs.close()  # now the process alone holds its end
        done, said, trace, content = _answer(ours, process, name)
        process.join(LINGER)
    finally:
        ours.close()  # the process ends itself when it sees this
        theirs.close()
        if process is not None:
            _end(process)
    if done:
        return pickle.loads(content)
    raise _error(said, content) from Elsewhere(trace)


@contextmanager
def _blank_main() -> Iterator[None]:
    """A process that starts now does not import this one's script, which may do its work again or be no file at all."""
    with _MAIN:
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _packed(name: str, task: tuple[Any, ...]) -> bytes:
    """Bytes, and not what torch's reducers make for a process: its tensors would live in shared memory."""
    try:
        return pickle.dumps(task)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(f"{name} or an argument of it cannot be handed to another process, which imports it from its module: {error}.") from error


def _start(process: Any, name: str) -> None:
    """A server that has just ended, by an interrupt say, is followed by another at the second try."""
    for attempt in (1, 2):
        try:
            return process.start()
        except (EOFError, ConnectionError) as error:
            if attempt == 2:
                raise RuntimeError(f"The process of {name} could not be started; its server ended, and its error is above.") from error
            time.sleep(0.5)


def _answer(ours: Connection, process: Any, name: str) -> tuple[bool, str, str, bytes]:
    """(whether it was done, what it said otherwise, its traceback, the pickled result or exception)."""
    while not wait([ours, process.sentinel], timeout=1):
        pass  # a signal that another thread was given is seen between two waits
    try:
        if ours.poll():
            return (*ours.recv(), ours.recv_bytes())
    except (EOFError, OSError):
        pass  # it ended before or amid its answer
    process.join(LINGER)
    how = "ended without an exit code" if process.exitcode is None else f"ended with exit code {process.exitcode}"
    if process.exitcode is not None and process.exitcode < 0:
        how = f"was killed by {_signal(-process.exitcode)}"
    raise RuntimeError(
        f"The process of {name} {how} before it answered; where memory ran out, ask for fewer samples (count) or a smaller batch_size."
    )


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _error(said: str, content: bytes) -> BaseException:
    """The exception itself, or its text where it does not come through."""
    try:
        return pickle.loads(content) if content else RuntimeError(said)
    except Exception:
        return RuntimeError(said)


def _end(process: Any) -> None:
    """Whatever still runs of a process."""
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (AttributeError, OSError):  # no groups here, or it has not made its own yet
            process.kill()
        process.join(LINGER)


def _work(theirs: Connection, task: bytes, environment: dict[str, str], folder: str, threads: int) -> None:
    """In the fresh process: make it like the caller's, work, answer."""
    if hasattr(os, "setsid"):
        os.setsid()  # an interrupt at the terminal is the caller's, who ends this group
    threading.Thread(target=_end_with_the_caller, args=(theirs,), daemon=True).start()
    said, trace = "", ""
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        torch.set_num_threads(threads)
        work, args, kwargs = pickle.loads(task)
        done, content = True, pickle.dumps(work(*args, **kwargs))
    except BaseException as error:
        done, content, said, trace = False, _whole(error), f"{type(error).__name__}: {error}", traceback.format_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    theirs.send((done, said, trace))
    theirs.send_bytes(content)


def _whole(error: BaseException) -> bytes:
    """The pickled exception; nothing where it would not come out as it went in."""
    try:
        content = pickle.dumps(error)
        again = pickle.loads(content)
    except Exception:
        return b""
    return content if type(again) is type(error) and str(again) == str(error) else b""


def _end_with_the_caller(theirs: Connection) -> None:
    """The caller never sends anything: what comes is the end of its call or of itself."""
    try:
        theirs.recv_bytes()
    except (EOFError, OSError):
        pass
    if hasattr(os, "getpgid") and os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)

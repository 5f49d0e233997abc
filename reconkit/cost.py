"""Seconds and peak memory of whatever is wrapped."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

INTERVAL = 0.02  # seconds between two looks at the memory of the process


@dataclass
class Cost:
    """What a piece of work took; complete once the block is left."""

    seconds: float = 0.0
    "Wall time."
    gpu_bytes: int = 0
    "Peak of what torch allocated on the GPU, everything that was there before included."
    rss_bytes: int = 0
    "Peak of the process's resident memory above what it was at the start."


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
            cost.gpu_bytes = torch.cuda.max_memory_allocated()
        cost.seconds = time.perf_counter() - start
        done.set()
        watcher.join()
        cost.rss_bytes = max(peak, process.memory_info().rss) - before


def apart(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of `work` in a fresh process of its own, so that its peak memory owes nothing to what ran before.

    `work`, its arguments and its result must be picklable, as `runs.run` and a configuration are.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(work, *args, **kwargs).result()

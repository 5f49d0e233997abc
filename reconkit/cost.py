"""Seconds and peak memory of whatever is wrapped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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

    Memory that a process freed before may be taken again unseen, so peaks compare between processes of their own.
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

"""Time and memory of what is wrapped."""

from __future__ import annotations

import os
import time

import pytest
import torch

from reconkit import cost, runs
from reconkit.config import PruneConfig, RunConfig


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
    assert cost.apart(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="invalid literal"):
        cost.apart(int, "x")
    config = RunConfig("tiny", "pydocs", 4, 32, held_out=(), test=("pydocs",), test_count=2, prune=PruneConfig(technique="LR"))
    measured = cost.apart(runs.run, config)
    assert not measured.cached and measured.metrics["memory/rss"] > 0 and runs.run(config).cached


@pytest.mark.gpu
def test_the_gpus_peak_is_reset() -> None:
    with cost.measure() as large:
        del_me = torch.ones(50_000_000, device="cuda")
        del del_me
    with cost.measure() as small:
        torch.ones(10, device="cuda")
    assert small.gpu_bytes < large.gpu_bytes

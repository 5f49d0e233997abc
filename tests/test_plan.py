"""What a pruning will take, before it is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reconkit import plan
from reconkit.config import ConfigError, PruneConfig, RunConfig


def job(**values: Any) -> RunConfig:
    how = PruneConfig(**{"technique": "BR+GP+CR", "epochs": 5, "batch_size": 4, **values.pop("prune", {})})
    return RunConfig("tiny", "pydocs", 40, 32, ("pydocs",), how, **values)


def asked(monkeypatch: pytest.MonkeyPatch, seconds: Any) -> list[tuple[int, int]]:
    """Looks at a model of 12 blocks that would take so long as `seconds` says for the first three."""
    looks: list[tuple[int, int]] = []

    def look(work: Any, job: RunConfig, offload: bool, samples: int, epochs: int, blocks: int) -> plan.Look:
        assert work is plan.look and blocks == 3
        looks.append((samples, epochs))
        return plan.Look(samples, epochs, seconds(samples, epochs), 1000 + 10 * samples, 0, 0, 12, one=seconds(1, 1), stream_bytes=5)

    monkeypatch.setattr(plan.cost, "apart", look)
    return looks


def test_three_looks_give_every_share(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = asked(monkeypatch, lambda n, e: 2 + n * (0.5 + 0.25 * e))
    found = plan.estimate(job())
    assert looks == [(4, 1), (8, 1), (4, 2)]
    assert found.seconds == pytest.approx(4 * (2 + 40 * (0.5 + 0.25 * 5))) and found.rss_bytes == pytest.approx(1000 + 10 * 40)
    steps = plan.estimate(job(prune={"steps": 30}))  # 30 steps of 4 samples are 3 epochs of 40
    assert steps.seconds == pytest.approx(4 * (2 + 40 * (0.5 + 0.25 * 3)))
    looks.clear()
    plan.estimate(job(prune={"technique": "LR", "window": 2}))
    assert looks == [(4, 1), (8, 1)], "nothing is trained"


def test_a_long_look_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = asked(monkeypatch, lambda n, e: 2 + n * (4 + 6 * e))  # with CR a block trains twice: six passes an epoch, beside four
    monkeypatch.setattr(plan, "ENOUGH", -1)
    found = plan.estimate(job())
    assert found.seconds == pytest.approx(4 * (2 + 40 * (4 + 6 * 5))) and looks == [(4, 1)]
    assert found.rss_bytes == pytest.approx(1000 + 10 * 4 + 36 * 5)


def test_a_look_prunes_the_first_blocks_only() -> None:
    found = plan.look(job(), False, 4, 1)
    assert found.seconds > 0 and found.one > 0 and found.stream_bytes == 4 * 32 * 64 * 4 * (1 + job().held_out_count / 40)
    assert 0 < found.rss_bytes <= 2 * found.process_bytes and found.gpu_bytes == 0 and found.blocks == 4
    with pytest.raises(ConfigError, match="head"):
        plan.look(job(prune={"layers": ("head",)}), False, 4, 1)


def test_text_that_only_trains_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": "one text after the other " * 4}) + "\n" for _ in range(10)))
    assert plan.look(job(), False, 4, 1).extra == 0 and plan.look(job(extra=str(own)), False, 4, 1).extra >= 10
    monkeypatch.setattr(plan.cost, "apart", lambda work, *args: plan.Look(*args[2:4], 2 + args[2] * (0.5 + 0.25 * args[3]), 0, 0, 0, 12, extra=15))
    found = plan.estimate(job(extra=str(own)))
    assert found.extra == 15 and found.seconds == pytest.approx(4 * (2 + 55 * (0.5 + 0.25 * 5)))


def test_windows_of_one_need_fewer_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(plan.cost, "apart", lambda work, *args: seen.append(args[-1]) or plan.Look(4, 1, 1.0, 0, 0, 0, 12))
    assert plan.estimate(job(prune={"technique": "LR"})).seconds == pytest.approx(12 / 2 * 1.0) and set(seen) == {2}
    seen.clear()
    assert plan.estimate(job(prune={"technique": "LR"}), offload=True).seconds == pytest.approx(12 * 1.0) and set(seen) == {1}

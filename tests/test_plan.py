"""What a pruning will take, before it is done."""

from __future__ import annotations

from typing import Any

import pytest

from reconkit import plan
from reconkit.config import ConfigError, PruneConfig, RunConfig


def job(**values: Any) -> RunConfig:
    how = PruneConfig(**{"technique": "BR+GP", "epochs": 5, "batch_size": 4, **values.pop("prune", {})})
    return RunConfig("tiny", "pydocs", 40, 32, ("pydocs",), how, **values)


def asked(monkeypatch: pytest.MonkeyPatch, seconds: Any) -> list[tuple[int, int]]:
    """Looks at a model of 12 blocks that would take so long as `seconds` says for the first three."""
    looks: list[tuple[int, int]] = []

    def look(work: Any, job: RunConfig, offload: bool, samples: int, epochs: int) -> plan.Look:
        assert work is plan.look
        looks.append((samples, epochs))
        return plan.Look(samples, epochs, seconds(samples, epochs), 1000 + 10 * samples, 0, 0, 12)

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
    plan.estimate(job(prune={"technique": "LR"}))
    assert looks == [(4, 1), (8, 1)], "nothing is trained"


def test_a_long_look_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = asked(monkeypatch, lambda n, e: n * 3.0)
    monkeypatch.setattr(plan, "ENOUGH", -1)
    assert plan.estimate(job()).seconds == pytest.approx(4 * 40 * 3) and looks == [(4, 1)]


def test_a_look_prunes_the_first_blocks_only() -> None:
    found = plan.look(job(), False, 4, 1)
    assert found.seconds > 0 and 0 <= found.rss_bytes < found.process_bytes and found.blocks == 4
    with pytest.raises(ConfigError, match="head"):
        plan.look(job(prune={"layers": ("head",)}), False, 4, 1)

"""Generation speed: what is timed, and who takes turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reconkit import latency as room
from reconkit import models
from reconkit.config import ConfigError
from reconkit.latency import latency


@pytest.fixture
def tiny() -> Any:
    return models.load_model("tiny")[0]


def test_every_model_batch_and_measure_has_a_row_with_its_spread(tiny: Any) -> None:
    table = latency({"dense": tiny, "pruned": tiny}, batch_sizes=(1, 3), length=8, tokens=4, repeats=3)
    assert len(table) == 2 * 2 * 3 and set(table.measure) == {"first_token_seconds", "prefill_tokens_per_second", "decode_tokens_per_second"}
    assert (table.low <= table.value).all() and (table.value <= table.high).all() and (table.value > 0).all()


def test_the_prompt_is_subtracted_as_generation_reads_it(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a second a generated token and no other time: a plain forward would have no such length."""
    monkeypatch.setattr(room, "_timed", lambda work, device: 0.1 * (work().shape[1] - 8))
    table = latency({"a": tiny}, batch_sizes=(2,), length=8, tokens=4, repeats=1).set_index("measure").value
    assert table.to_dict() == pytest.approx({"first_token_seconds": 0.1, "prefill_tokens_per_second": 160, "decode_tokens_per_second": 20})


def test_models_take_turns_after_a_warm_up(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    names = {id(tiny): "a", id(other := models.load_model("tiny")[0]): "b"}
    monkeypatch.setattr(room, "_once", lambda model, *args: turns.append(names[id(model)]) or {"first_token_seconds": float(len(turns))})
    table = latency({"a": tiny, "b": other}, repeats=3)
    assert turns == ["a", "b"] * 4
    assert table.value.tolist() == [5, 6], "medians of turns 3, 5, 7 and 4, 6, 8"


def test_impossible_lengths(tiny: Any) -> None:
    for wrong in ({"tokens": 1}, {"repeats": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            latency({"a": tiny}, **wrong)
    assert torch.is_grad_enabled()

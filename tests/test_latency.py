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
    assert (table.low <= table.value).all() and (table.value <= table.high).all() and (table.value > 0).all() and (table.n == 3).all()


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


def test_two_of_four_neighbours_along_the_input() -> None:
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 3, 4, 0], [0, 0, 0, 5, 6, 0, 0, 0]])
    assert room.is_two_four(weight)
    weight[1, 0] = weight[1, 1] = 1
    assert not room.is_two_four(weight)
    assert not room.is_two_four(torch.zeros(2, 6)), "no groups of four"


def test_products_compare_each_format_with_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels get the same matrix and input; a time of one for the dense product and of a half for the other is a ratio of two."""
    weight = torch.randn(8, 12).masked_fill(torch.rand(8, 12) < 0.7, 0)
    seen: list[torch.Tensor] = []

    def timed(work: Any, device: torch.device) -> float:
        seen.append(work())
        return 1.0 if len(seen) % 2 else 0.5

    monkeypatch.setattr(room, "_timed", timed)
    table = room.products({"half": weight}, tokens=(1, 3), repeats=2)
    assert table[["name", "tokens", "format"]].values.tolist() == [["half", 1, "CSR"], ["half", 3, "CSR"]]
    assert table.value.tolist() == [2, 2]
    for dense, sparse in zip(seen[::2], seen[1::2], strict=True):
        assert torch.allclose(dense, sparse, atol=1e-5)


def test_nothing_is_compressed_without_a_gpu_for_it() -> None:
    model = models.load_model("tiny", device="cpu")[0]
    for view in models.weight_views(models.blocks(model)[1][0])[0]:
        view.get()[:, ::2] = 0
    assert room.compressed(model) is None


@pytest.mark.gpu
def test_a_two_four_model_says_the_same_through_its_kernels() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no kernels for 2:4")
    model = models.load_model("tiny", dtype=torch.float16, device="cuda")[0]
    assert room.compressed(model) is None, "a dense model has nothing to compress"
    for block in models.blocks(model)[1]:
        for view in models.weight_views(block)[0]:
            view.get().view(-1, 4)[:, :2] = 0
    ids = torch.randint(3, 250, (2, 16), device="cuda")
    with torch.no_grad():
        expected, found = model(ids).logits, room.compressed(model)(ids).logits
    assert torch.allclose(found, expected, atol=2e-2)
    assert set(room.products({"w": models.weight_views(models.blocks(model)[1][0])[0][0].get()}).format) == {"CSR", "2:4"}

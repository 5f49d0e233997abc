"""Blocks called one by one give what the model gives."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import reference
import torch

from reconkit import models, prunable, pruning, streams
from reconkit.config import PruneConfig


def final_states(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What the last block hands on, caught inside the model's own forward."""
    caught: list[torch.Tensor] = []
    handle = models.blocks(model)[1][-1].register_forward_hook(lambda _, __, out: caught.append(out if isinstance(out, torch.Tensor) else out[0]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return caught[0]


@pytest.mark.parametrize("name", families.ALL)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_replayed_blocks_give_the_models_own_final_states(name: str, batch_size: int) -> None:
    model, ids = families.build(name), families.tokens(5, 16)  # longer than the sliding windows; the last batch is smaller
    _, layers = models.blocks(model)
    runner = streams.Runner(model, layers)
    states = runner.embed(ids, batch_size)
    for i in range(len(layers)):
        states = runner.advance([i], states, batch_size)
    assert torch.allclose(states, final_states(model, ids), atol=1e-5)
    together = runner.advance(range(len(layers)), runner.embed(ids, batch_size), batch_size)
    assert torch.equal(together, states)


def test_equal_arguments_are_kept_once() -> None:
    model, ids = families.build("llama"), families.tokens(2, 8)
    runner = streams.Runner(model, models.blocks(model)[1])
    runner.record(ids)
    kept = {id(t) for call in runner._calls[(2, 8)] for t in tensors(call)}
    assert 1 <= len(kept) <= 4, "three blocks share their mask and rotary embeddings"


def tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    members = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [t for member in members for t in tensors(member)]


def test_nothing_is_left_behind() -> None:
    model = families.build("llama")
    runner = streams.Runner(model, models.blocks(model)[1])
    runner.record(families.tokens(2, 8))
    runner.embed(families.tokens(2, 8), 2)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", families.ALL)
def test_every_product_with_a_prunable_matrix_is_seen(name: str) -> None:
    model, seen = families.build(name), set()
    views = [v for block in models.blocks(model)[1] for v in models.weight_views(block)[0]]
    with prunable.eager_experts(model), streams.InputTap(views, lambda view, x, linear: seen.add(id(view))), torch.no_grad():
        model(input_ids=families.tokens(4, 32), use_cache=False)
    assert all(id(v) in seen for v in views if v.index is None)
    assert seen


def test_error_equals_its_twin_and_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    dense, sparse = torch.randn(5, 4, 6), torch.randn(5, 4, 6)
    expected = reference.error(dense, sparse)
    for batch_size in (1, 2, 8):
        assert streams.error(dense, sparse, batch_size) == pytest.approx(expected, rel=1e-6)
    assert streams.error(dense, dense) == (0.0, 0.0, 0.0, 0.0)
    dense[0, 0] *= 1e4  # one massive activation decides the NMSE, and not the token NMSE
    sparse[0, 0] = dense[0, 0]
    found = streams.error(dense, sparse)
    assert found.nmse < 1e-5 and found.token_nmse == pytest.approx(expected[2], rel=0.2)
    assert streams.error(dense, torch.zeros_like(dense))[1] == pytest.approx(1)


@pytest.mark.gpu
def test_streams_that_do_not_fit_live_in_pinned_ram_all_of_them() -> None:
    sources = {"calibration": torch.ones(4, 8, 16, device="cuda"), "extra": torch.ones(1, 8, 16, device="cuda")}
    free, _ = torch.cuda.mem_get_info()
    away = streams.store(sources, free, torch.device("cuda"))
    assert all(x.is_pinned() and torch.equal(x, sources[name].cpu()) for name, x in away.items())
    assert all(x is sources[name] for name, x in streams.store(sources, 2, torch.device("cuda")).items())


def test_what_is_fetched_comes_in_order_and_not_before_it_is_wanted() -> None:
    begun: list[int] = []

    def load(number: int) -> tuple[torch.Tensor, ...]:
        begun.append(number)
        return torch.tensor(number), torch.tensor(-number)

    for count in (0, 1, 2, 5):
        begun.clear()
        found = streams.prefetch((lambda n=n: load(n) for n in range(count)), torch.device("cpu"))
        for number, (a, b) in enumerate(found):
            assert (int(a), int(b)) == (number, -number) and begun == list(range(number + 1))
        assert len(begun) == count


@pytest.mark.gpu
def test_a_gpu_fetches_ahead_and_gets_the_same() -> None:
    away, device = torch.randn(40, 512, 1024).pin_memory(), torch.device("cuda")
    weight = torch.randn(1024, 1024, device=device)
    for count in (0, 1, 2, 40):
        sums = []
        for x, y in streams.prefetch((lambda n=n: tuple(away[n].to(device, non_blocking=True) for _ in "xy") for n in range(count)), device):
            for _ in range(20):  # work that takes longer than a copy, in memory that is soon free again
                x = torch.tanh(x @ weight)
            sums.append((y[0].double().sum(), x.isfinite().all()))
        assert [float(s) for s, _ in sums] == pytest.approx([float(away[n].double().sum()) for n in range(count)], rel=1e-9)
        assert all(finite for _, finite in sums)


def test_streams_that_do_not_fit_in_memory_live_on_disk(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """The same bits, from files that leave nothing behind; and a sentence where the disk is full, too."""
    config, ids, other = PruneConfig(technique="BR+GP+CR", epochs=1, batch_size=4), families.tokens(6, 16), families.tokens(3, 16, 1)
    whole, away = families.build("llama"), families.build("llama")
    expected = pruning.prune(whole, ids, config, held_out={"other": other}, progress=False)
    assert not hasattr(streams.allocate_like(torch.ones(2)), "on_disk")
    monkeypatch.setattr(streams.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    kept = streams.store({"calibration": torch.arange(6.0).view(1, 2, 3).bfloat16()}, 4, torch.device("cpu"))["calibration"]
    assert kept.on_disk and streams.allocate_like(kept).on_disk and kept.dtype == torch.bfloat16 and kept.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    found = pruning.prune(away, ids, config, held_out={"other": other}, progress=False)
    assert found.errors.equals(expected.errors) and models.weights_sum(away) == models.weights_sum(whole)
    assert [file.name for file in cache.iterdir() if file.is_file()] == ["precision.json"]
    monkeypatch.setattr(streams.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="fit neither in memory nor on disk"):
        pruning.prune(away, ids, config, progress=False)


def test_a_stream_that_goes_on_in_place_is_the_same() -> None:
    model, ids = families.build("llama"), families.tokens(5, 16)
    runner = streams.Runner(model, models.blocks(model)[1])
    states = runner.embed(ids, 2)
    expected = runner.advance([0, 1], states, 2)
    assert runner.advance([0, 1], states, 2, in_place=True) is states and torch.equal(states, expected)

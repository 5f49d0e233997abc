"""Training a window: what moves, what stays, and the same result however it is cut into pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from torch import nn

from reconkit import reconstruct as rooms
from reconkit.config import ConfigError, PruneConfig


def window() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def pairs(count: int = 10, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 4, 8, generator=torch.Generator().manual_seed(seed))
    return x, x.roll(1, -1)


def train(module: nn.Module, masks: Any = None, held_out: Any = None, training: Any = None, **values: Any) -> rooms.Trained:
    config = PruneConfig(**{"technique": "BR", "epochs": 3, "batch_size": 4, "learning_rate": 0.01, **values})
    precision = values.get("precision", "fp32")
    trainer = rooms.Trainer([module], module, masks or {}, config, precision=precision, where="block 7")
    return trainer.fit(training or {"calibration": pairs()}, held_out or {})


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_one_step_is_adamw_on_the_mean_square() -> None:
    module, twin = window(), window()
    mask = torch.rand(8, 8) > 0.5
    for m in (module, twin):
        m[0].weight.data.mul_(mask)
    result = train(module, {module[0].weight: mask}, steps=1, batch_size=10)
    x, y = pairs()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    loss = ((twin(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    twin[0].weight.data.mul_(mask)
    assert torch.allclose(flat(module), flat(twin), atol=1e-6)
    assert result.losses[0] == (0, "calibration", pytest.approx(loss.item(), rel=1e-5))
    assert (module[0].weight[~mask] == 0).all() and (module[0].weight[mask] != 0).all()


@pytest.mark.parametrize("values", [{}, {"gradient_clip": 0.01}, {"micro_batch": 3}], ids=["plain", "clipped", "in parts"])
def test_training_equals_masking_the_weights_after_every_step(values: dict[str, Any]) -> None:
    module, twin = window(), window()
    mask = torch.rand(8, 8) > 0.5
    for m in (module, twin):
        m[0].weight.data.masked_fill_(~mask, 0)
    train(module, {module[0].weight: mask}, batch_size=10, epochs=3, **values)
    x, y = pairs()
    reference.train_masked(twin, twin[0].weight, mask, x, y, 3, 0.01, values.get("gradient_clip"))
    assert torch.allclose(flat(module), flat(twin), atol=1e-6)
    dropped = module[0].weight[~mask]
    assert (dropped == 0).all() and not torch.signbit(dropped).any()


def test_the_learning_rate_falls_linearly_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    real = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(window(), steps=5)
    assert rates == pytest.approx([0.01, 0.008, 0.006, 0.004, 0.002])


def test_micro_batches_and_recomputation_change_nothing() -> None:
    plain, micro, again = window(), window(), window()
    train(plain)
    train(micro, micro_batch=1)
    train(again, recompute=True)
    assert torch.allclose(flat(plain), flat(micro), atol=1e-5)
    assert torch.equal(flat(plain), flat(again))


def test_steps_override_epochs_and_more_samples_mean_fewer_epochs() -> None:
    few = train(window(), steps=6)
    many = train(window(), steps=6, training={"calibration": pairs(20)})
    assert max(epoch for epoch, *_ in few.losses) == 2 and max(epoch for epoch, *_ in many.losses) == 2
    assert max(epoch for epoch, *_ in train(window(), steps=6, training={"calibration": pairs(24)}).losses) == 1


def test_every_source_trains_and_is_reported_by_itself() -> None:
    result = train(window(), training={"calibration": pairs(), "extra": pairs(4, 2)}, held_out={"news": pairs(4, 3)})
    assert [(e, s) for e, s, _ in result.losses if e in (0, 3)] == [(e, s) for e in (0, 3) for s in ("calibration", "extra", "news")]
    alone = window()
    train(alone)
    both = window()
    train(both, training={"calibration": pairs(), "extra": pairs(4, 2)})
    assert not torch.equal(flat(alone), flat(both))
    watched = window()
    train(watched, held_out={"news": pairs(4, 3)})
    assert torch.equal(flat(alone), flat(watched)), "held-out samples only measure"


def opposite() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = pairs(6, 5)
    return x, -y


@pytest.mark.parametrize(
    ("held_out", "helps"), [(pairs(6, 5), True), (opposite(), False)], ids=["held-out like training", "held-out unlike training"]
)
def test_early_stopping_keeps_the_best_epochs_weights(held_out: tuple[torch.Tensor, torch.Tensor], helps: bool) -> None:
    """Where training helps new text for a while, and where it never does: then the weights stay as they were."""
    module, before = window(), flat(window())
    config = {"early_stopping": 2, "epochs": 200, "learning_rate": 0.05}
    result = train(module, held_out={"new": held_out}, training={"calibration": pairs(3)}, **config)
    losses = {epoch: loss for epoch, source, loss in result.losses if source == "new"}
    assert max(losses) < 200, "it stopped"
    assert result.best_epoch == min(losses, key=losses.get) == max(losses) - 2
    assert (result.best_epoch > 0) == helps == (not torch.equal(flat(module), before))
    with torch.no_grad():
        assert ((module(held_out[0]) - held_out[1]) ** 2).mean().item() == pytest.approx(losses[result.best_epoch], rel=1e-4)


def test_clipping_bounds_the_step() -> None:
    free, clipped = window(), window()
    before = flat(free)
    train(free, steps=1)
    train(clipped, steps=1, gradient_clip=1e-9)
    assert (flat(clipped) - before).norm() < 0.2 * (flat(free) - before).norm()


def test_flags_and_gradients_are_as_before() -> None:
    module = window()
    module[2].bias.requires_grad_(False)
    train(module)
    assert [p.requires_grad for p in module.parameters()] == [True, True, True, False]
    assert all(p.grad is None for p in module.parameters())


def test_bf16_products_train_fp32_weights() -> None:
    plain, half = window(), window()
    train(plain)
    train(half, precision="bf16")
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert not torch.equal(flat(plain), flat(half)) and torch.allclose(flat(plain), flat(half), atol=0.05)


def test_fp16_steps_that_overflow_are_skipped_and_not_counted_by_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    real = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    x, y = pairs()
    module = window()
    result = train(module, precision="fp16", steps=8, training={"calibration": (x, 300 * y)})
    skipped, taken = result.skipped, 8 - result.skipped  # the scale starts high, so the skipped steps come first
    assert 0 < skipped < 8
    assert rates == pytest.approx([0.01] * skipped + [0.01 * (1 - i / 8) for i in range(taken)])
    assert torch.isfinite(flat(module)).all()


def test_fp16_gradients_are_unscaled_before_they_are_clipped() -> None:
    moved = []
    for precision in ("fp32", "fp16"):
        module = window()
        before = flat(module)
        train(module, precision=precision, steps=1, gradient_clip=1e-3)
        moved.append(flat(module) - before)
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.95 and moved[1].norm() == pytest.approx(moved[0].norm().item(), rel=0.1)


def test_an_infinite_loss_stops_with_window_and_epoch() -> None:
    x, y = pairs()
    with pytest.raises(FloatingPointError, match="calibration of block 7 is .* in epoch 0"):
        train(window(), training={"calibration": (x, y * 1e30)})


def test_precision_is_chosen_by_measuring_and_remembered(cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for faster, expected in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        timed: list[torch.dtype] = []

        def seconds(dtype: torch.dtype, faster: torch.dtype = faster, timed: list[torch.dtype] = timed) -> float:
            timed.append(dtype)
            return 1.0 if dtype == faster else 12.0

        monkeypatch.setattr(rooms, "_seconds", seconds)
        (cache / "precision.json").unlink(missing_ok=True)
        for _ in range(2):
            rooms._bf16_pays.cache_clear()
            assert rooms.resolve_precision("auto", "cpu") == expected
        assert len(timed) == 2, "the second process reads what the first measured"
    rooms._bf16_pays.cache_clear()
    assert rooms.resolve_precision("fp32", "cpu") == "fp32" and rooms.resolve_precision("bf16", "cpu") == "bf16"


def test_a_measurement_that_cannot_be_kept_is_used(read_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "_cpu", lambda: "a processor that nobody measured")
    monkeypatch.setattr(rooms, "_seconds", lambda kind: 1.0 if kind == torch.float32 else 0.1)
    known = (read_only / "precision.json").read_text()
    rooms._bf16_pays.cache_clear()
    assert rooms.resolve_precision("auto", "cpu") == "bf16"
    rooms._bf16_pays.cache_clear()
    assert (read_only / "precision.json").read_text() == known


@pytest.mark.gpu
def test_precision_on_a_gpu_goes_by_compute_capability() -> None:
    capable = torch.cuda.get_device_capability()[0] >= 8
    assert rooms.resolve_precision("auto", "cuda") == ("bf16" if capable else "fp16")
    if not capable:
        with pytest.raises(ConfigError, match="no units"):
            rooms.resolve_precision("bf16", "cuda")


@pytest.mark.gpu
def test_fp16_unscales_before_clipping_and_does_not_count_skipped_steps() -> None:
    module = window().cuda()
    result = train(module, precision="fp16", gradient_clip=1.0, epochs=10)
    assert torch.isfinite(flat(module)).all() and result.losses[-1][2] < result.losses[0][2]

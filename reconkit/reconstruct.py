"""Training the kept weights of a window towards a target.

Minimises mean((g(m ⊙ w; x) − target)²) over all scalars (paper, section 2) with AdamW (betas 0.9, 0.95, no weight
decay) and a learning rate that falls linearly to zero. Everything in the window is trained, norms and biases too;
masked entries stay zero.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from .assets import CannotWrite, cache_dir, writing
from .config import ConfigError, PruneConfig
from .streams import finite_advice, prefetch

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
FASTER = 1.3  # bf16 must beat fp32 by this much to be chosen on a CPU


@dataclass
class Trained:
    """Result of training a window, besides the weights."""

    losses: list[tuple[int, str, float]]
    "(epoch, source, loss): epoch 0 is before training; a training source's later losses are means over the epoch's steps."
    skipped: int = 0
    "Steps that were skipped because an fp16 gradient overflowed."
    best_epoch: int | None = None
    "Epoch whose weights were kept, with early stopping."


Pairs = Mapping[str, tuple[Tensor, Tensor]]
"Per source (inputs, targets), each (N, T, H) stored anywhere."
Rows = list[tuple[int, str, float]]
"(epoch, source, loss)."


class Trainer:
    """Trains the modules of one window in place.

    Args:
        modules: the blocks of the window, in fp32, on their device.
        forward: (B, T, H) → (B, T, H) through the window as it now is.
        masks: True where a parameter's entry is kept, in the parameter's own layout; the others are zero, and stay so.
        precision: "fp32", "bf16" or "fp16" for the products; `resolve_precision` chooses.
        where: the window's name in messages, such as "block 3".
        stream: the window's place, so that each window shuffles differently under one seed.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        forward: Callable[[Tensor], Tensor],
        masks: Mapping[nn.Parameter, Tensor],
        config: PruneConfig,
        *,
        precision: str,
        where: str,
        stream: int = 0,
    ) -> None:
        self.forward, self.config, self.precision, self.where, self.stream = forward, config, precision, where, stream
        self.parameters = [p for m in modules for p in m.parameters()]
        self.masks = [(p, mask.view(torch.uint8)) for p, mask in masks.items()]  # products with bytes are faster than with bools
        self.device = self.parameters[0].device
        self.result = Trained([])
        self.done = self.total = 0
        self._best: tuple[float, list[Tensor]] | None = None

    def fit(self, training: Pairs, held_out: Pairs, on_epoch: Callable[[int, Rows], None] | None = None) -> Trained:
        """Train on all samples of `training`, shuffled together; `held_out` only measures.

        Raises:
            FloatingPointError: a loss is NaN or infinite; the message names window and epoch.
        """
        owner = [(name, i) for name, (x, _) in training.items() for i in range(len(x))]
        per_epoch = math.ceil(len(owner) / self.config.batch_size)
        self.total = self.config.steps if self.config.steps is not None else self.config.epochs * per_epoch
        flags = [p.requires_grad for p in self.parameters]
        self._set_up()
        epoch = 0
        self._record([(0, name, self.evaluate(*pair)) for name, pair in {**training, **held_out}.items()], training, on_epoch)
        stop = self._stops_early(0, held_out)
        while self.done < self.total and not stop:
            epoch += 1
            rows = [(epoch, name, loss) for name, loss in self._epoch(epoch, owner, training).items()]
            rows += [(epoch, name, self.evaluate(*pair)) for name, pair in held_out.items()]
            self._record(rows, training, on_epoch)
            stop = self._stops_early(epoch, held_out)
        with torch.no_grad():
            for p, value in zip(self.parameters, self._best[1] if self._best else [], strict=False):
                p.copy_(value)
        for p, flag in zip(self.parameters, flags, strict=True):
            p.requires_grad_(flag)
            p.grad = None
        return self.result

    def _set_up(self) -> None:
        for p in self.parameters:
            p.requires_grad_(True)
        fused = self.device.type in ("cuda", "cpu")
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def _epoch(self, epoch: int, owner: list[tuple[str, int]], training: Pairs) -> dict[str, float]:
        """One pass over the samples in an order of its own: mean loss per source, over the steps."""
        batch, micro = self.config.batch_size, self.config.micro_batch or self.config.batch_size
        seed = _seed(self.config.seed, self.stream, epoch)
        order = torch.randperm(len(owner), generator=torch.Generator().manual_seed(seed)).tolist()
        batches = [[owner[i] for i in order[start : start + batch]] for start in range(0, len(order), batch)][: self.total - self.done]
        parts = [[chosen[i : i + micro] for i in range(0, len(chosen), micro)] for chosen in batches]

        def put(rows: list[tuple[str, int]]) -> tuple[Tensor, ...]:
            # one by one, because only what lies in pinned memory is copied while the GPU works
            return tuple(torch.stack([training[name][side][i].to(self.device, non_blocking=True) for name, i in rows]) for side in (0, 1))

        ready = prefetch((partial(put, rows) for mine in parts for rows in mine), self.device)
        sums = {name: torch.zeros((), device=self.device) for name in training}
        for mine in parts:
            self._step(mine, ready, sums)
        counts = Counter(name for chosen in batches for name, _ in chosen)
        totals = torch.stack(list(sums.values())).tolist()
        return {name: total / counts[name] for name, total in zip(sums, totals, strict=True) if counts[name]}

    def _step(self, parts: list[list[tuple[str, int]]], ready: Iterator[tuple[Tensor, ...]], sums: dict[str, Tensor]) -> None:
        """One optimiser step over the micro-batches `parts`; their losses are added to `sums`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * (1 - (self.done - self.result.skipped) / self.total)
        samples = sum(map(len, parts))
        for rows in parts:
            losses = self._losses(*next(ready), recompute=self.config.recompute)  # (B,)
            self.scaler.scale(losses.sum() / samples).backward()
            for (name, _), value in zip(rows, losses.detach(), strict=True):
                sums[name] += value
        for p, ones in self.masks:  # without a gradient AdamW leaves a zero at zero
            if p.grad is not None:
                p.grad.mul_(ones)
        if self.config.gradient_clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.result.skipped += int(self.scaler.get_scale() < before)
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor) -> float:
        """Mean loss over samples (N, T, H)."""
        pairs = list(zip(inputs.split(self.config.batch_size), targets.split(self.config.batch_size), strict=True))
        batches = prefetch((lambda pair=pair: tuple(side.to(self.device, non_blocking=True) for side in pair) for pair in pairs), self.device)
        losses = [self._losses(x, y).mean() * len(x) for x, y in batches]
        return float(torch.stack(losses).sum()) / len(inputs)

    def _losses(self, x: Tensor, y: Tensor, *, recompute: bool = False) -> Tensor:
        """(B,) mean squared error of each sample, in fp32."""
        with autocast(self.device, self.precision):
            out = recomputed(self.forward, x.float(), use_reentrant=False) if recompute else self.forward(x.float())  # (B, T, H)
        return (out.float() - y.float()).square().mean(dim=tuple(range(1, out.ndim)))

    def _record(self, rows: Rows, training: Pairs, on_epoch: Callable[[int, Rows], None] | None) -> None:
        _finite(rows, self.where, self.precision, next(iter(training.values()))[0].dtype)
        self.result.losses += rows
        if on_epoch:
            on_epoch(rows[0][0], rows)

    def _stops_early(self, epoch: int, held_out: Pairs) -> bool:
        """Keep the weights of the best epoch so far, the one before training included; whether it is too long ago."""
        if self.config.early_stopping is None:
            return False
        held = sum(loss for e, name, loss in self.result.losses if e == epoch and name in held_out) / len(held_out)
        if self._best is None or held < self._best[0]:
            self._best, self.result.best_epoch = (held, [p.detach().clone() for p in self.parameters]), epoch
        return epoch - self.result.best_epoch >= self.config.early_stopping


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, HALF[precision])


def _finite(rows: Sequence[tuple[int, str, float]], where: str, precision: str, dtype: torch.dtype) -> None:
    """Raise where a loss is not finite, with advice that fits: before the first step the learning rate is not the cause."""
    for epoch, source, loss in rows:
        if math.isfinite(loss):
            continue
        ways = ["use precision bf16 or fp32"] if precision == "fp16" else []
        if epoch:
            ways.append("lower learning_rate")
        elif dtype == torch.float16 or not ways:
            ways.append(finite_advice(dtype))
        raise FloatingPointError(f"The loss on {source} of {where} is {loss} in epoch {epoch}; {', and '.join(ways)}.")


def _seed(*parts: int) -> int:
    """Hash several numbers to one of 63 bits, the same on every machine."""
    value = 0x9E3779B97F4A7C15
    for part in parts:
        value = ((value ^ part) * 0xBF58476D1CE4E5B9) % 2**64
    return value >> 1


def resolve_precision(precision: str, device: str) -> str:
    """fp32, bf16 or fp16 for a device. auto: on a GPU by compute capability, on a CPU by timing one multiplication.

    torch reports bf16 on CPUs that emulate it twelve times slower, and on GPUs (compute capability below 8.0) that
    have no units for it.

    Raises:
        ConfigError: bf16 on a GPU that has no units for it.
    """
    kind = device.split(":")[0]
    if kind == "cuda":
        capable = torch.cuda.get_device_capability(device)[0] >= 8
        if precision == "bf16" and not capable:
            raise ConfigError(f"precision is 'bf16', which {torch.cuda.get_device_name(device)} has no units for; use fp16 or auto.")
        return ("bf16" if capable else "fp16") if precision == "auto" else precision
    if precision == "auto":
        return "bf16" if kind == "cpu" and _bf16_pays() else "fp32"
    return precision


@lru_cache
def _bf16_pays() -> bool:
    """Whether bf16 products are clearly faster on this CPU; measured once for processor, torch and threads, then kept where that is possible."""
    file, key = cache_dir() / "precision.json", _cpu()
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        known = {}
    if key not in known:
        known[key] = _seconds(torch.float32) / _seconds(torch.bfloat16)
        with suppress(CannotWrite), writing(file) as partial:
            partial.write_text(json.dumps(known, indent=1))
    return known[key] > FASTER


def _cpu() -> str:
    """What the answer depends on."""
    return f"{platform.processor() or platform.machine()} {cpu_name()} torch {torch.__version__} threads {torch.get_num_threads()}"


def _seconds(dtype: torch.dtype, size: int = 1024) -> float:
    """Best of five times for a product of two square matrices."""
    a = torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def cpu_name() -> str:
    """The model of the processor, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())

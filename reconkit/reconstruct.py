"""Training the kept weights of a window towards a target: a pure function of modules and tensors.

Minimises mean((g(m ⊙ w; x) − target)²) over all scalars (paper, section 2) with AdamW (betas 0.9, 0.95, no weight
decay) and a learning rate that falls linearly to zero. Everything in the window is trained, norms and biases too;
masked entries stay zero.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from . import parallel
from .assets import CannotWrite, cache_dir, writing
from .config import ConfigError, PruneConfig
from .streams import fetched

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
FASTER = 1.3  # bf16 must beat fp32 by this much to be chosen on a CPU


@dataclass
class Trained:
    """What a window's training leaves besides the weights."""

    losses: list[tuple[int, str, float]]
    "(epoch, source, loss): epoch 0 is before training; a training source's later losses are means over the epoch's steps."
    skipped: int = 0
    "Steps that fp16 skipped because a gradient overflowed."
    best_epoch: int | None = None
    "The epoch whose weights were kept, when early stopping was asked for."


def reconstruct(
    modules: Sequence[nn.Module],
    forward: Callable[[Tensor], Tensor],
    masks: Mapping[nn.Parameter, Tensor],
    training: Mapping[str, tuple[Tensor, Tensor]],
    held_out: Mapping[str, tuple[Tensor, Tensor]],
    config: PruneConfig,
    *,
    precision: str,
    where: str,
    stream: int = 0,
    on_epoch: Callable[[int, int, list[tuple[int, str, float]]], None] | None = None,
) -> Trained:
    """Train `modules` in place; several ranks, given the same, share each step's batch and take the same step.

    Args:
        modules: the blocks of the window, in fp32, on their device.
        forward: (B, T, H) → (B, T, H) through the window as it now is.
        masks: True where a parameter's entry is kept, in the parameter's own layout; the others are zero, and stay so.
        training: per source (inputs, targets), each (N, T, H) stored anywhere; all are trained on, shuffled together.
        held_out: per source (inputs, targets) that only measure.
        precision: "fp32", "bf16" or "fp16" for the products; `resolve_precision` chooses.
        where: the window's name in messages, such as "block 3".
        stream: the window's place, so that each window shuffles differently under one seed.

    Raises:
        FloatingPointError: a loss is NaN or infinite; the message names window and epoch.
    """
    device = next(modules[0].parameters()).device
    batch, micro = config.batch_size, config.micro_batch or config.batch_size
    owner = [(name, i) for name, (x, _) in training.items() for i in range(len(x))]
    per_epoch = math.ceil(len(owner) / batch)
    total = config.steps if config.steps is not None else config.epochs * per_epoch
    parameters = [p for m in modules for p in m.parameters()]
    kept = [(p, mask.view(torch.uint8)) for p, mask in masks.items()]  # products with bytes are faster than with bools
    flags = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type in ("cuda", "cpu"))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    scaler.scale(torch.zeros((), device=device))  # makes its scale now: a rank may have no sample in the first batch
    run = (lambda x: recomputed(forward, x, use_reentrant=False)) if config.recompute else forward

    def parts(chosen: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
        mine = chosen[parallel.share(len(chosen))]
        return [mine[i : i + micro] for i in range(0, len(mine), micro)]

    def put(rows: list[tuple[str, int]]) -> tuple[Tensor, ...]:
        # one by one, because only what lies in pinned memory is copied while the GPU works
        return tuple(torch.stack([training[name][side][i].to(device, non_blocking=True) for name, i in rows]) for side in (0, 1))

    @torch.no_grad()
    def loss_of(inputs: Tensor, targets: Tensor) -> float:
        pairs = list(zip(inputs.split(batch), targets.split(batch), strict=True))
        losses = torch.zeros(len(pairs), device=device)
        mine = range(parallel.rank(), len(pairs), parallel.count())
        for i, pair in zip(mine, fetched((lambda i=i: tuple(s.to(device, non_blocking=True) for s in pairs[i]) for i in mine), device), strict=True):
            losses[i] = _loss(forward, *pair, device, precision) * len(pairs[i][0])
        return float(parallel.add(losses).sum()) / len(inputs)

    result = Trained([(0, name, loss_of(*pair)) for name, pair in {**training, **held_out}.items()])
    _finite(result.losses, where)
    best, best_state, done, epoch = math.inf, None, 0, 0
    if config.early_stopping is not None:  # training that never helps leaves the weights as they were
        best = sum(loss for _, name, loss in result.losses if name in held_out) / len(held_out)
        best_state, result.best_epoch = [p.detach().clone() for p in parameters], 0
    if on_epoch:
        on_epoch(0, math.ceil(total / per_epoch), result.losses)
    while done < total:
        epoch += 1
        order = torch.randperm(len(owner), generator=torch.Generator().manual_seed(_seed(config.seed, stream, epoch))).tolist()
        sums = {name: [torch.zeros((), device=device), 0] for name in training}
        batches = [[owner[i] for i in order[start : start + batch]] for start in range(0, len(order), batch)][: total - done]
        dealt = [parts(chosen) for chosen in batches]
        ready = fetched((partial(put, rows) for mine in dealt for rows in mine), device)
        for chosen, mine in zip(batches, dealt, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * (1 - (done - result.skipped) / total)
            for rows in mine:
                losses = _sample_losses(run, *next(ready), device, precision)
                scaler.scale(losses.sum() / len(chosen)).backward()
                for (name, _), value in zip(rows, losses.detach(), strict=True):
                    sums[name][0] += value
            for name, _ in chosen:
                sums[name][1] += 1
            parallel.add_gradients(parameters)
            for p, ones in kept:  # without a gradient AdamW leaves a zero at zero
                if p.grad is not None:
                    p.grad.mul_(ones)
            if config.gradient_clip is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            result.skipped += int(scaler.get_scale() < before)
            optimizer.zero_grad(set_to_none=True)
            done += 1
        totals = parallel.add(torch.stack([total_loss for total_loss, _ in sums.values()])).tolist()
        rows = [(epoch, name, total_loss / n) for total_loss, (name, (_, n)) in zip(totals, sums.items(), strict=True) if n]
        rows += [(epoch, name, loss_of(*pair)) for name, pair in held_out.items()]
        _finite(rows, where)
        result.losses += rows
        if on_epoch:
            on_epoch(epoch, math.ceil(total / per_epoch), rows)
        if config.early_stopping is not None:
            held = sum(loss for _, name, loss in rows if name in held_out) / len(held_out)
            if held < best:
                best, result.best_epoch = held, epoch
                best_state = [p.detach().clone() for p in parameters]
            elif epoch - result.best_epoch >= config.early_stopping:
                break
    with torch.no_grad():
        for p, best_value in zip(parameters, best_state or [], strict=False):
            p.copy_(best_value)
    for p, flag in zip(parameters, flags, strict=True):
        p.requires_grad_(flag)
        p.grad = None
    return result


def _sample_losses(forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, device: torch.device, precision: str) -> Tensor:
    """(B,) mean squared error of each sample, in fp32."""
    with autocast(device, precision):
        out = forward(x.float())
    return (out.float() - y.float()).square().mean(dim=tuple(range(1, out.ndim)))


def _loss(forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, device: torch.device, precision: str) -> Tensor:
    return _sample_losses(forward, x, y, device, precision).mean()


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, HALF[precision])


def _finite(rows: Sequence[tuple[int, str, float]], where: str) -> None:
    for epoch, source, loss in rows:
        if not math.isfinite(loss):
            raise FloatingPointError(f"The loss on {source} of {where} is {loss} in epoch {epoch}; lower learning_rate, or use precision fp32.")


def _seed(*parts: int) -> int:
    """One number of 63 bits for several, the same on every machine."""
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

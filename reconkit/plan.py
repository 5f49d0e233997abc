"""What a pruning will take, from a look of seconds: its first blocks are pruned with a few samples, and the rest is proportion."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from . import cost, data, models, prunable, pruning, report
from .config import PruneConfig, RunConfig
from .streams import Runner

BLOCKS = 3  # that are looked at: enough for a window of two that overlaps both of its neighbours; windows of one need a neighbour less
ENOUGH = 12.0  # seconds of looking after which no larger look is taken
TRAINING, OTHERS = 3, 4  # passes of a sample through a block: of an epoch that trains it, and besides (dense, sparse, for its mask, before training)


@dataclass(frozen=True)
class Look:
    """A few samples through the first blocks."""

    samples: int
    epochs: int
    seconds: float
    rss_bytes: int
    "Peak of RAM with the whole model, everything in the process included."
    gpu_bytes: int
    "The same on the GPU."
    process_bytes: int
    "Peak of the whole process, loading included."
    blocks: int
    "Of the whole model."
    extra: int = 0
    "Samples of the text that only trains."
    one: float = 0.0
    "Seconds that one sample and one epoch took."
    stream_bytes: float = 0.0
    "All streams of one more sample, its share of the held-out ones included."


@dataclass(frozen=True)
class Estimate:
    """What the whole walk will take."""

    seconds: float
    rss_bytes: float
    "Peak of RAM, everything in the process included."
    gpu_bytes: float
    "Peak on the GPU, the model included; 0 without one."
    probe_seconds: float
    extra: int = 0
    "Samples of the text that only trains."


def estimate(job: RunConfig, *, offload: bool = False) -> Estimate:
    """Prune the first blocks a little, and say what all of it will take.

    With n samples and e epochs a walk takes A + n · (F + e · G) seconds and M + n · S bytes. Three looks, in processes of
    their own so that no memory is used twice, give A, F, G and M, S. Where the first takes so long that it has to do, a single
    sample before it gives A, an epoch is as much of the rest as its passes are of all passes, and S is what the streams take.
    Text that only trains counts as samples.

    Args:
        job: model, count, length, held-out sets and how it is pruned.
        offload: blocks are read from disk.

    Raises:
        ConfigError: as `prune`.
    """
    config, started = job.prune, time.perf_counter()
    seen = min(BLOCKS, config.window_blocks + (not offload))  # beside a block from disk, what is done once a walk takes no time
    first = cost.apart(look, job, offload, config.batch_size, 1, seen)
    taken, count = time.perf_counter() - started, job.count + first.extra
    wide = cost.apart(look, job, offload, 2 * config.batch_size, 1, seen) if taken < ENOUGH else None
    long = cost.apart(look, job, offload, config.batch_size, 2, seen) if taken < ENOUGH and config.trains else None
    whole = first.blocks / min(seen, first.blocks)
    epochs = config.epochs if config.steps is None else config.steps * config.batch_size / count

    def added(name: str, other: Look) -> float:
        """How much more each sample of the first look took in another one."""
        return max(getattr(other, name) - getattr(first, name), 0) / first.samples

    slope = added("seconds", wide) if wide else max(first.seconds - first.one, 0.0) / max(first.samples - 1, 1)
    passes = TRAINING * config.window_blocks / (config.window_blocks - config.overlap_blocks) if config.trains else 0
    per_epoch = added("seconds", long) if long else slope * passes / (passes + OTHERS)
    more = count - first.samples
    seconds = first.seconds + more * slope + count * (epochs - 1) * per_epoch
    rss = first.rss_bytes + more * (added("rss_bytes", wide) if wide else first.stream_bytes)
    gpu = first.gpu_bytes + more * added("gpu_bytes", wide or first)
    return Estimate(whole * seconds, rss, gpu, time.perf_counter() - started, first.extra)


def look(job: RunConfig, offload: bool, samples: int, epochs: int, blocks: int = BLOCKS) -> Look:
    """Prune the first blocks with so many samples and epochs; once before it is timed, so that what is made once is there."""
    base = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        options = {"dtype": getattr(torch, job.dtype), "device": job.device}
        model, tokenizer = models.open_model(job.model, Path(folder) / "blocks", **options) if offload else models.load_model(job.model, **options)
        extra = data.load_samples(job.extra, tokenizer, count=None, length=job.length, seed=job.seed, bos=job.bos) if job.extra else ()
        total, size = len(models.blocks(model)[1]), _bytes(model)
        _shorten(model, blocks)
        left_out = 0 if offload else size - _bytes(model)
        held_out = max(1, round(job.held_out_count * samples / job.count))
        few = replace(job.prune, epochs=epochs, steps=None, early_stopping=None, layer_sparsity={})
        with cost.measure() as used:
            one = _prune(model, job, replace(few, epochs=1), 1, 1)
            seconds = _prune(model, job, few, samples, held_out)
    peak = cost.process_peak()
    on_gpu = used.gpu_bytes > 0
    rss = peak if offload or on_gpu else base + size + used.rss_bytes  # a whole model may be mapped from its file and not yet be resident
    states = job.length * model.get_input_embeddings().embedding_dim * model.dtype.itemsize
    streams = pruning.STREAMS * states * (1 + job.held_out_count * len(job.held_out) / job.count)
    return Look(samples, epochs, seconds, rss, used.gpu_bytes + left_out if on_gpu else 0, peak, total, len(extra), one, streams)


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.dtype.itemsize for p in model.parameters())


def _prune(model: nn.Module, job: RunConfig, config: PruneConfig, samples: int, held_out: int) -> float:
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> torch.Tensor:
        return torch.randint(vocabulary, (count, job.length), generator=generator)

    result = pruning.prune(model, ids(samples), config, held_out={name: ids(held_out) for name in job.held_out}, progress=False)
    return result.seconds


def _shorten(model: Any, count: int) -> None:
    """Leave the first blocks only."""
    name, layers = models.blocks(model)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layers[:count])
    model.config.get_text_config().num_hidden_layers = min(count, len(layers))


def describe(model: nn.Module, job: RunConfig, found: Estimate, *, checkpoint: bool = False, price_per_hour: float | None = None) -> str:
    """What would be done to `model`, and what it would take; one forward of a few tokens finds its matrices."""
    _, layers = models.blocks(model)
    config = job.prune
    views = prunable.find(Runner(model, layers), torch.zeros(1, 8, dtype=torch.long, device=model.device), config)
    chosen = [(views.full_name(i, v), v.get().numel()) for i, row in enumerate(views.views) for v in row if v.name in views.chosen]
    weights, zeros = sum(n for _, n in chosen), sum(n * config.sparsity_of(name) for name, n in chosen)
    parameters = sum(p.numel() for p in model.parameters())
    windows = pruning.windows(len(layers), config.window_blocks, config.overlap_blocks)
    trained = job.count + found.extra
    steps = config.steps or config.epochs * math.ceil(trained / config.batch_size)
    samples = trained + job.held_out_count * len(job.held_out)
    streams = samples * job.length * model.get_input_embeddings().embedding_dim * model.dtype.itemsize
    kept = parameters * model.dtype.itemsize + weights + 3 * streams  # blocks, masks, streams
    lines = {
        "model": f"{job.model}, {len(layers)} blocks, {parameters / 1e6:,.1f}M parameters, {job.dtype} on {model.device}",
        "mask": f"{config.criterion}, {config.pattern}: {zeros / 1e6:,.1f}M of {weights / 1e6:,.1f}M weights in {len(chosen)} matrices go",
        "technique": f"{config.technique}: {len(windows)} windows of up to {max(map(len, windows))} blocks"
        + (f", {steps} optimiser steps each" if config.trains else ", no training"),
        "calibration": f"{job.count} samples of {job.length} tokens of {job.corpus}" + (f", and {job.extra}" if job.extra else ""),
        "held-out": f"{job.held_out_count} samples of each of {', '.join(job.held_out)}" if job.held_out else "none",
        "time": f"about {report.clock(found.seconds)}",
        "memory": f"about {report.size(found.rss_bytes)} of RAM in all",
        "disk": report.size(parameters * model.dtype.itemsize),
    }
    if found.gpu_bytes:
        lines["memory"] += f", {report.size(found.gpu_bytes)} on the GPU"
    if checkpoint:
        lines["disk"] += f", and {report.size(kept)} for the checkpoint while it runs"
    if price_per_hour is not None:
        lines["cost"] = f"about {cost.money(found.seconds, price_per_hour):.3g}, at {price_per_hour:g} an hour"
    lines["looked for"] = f"{found.probe_seconds:.0f} seconds, with a few blocks and samples"
    return "\n".join([*(f"{name:<12} {text}" for name, text in lines.items()), *views.notes])

"""The walk through the model, as section 2 of the paper reads. The only room that knows the order of things.

For each window of blocks: bring both streams before it, compute the target with the dense blocks, prune the blocks that
are new, train the window towards the target. A block's error is measured when the streams advance through it, after its
last training.

    dense   x̄ᵢ₊₁ = gᵢ(w̄ᵢ ; x̄ᵢ)            sparse   xᵢ₊₁ = gᵢ(mᵢ⊙wᵢ ; xᵢ)
"""

from __future__ import annotations

import copy
import fnmatch
import math
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from . import cost, criteria, offload, overfit, parallel
from .checkpoint import Checkpoint
from .config import ConfigError, PruneConfig, nm_pattern
from .models import WeightView, blocks, check_length, weight_views
from .progress import Progress
from .reconstruct import reconstruct, resolve_precision
from .streams import Errors, InputTap, Runner, error, room, store

STREAMS = 4  # of the samples' size at once, at most: dense, sparse, target, and what is advanced
FEW_TOKENS = 2  # an expert needs this many tokens per input column, else its mask is by magnitude


@dataclass
class PruneResult:
    """What a pruning did, measured on the way."""

    errors: pd.DataFrame
    "block (int from 0), source (calibration | extra | a held-out name), mse, nmse, token_nmse, token_nmse_90; see `streams.Errors`"
    training: pd.DataFrame
    'window ("3" or "3+4"), epoch (0 = before training), source, loss'
    sparsity: float
    "Share of zeros that the masks put into the prunable matrices of all blocks."
    seconds: float
    "Wall time of the whole walk, with that of the calls before where it continues from a checkpoint."
    peak_memory: dict[str, int]
    '"gpu": peak bytes on the GPU, "rss": peak bytes of RAM above what was in use before.'
    notes: list[str]
    "What the reader should know: what was left dense, raised damping, experts with few tokens, skipped steps, signs of overfitting."
    config: PruneConfig
    "How it was done."
    per_parameter: float | None
    "Training scalars (samples × tokens × hidden) for each weight left in the largest window; None where nothing is trained."


@dataclass
class Walk:
    """The state between two windows; everything that a checkpoint holds."""

    position: int
    "Block before which the sparse stream stands."
    sparse: dict[str, Tensor]
    "Per source (N, T, H)."
    dense: dict[int, dict[str, Tensor]]
    "Dense streams by position, from `position` to the furthest block that a target needed."
    masks: dict[str, Tensor] = field(default_factory=dict)
    "Kept entries (out, in) by view name, of the blocks that later windows still train."
    zeros: int = 0
    "Entries that masks have set to zero."
    seen: int = 0
    "Zeros found in the prunable matrices of the blocks before `position`."
    left: list[int] = field(default_factory=list)
    "Parameters that are not zero in each of these blocks."
    errors: list[tuple[int, str, float, float, float, float]] = field(default_factory=list)
    training: list[tuple[str, int, str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pruned: int = 0
    earlier: float = 0.0
    "Seconds that the calls took whose state this one continues."


def windows(count: int, width: int, overlap: int) -> list[range]:
    """The windows over `count` blocks: width 1 is {0}, {1}, …; width 2 overlapping by 1 is {0}, {0,1}, …, {L−1}."""
    starts = range(-overlap, count, width - overlap)
    return [range(max(start, 0), min(start + width, count)) for start in starts if start + width > 0]


def prune(
    model: nn.Module,
    samples: Tensor,
    config: PruneConfig,
    *,
    extra: Tensor | None = None,
    held_out: Mapping[str, Tensor] | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> PruneResult:
    """Prune and reconstruct `model` in place; it keeps its modules, dtype, device, flags and state_dict keys.

    In a group of torch.distributed (see `parallel.group`) all ranks call this with the same, share the work and end with the same model.

    Args:
        model: any decoder that transformers builds.
        samples: calibration tokens (N, T): they choose the masks and train.
        config: how; see `PruneConfig`.
        extra: tokens (N', T) that only train, such as self-generated text.
        held_out: name → tokens (N'', T) that do neither; the error is measured on them, block by block.
        checkpoint: a folder in which the state is kept after every window; a killed run continues from it.
        progress: show one bar with an estimate.

    Raises:
        ConfigError: something that cannot be done, by name and reason, before the first block.
        FloatingPointError: NaN or infinity in an activation or a loss, with block, layer or epoch.
        RuntimeError: the ranks' weights differ after a window.
    """
    _check(model, samples, config, extra, held_out)
    name, layers = blocks(model)
    sources = {"calibration": samples, **({} if extra is None else {"extra": extra}), **(held_out or {})}
    _check_ranks(model, sources, config)
    switches = [(m, m.training) for m in model.modules()]
    started = time.perf_counter()
    with cost.measure() as used, _eager_experts(model), torch.random.fork_rng(devices=[]):
        model.eval()
        try:
            walk, found = _walk(model, layers, name, sources, config, checkpoint, progress, started)
        finally:
            for module, training in switches:
                module.training = training
    _verify(layers, walk)
    entries = sum(math.prod(v.get().shape) for views in found.views for v in views)
    return PruneResult(
        errors=pd.DataFrame(walk.errors, columns=["block", "source", *Errors._fields]),
        training=pd.DataFrame(walk.training, columns=["window", "epoch", "source", "loss"]),
        sparsity=walk.zeros / entries,
        seconds=walk.earlier + time.perf_counter() - started,
        peak_memory={"gpu": used.gpu_bytes, "rss": used.rss_bytes},
        notes=walk.notes,
        config=config,
        per_parameter=_per_parameter(walk.left, len(samples) + (0 if extra is None else len(extra)), samples.shape[1], model, config),
    )


def _per_parameter(left: list[int], trained: int, tokens: int, model: nn.Module, config: PruneConfig) -> float | None:
    """Training scalars for each weight that is left in the largest window."""
    if not config.trains:
        return None
    largest = max(sum(left[i] for i in window) for window in windows(len(left), config.window_blocks, config.overlap_blocks))
    return overfit.per_parameter(trained, tokens, model.config.get_text_config().hidden_size, largest)


def _walk(
    model: nn.Module,
    layers: nn.ModuleList,
    name: str,
    sources: dict[str, Tensor],
    config: PruneConfig,
    folder: str | Path | None,
    progress: bool,
    started: float,
) -> tuple[Walk, Found]:
    runner = Runner(model, layers)
    found = find(runner, sources["calibration"][: config.batch_size], config)
    plan = windows(len(layers), config.window_blocks, config.overlap_blocks)
    saved = parallel.at_main(lambda: Checkpoint.open(folder, model, sources, config)) if folder is not None else None
    last = parallel.at_main(saved.last) if saved else None
    dense_copies: dict[int, nn.Module] = {}
    if saved and last:
        done, walk = last[0], _resume(runner, saved, last[1], sources, config, dense_copies)
    else:
        done, walk = 0, _begin(runner, sources, config, found.notes)
    precision = parallel.at_main(lambda: resolve_precision(config.precision, str(runner.device))) if config.trains else "fp32"
    epochs = _epochs(config, sources) if config.trains else 0
    live = overfit.Live(config.overfit, kept_best=config.early_stopping is not None)
    live.replay(walk.errors, walk.training)
    starts = [window.start for window in plan[1:]] + [len(layers)]
    ahead: dict[str, Tensor] = {}
    shown = Progress if parallel.main() else _Silent
    steps = len(plan) * (epochs + 1)
    with (
        runner.offload.alone() if runner.offload else nullcontext(),
        shown(f"{config.technique} {config.criterion}", steps, show=progress and parallel.main()) as bar,
    ):
        bar.step(done * (epochs + 1))
        for number, window in enumerate(plan[done:], done):
            try:
                _advance(runner, walk, window.start, config, found, ahead)
                _say(live, walk, bar)
                listen = starts[number] > window.start and _repeats(runner, config, precision)
                ahead = _window(runner, walk, window, config, found, dense_copies, precision, number, bar, listen)
                _agreed(runner, window)
                _say(live, walk, bar)
                if saved:
                    state = {**vars(walk), "earlier": walk.earlier + time.perf_counter() - started}
                    parallel.at_main(partial(saved.save, number + 1, layers, window, state))
            except KeyboardInterrupt:
                if saved and parallel.main():
                    print(f"\nStopped before window {number + 1} of {len(plan)}; the same call with checkpoint={str(folder)!r} continues there.")
                raise
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                raise RuntimeError(f"Out of memory in blocks {_label(window)}; {_less_memory(runner, config, window)}.") from error
        _advance(runner, walk, len(layers), config, found, ahead)
        _say(live, walk, bar)
    return walk, found


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _less_memory(runner: Runner, config: PruneConfig, window: range) -> str:
    """What to set, and to what, in the order of what it costs."""
    at_once = min(config.micro_batch or config.batch_size, math.ceil(config.batch_size / parallel.count()))
    if config.trains and at_once > 1:
        return f"set micro_batch={at_once // 2}, which is now {at_once}"
    if config.trains and not config.recompute:
        return "set recompute=True"
    if not runner.offload:
        return "let blocks stay on disk: rk.models.open_model(folder, blocks_folder), or --offload"
    if not config.trains and config.batch_size > 1:
        return f"set batch_size={config.batch_size // 2}, which is now {config.batch_size}"
    return f"train one block at a time with a technique without CR, instead of {len(window)}" if len(window) > 1 else "take fewer or shorter samples"


class _Silent(Progress):
    """The bar of a rank that shows nothing, and leaves nothing to watch."""

    def _write(self) -> None: ...

    def _log(self, text: str, mode: str = "a") -> None: ...


def _agreed(runner: Runner, window: range) -> None:
    """All ranks hold the same bits of a window."""
    if parallel.differing({"weights": (p for i in window for p in runner.blocks[i].parameters())}):
        raise RuntimeError(f"The ranks' weights of blocks {_label(window)} differ; let all of them compute on devices of one kind.")


def _repeats(runner: Runner, config: PruneConfig, precision: str) -> bool:
    """Whether a window's last measurement of the held-out sources does what the streams do when they go on: the same weights, input and precision.

    Each rank measures and advances batches of its own, so that only one by itself knows all of them.
    """
    if parallel.count() > 1:
        return False
    same = precision == "fp32" and runner.dtype == torch.float32 and config.reconstruction_input == "sparse"
    return config.trains and same and config.early_stopping is None


def _say(live: overfit.Live, walk: Walk, bar: Progress) -> None:
    """Warn the moment that held-out errors part from the calibration's, while there is time to stop; leave the errors for who watches."""
    bar.keep("errors", walk.errors)
    for text in live.look(walk.errors, walk.training):
        walk.notes.append(text)
        bar.say(text)


def _begin(runner: Runner, sources: dict[str, Tensor], config: PruneConfig, notes: list[str]) -> Walk:
    embedded = {source: runner.embed(ids, config.batch_size) for source, ids in sources.items()}
    for source, states in embedded.items():
        if not torch.isfinite(states).all():
            raise FloatingPointError(f"There is NaN or infinity in the embeddings of {source}.")
    embedded = store(embedded, STREAMS, runner.device)
    return Walk(position=0, sparse=embedded, dense={0: embedded}, notes=list(notes))


def _resume(
    runner: Runner, saved: Checkpoint, record: dict[str, Any], sources: dict[str, Tensor], config: PruneConfig, dense_copies: dict[int, nn.Module]
) -> Walk:
    """The walk as it was after its last whole window; the model comes in dense and leaves with the finished blocks."""
    position, pruned = record["walk"]["position"], record["walk"]["pruned"]
    for i in range(position, pruned):
        _hold(runner, i)
    if _copies_needed(config):
        dense_copies |= {i: copy.deepcopy(runner.blocks[i]) for i in range(position, pruned)}
    streams = parallel.give_all(saved.streams(record) if parallel.main() else None)
    if streams is None:  # lost or damaged: what flows to the window's start can be had again
        embedded = _begin(runner, sources, config, []).sparse
        dense = [embedded]
        for i in range(pruned):
            dense.append({s: runner.advance([i], x, config.batch_size) for s, x in dense[i].items()})
        masks = saved.blocks(record, runner.blocks, runner.offload)
        sparse = {s: _one_by_one(runner, range(position), x, config) for s, x in embedded.items()}
        streams = {"sparse": sparse, "dense": {i: dense[i] for i in range(position, pruned + 1)}}
    else:
        masks = saved.blocks(record, runner.blocks, runner.offload)
        streams = {
            "sparse": store(streams["sparse"], STREAMS, runner.device),
            "dense": {i: store(x, STREAMS, runner.device) for i, x in streams["dense"].items()},
        }
    return Walk(**{**record["walk"], **streams, "masks": masks})


def _one_by_one(runner: Runner, indices: Iterable[int], states: Tensor, config: PruneConfig) -> Tensor:
    """Stored states through several blocks, stored again after each as the walk does, so that the bits are the same."""
    for i in indices:
        states = runner.advance([i], states, config.batch_size)
    return states


def _copies_needed(config: PruneConfig) -> bool:
    """Whether a block's dense self is needed after it was pruned: a target on the sparse stream, in a later window."""
    return config.trains and config.target_stream == "sparse" and config.overlap_blocks > 0


def _advance(runner: Runner, walk: Walk, position: int, config: PruneConfig, found: Found, ahead: dict[str, Tensor]) -> None:
    """Both streams to `position`; each block passed has had its last training, so its error is measured.

    What `ahead` holds was already computed behind the first of these blocks, and leaves it.
    """
    while walk.position < position:
        i = walk.position
        for source, states in walk.sparse.items():
            known = ahead.pop(source, None)
            walk.sparse = {**walk.sparse, source: runner.advance([i], states, config.batch_size, in_place=True) if known is None else known}
            found_error = error(walk.dense[i + 1][source], walk.sparse[source])
            if not math.isfinite(found_error.mse):
                raise FloatingPointError(f"The error of block {i} on {source} is {found_error.mse}; load the model in float32, or look at the samples.")
            walk.errors.append((i, source, *found_error))
        walk.dense.pop(i, None)
        for view in found.views[i]:
            walk.masks.pop(f"{i}.{view.name}", None)
        walk.seen += sum(int((v.get() == 0).sum()) for v in found.views[i])
        walk.left.append(sum(int((p != 0).sum()) for p in runner.blocks[i].parameters()))
        walk.position = i + 1
        if runner.offload:
            runner.offload.finish(i)


def _hold(runner: Runner, index: int) -> None:
    if runner.offload:
        runner.offload.hold(index)


def _window(
    runner: Runner,
    walk: Walk,
    window: range,
    config: PruneConfig,
    found: Found,
    dense_copies: dict[int, nn.Module],
    precision: str,
    number: int,
    bar: Progress,
    listen: bool,
) -> dict[str, Tensor]:
    """Target, masks of the new blocks, training; the streams stand before `window`.

    Returns the held-out streams behind the window's first block where the training's last measurement leaves them (`listen`).
    """
    for i in [i for i in dense_copies if i < window.start]:
        del dense_copies[i]
    for i in window:
        _hold(runner, i)
    new = [i for i in window if i >= walk.pruned]
    for i in new:  # still dense: the dense stream passes through them now
        last = i == walk.position and "dense" not in (config.statistics_input, config.reconstruction_input)  # use of what enters block i
        before = walk.dense.pop(i) if last else walk.dense[i]
        walk.dense[i + 1] = {s: runner.advance([i], x, config.batch_size, in_place=last and x is not walk.sparse[s]) for s, x in before.items()}
    targets, passed = _targets(runner, walk, window, new, config, dense_copies)
    for i in new:
        if _copies_needed(config):
            dense_copies[i] = copy.deepcopy(runner.blocks[i])
        _prune_block(runner, walk, window, i, config, found, passed)
        walk.pruned = i + 1
    bar.step(block=window.stop - 1)
    return _train(runner, walk, window, targets, config, found, precision, number, bar, listen) if config.trains else {}


def _targets(
    runner: Runner, walk: Walk, window: range, new: list[int], config: PruneConfig, dense_copies: dict[int, nn.Module]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """What the window is trained towards, per source; and the room of the calibration's, where the statistics' pass is the same and fills it."""
    if not config.trains or config.target_stream == "dense":
        return walk.dense[window.stop], None
    same = new == [*window] == [window.start] and config.statistics_input == "sparse" and config.criterion != "magnitude"
    passed = room(walk.sparse["calibration"]) if same else None
    rest = {s: x for s, x in walk.sparse.items() if not same or s != "calibration"}
    targets = {s: runner.advance(window, x, config.batch_size, dense_copies) for s, x in rest.items()}
    return targets if passed is None else {"calibration": passed, **targets}, passed


def _train(
    runner: Runner,
    walk: Walk,
    window: range,
    targets: dict[str, Tensor],
    config: PruneConfig,
    found: Found,
    precision: str,
    number: int,
    bar: Progress,
    listen: bool,
) -> dict[str, Tensor]:
    """Train the window in fp32; returns what `_window` does."""
    inputs = walk.dense[window.start] if config.reconstruction_input == "dense" else walk.sparse
    pairs = {source: (inputs[source], targets[source]) for source in inputs}
    modules = [runner.blocks[i] for i in window]
    masks = _parameter_masks(found, walk, window)
    dtypes = [(t, t.dtype) for m in modules for t in (*m.parameters(), *m.buffers())]
    _prepare(runner, inputs, config)
    for module in modules:
        module.float()
    held_out = {s: p for s, p in pairs.items() if s not in ("calibration", "extra")}
    ear = _Ear(runner, window, {s: x for s, (x, _) in held_out.items()} if listen else {}, config.batch_size)

    measured = [*walk.training]

    def on_epoch(epoch: int, epochs: int, rows: list[tuple[int, str, float]]) -> None:
        ear.open |= epoch == epochs - 1
        measured.extend((_label(window), *row) for row in rows)
        bar.keep("training", measured)
        bar.step(int(epoch > 0), epoch=epoch, loss=rows[0][2])

    trained = reconstruct(
        modules,
        ear.forward,
        masks,
        {s: p for s, p in pairs.items() if s in ("calibration", "extra")},
        held_out,
        config,
        precision=precision,
        where=f"block {_label(window)}",
        stream=number,
        on_epoch=on_epoch,
    )
    for p, dtype in dtypes:
        p.data = p.data.to(dtype)
    walk.training += [(_label(window), *row) for row in trained.losses]
    if trained.skipped:
        walk.notes.append(f"Blocks {_label(window)}: fp16 skipped {trained.skipped} steps whose gradients overflowed.")
    return ear.states if ear.open else {}


class _Ear:
    """Keeps what the last measurement of a window leaves behind the window's first block."""

    def __init__(self, runner: Runner, window: range, sources: Mapping[str, Tensor], batch_size: int) -> None:
        self.runner, self.window, self.open = runner, window, False
        self.states = {s: room(x) for s, x in sources.items()}
        self.places = (place for x in self.states.values() for place in x.split(batch_size))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H) through the window; once `open`, what comes without gradients is the last measurement, source by source."""
        x = self.runner.call(self.window[0], x)
        if self.states and self.open and not torch.is_grad_enabled():
            next(self.places).copy_(x)
        return self.runner.through(self.window[1:], x)


@torch.no_grad()
def _prune_block(runner: Runner, walk: Walk, window: range, index: int, config: PruneConfig, found: Found, passed: Tensor | None) -> None:
    """One forward through the block for its statistics, then all its matrices at once; `passed` takes the forward's states."""
    nm = nm_pattern(config.pattern)
    groups = [[v for v in group if v.name in found.chosen] for group in found.groups[index]]
    groups = [g for g in groups if g]
    statistics = _statistics(runner, walk, window, index, groups, config, passed) if config.criterion != "magnitude" else {}
    for group in groups:
        sparsities = [config.sparsity_of(found.full_name(index, v)) for v in group]
        weights = [v.get() for v in group]
        seen = statistics.get(group[0].name)
        few = seen is not None and group[0].index is not None and seen.count < FEW_TOKENS * weights[0].shape[1]
        if config.criterion == "magnitude" or few:
            masks = [criteria.magnitude_mask(w.float(), s, nm) for w, s in zip(weights, sparsities, strict=True)]
        elif config.criterion == "wanda":
            masks = [criteria.wanda_mask(w.float(), seen, s, nm) for w, s in zip(weights, sparsities, strict=True)]
        else:
            new, masks, notes = criteria.sparsegpt(
                [w.float() for w in weights], seen, sparsities, nm, damping=config.damping, column_block=config.column_block
            )
            walk.notes += [f"Block {index}, {', '.join(v.name for v in group)}: {note}" for note in notes]
            for w, value in zip(weights, new, strict=True):
                w.copy_(parallel.give(value))
        if few:
            walk.notes.append(f"Block {index}, {group[0].name}: {seen.count} tokens for {weights[0].shape[1]} columns, so its mask is by magnitude.")
        for view, w, mask in zip(group, weights, masks, strict=True):
            parallel.give(mask)
            w.mul_(mask.view(torch.uint8)).add_(0)  # the sum makes plain zeros of minus zeros
            walk.masks[f"{index}.{view.name}"] = mask
            walk.zeros += mask.numel() - int(mask.count_nonzero())


def _statistics(
    runner: Runner, walk: Walk, window: range, index: int, groups: list[list[WeightView]], config: PruneConfig, passed: Tensor | None = None
) -> dict[str, criteria.Statistics]:
    """Statistics of each distinct input of a block, by the name of its group's first view.

    The calibration stream stands before the window; it passes through the window's earlier blocks as they now are.
    """
    first = {group[0].name: group for group in groups}
    device, hessian = runner.device, config.criterion == "sparsegpt"
    statistics = {name: criteria.Statistics(group[0].get().shape[1], hessian=hessian, device=device) for name, group in first.items()}

    def seen(view: WeightView, x: Tensor, _: bool) -> None:
        if view.name in statistics:
            statistics[view.name].add(x.reshape(-1, x.shape[-1]))

    dense = config.statistics_input == "dense"
    states = walk.dense[index]["calibration"] if dense else walk.sparse["calibration"]
    before = range(0) if dense else range(window.start, index)
    with InputTap([group[0] for group in groups], seen):
        runner.spread(lambda batch: runner.call(index, runner.through(before, batch)), states, config.batch_size, passed)
    _add_up(list(statistics.values()))
    for name, found in statistics.items():
        if not torch.isfinite(found.square_sum).all():
            raise FloatingPointError(f"The input of block {index}, {name} holds NaN or infinity on the calibration samples.")
    return statistics


def _add_up(statistics: list[criteria.Statistics]) -> None:
    """Statistics of each rank's samples become those of all samples."""
    if not statistics:
        return
    counts = parallel.add(torch.tensor([s.count for s in statistics])).tolist()
    for s, seen in zip(statistics, counts, strict=True):
        parallel.add(s.square_sum if s.hessian is None else s.hessian)
        s.count = seen


@dataclass
class Found:
    """The prunable matrices of every block, and which of them read the same input."""

    prefix: str
    views: list[list[WeightView]]
    groups: list[list[list[WeightView]]]
    chosen: set[str]
    notes: list[str]

    def full_name(self, index: int, view: WeightView) -> str:
        return f"{self.prefix}.{index}.{view.name}"


def find(runner: Runner, ids: Tensor, config: PruneConfig) -> Found:
    """Watch one forward of the model: which matrices are used, how they are laid out and which share an input.

    Raises:
        ConfigError: a matrix whose product is not seen, so that no statistics could be had for it; a sparsity pattern
            that does not divide a matrix; a pattern of `layers` or `layer_sparsity` that matches no matrix.
    """
    name, per_block, dense = blocks(runner.model)[0], [], set()
    for block in runner.blocks:
        views, left = weight_views(block)
        per_block.append(views)
        dense |= set(left)
    _check_patterns(name, per_block, config)
    owner = {id(v): i for i, views in enumerate(per_block) for v in views}
    readers: list[list[list[WeightView]]] = [[] for _ in per_block]
    alive: list[tuple[Tensor, list[WeightView]]] = []  # inputs of the running block and their readers; all blocks' would take gigabytes
    running = -1
    straight: dict[int, bool] = {}

    def seen(view: WeightView, x: Tensor, as_stored: bool) -> None:
        nonlocal running
        straight[id(view.parameter)] = as_stored
        block = owner[id(view)]
        if block != running:
            alive.clear()
            running = block
        group = next((g for known, g in alive if known is x), None)
        if group is None:
            group = []
            alive.append((x, group))
            readers[block].append(group)
        if view not in group:
            group.append(view)

    tap = InputTap((), seen)
    handles = [b.register_forward_pre_hook(lambda _, __, views=views: tap.watch(views)) for b, views in zip(runner.blocks, per_block, strict=True)]
    try:
        runner.record(ids, tap)
    finally:
        for handle in handles:
            handle.remove()
    views = [[v if straight.get(id(v.parameter), not v.transposed) != v.transposed else v.turned() for v in row] for row in per_block]
    groups = []
    for i, row in enumerate(views):
        by_name = {v.name: v for v in row}
        known = [[by_name[v.name] for v in group] for group in readers[i]]
        used = {v.name for group in known for v in group}
        for v in row:
            if v.name not in used and v.index is None:
                raise ConfigError(f"{name}.{i}.{v.name} is not used as a plain matrix product, so it has no statistics; exclude it through `layers`.")
        groups.append(known + [[v] for v in row if v.name not in used])
    chosen = {v.name for row in views for v in row if _wanted(v, config)}
    if not chosen:
        raise ConfigError(f"layers is {config.layers!r}, which matches none of: {', '.join(sorted({v.name for row in views for v in row})[:12])}.")
    nm = nm_pattern(config.pattern)
    for i, row in enumerate(views):
        for v in row:
            if nm and v.name in chosen and v.get().shape[1] % nm[1]:
                raise ConfigError(
                    f"pattern is {config.pattern!r}, but {name}.{i}.{v.name} has {v.get().shape[1]} inputs, which {nm[1]} does not divide."
                )
    notes = [f"Left dense inside the blocks: {', '.join(sorted(dense))}."] if dense else []
    return Found(name, views, groups, chosen, notes)


def _check_patterns(prefix: str, per_block: list[list[WeightView]], config: PruneConfig) -> None:
    """A pattern that matches nothing is a slip of the pen, and not a wish for nothing."""
    inside = {v.name: None for row in per_block for v in row}
    full = {f"{prefix}.{i}.{v.name}": None for i, row in enumerate(per_block) for v in row}
    patterns = config.layers if isinstance(config.layers, tuple) else ()
    for field_name, names, possible in (("layers", patterns, inside), ("layer_sparsity", config.layer_sparsity, full)):
        for pattern in names:
            if not any(fnmatch.fnmatchcase(n, pattern) for n in possible):
                raise ConfigError(f"{field_name} has the pattern {pattern!r}, which matches none of: {', '.join(list(possible)[:12])}.")


def _wanted(view: WeightView, config: PruneConfig) -> bool:
    if isinstance(config.layers, tuple):
        return any(fnmatch.fnmatchcase(view.name, pattern) for pattern in config.layers)
    return config.layers == "all" or view.attention == (config.layers == "attention")


def _parameter_masks(found: Found, walk: Walk, window: range) -> dict[nn.Parameter, Tensor]:
    """Masks in the layout of the parameters that hold the views."""
    masks: dict[nn.Parameter, Tensor] = {}
    for i in window:
        for view in found.views[i]:
            mask = walk.masks.get(f"{i}.{view.name}")
            if mask is None:
                continue
            mask = mask.t() if view.transposed else mask
            if view.index is None:
                masks[view.parameter] = mask
            else:
                masks.setdefault(view.parameter, torch.ones_like(view.parameter, dtype=torch.bool))[view.index] = mask
    return masks


def _verify(layers: nn.ModuleList, walk: Walk) -> None:
    """Every block was pruned, and its matrices hold at least the zeros that the masks put there."""
    if walk.pruned != len(layers) or walk.seen < walk.zeros:
        were = f"{walk.pruned} of {len(layers)} blocks were pruned and {walk.seen} of {walk.zeros} masked weights are zero"
        raise RuntimeError(f"{were}; this is a bug.")
    if {b for b, *_ in walk.errors} != set(range(len(layers))):
        raise RuntimeError("Not every block's error was measured; this is a bug.")


def _check(model: nn.Module, samples: Tensor, config: PruneConfig, extra: Tensor | None, held_out: Mapping[str, Tensor] | None) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    for name, ids in {"samples": samples, "extra": extra, **{f"held_out[{k}]": v for k, v in (held_out or {}).items()}}.items():
        if ids is None:
            continue
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
            raise ConfigError(f"{name} must be a tensor of token ids (samples, tokens), not {getattr(ids, 'shape', type(ids).__name__)}.")
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise ConfigError(f"{name} holds token {int(ids.max())}, beyond the model's vocabulary of {vocabulary}: another model's tokenizer?")
        check_length(model, ids.shape[1], name)
    trained = {tuple(row) for ids in (samples, extra) if held_out and ids is not None for row in ids.tolist()}
    for name, ids in (held_out or {}).items():
        if name in ("calibration", "extra"):
            raise ConfigError(f"A held-out set cannot be called {name!r}, the name of a training source.")
        if again := sum(tuple(row) in trained for row in ids.tolist()):
            several = f"{again} of the {len(ids)} samples of held_out[{name}]"
            raise ConfigError(f"{several} are trained on, too; a file has no splits, so hold out another one.")
    if extra is not None and extra.shape[1] != samples.shape[1]:
        raise ConfigError(f"extra has {extra.shape[1]} tokens a sample and samples {samples.shape[1]}; they are trained together and must agree.")
    if config.early_stopping is not None and not held_out:
        raise ConfigError("early_stopping needs held_out samples to watch.")
    if any(p.is_meta for p in model.parameters()):
        raise ConfigError("The model has weights that are not loaded (on the meta device).")


def _check_ranks(model: nn.Module, sources: Mapping[str, Tensor], config: PruneConfig) -> None:
    """What several processes must have in common before they begin."""
    if parallel.count() == 1:
        if parallel.launched() > 1:
            raise ConfigError(
                f"torchrun started {parallel.launched()} processes, and this one is in no group; "
                "load and prune inside `with reconkit.parallel.group():` to share the work."
            )
        return
    if offload.of(model):
        raise ConfigError("Blocks on disk are for one process; load the model whole, or run without torchrun.")
    device = next(model.parameters()).device
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and device.index != torch.cuda.current_device()):
        raise ConfigError(f"The model is on {device}, from where rank {parallel.rank()} does not talk; load it after torch.cuda.set_device.")
    asked = torch.tensor([*repr((config, list(sources))).encode()], dtype=torch.uint8)
    differs = parallel.differing({"configuration": [asked], "samples": sources.values(), "model": model.parameters()})
    if differs:
        raise ConfigError(f"Not every rank was given the same {' and '.join(differs)}; seed them alike.")


def _epochs(config: PruneConfig, sources: Mapping[str, Tensor]) -> int:
    per_epoch = math.ceil(sum(len(sources[s]) for s in ("calibration", "extra") if s in sources) / config.batch_size)
    return config.epochs if config.steps is None else math.ceil(config.steps / per_epoch)


def _prepare(runner: Runner, inputs: Mapping[str, Tensor], config: PruneConfig) -> None:
    """Record how the model calls its blocks for every size that training and measuring will use, while the window is in the model's dtype."""
    trained = [states for source, states in inputs.items() if source in ("calibration", "extra")]
    for states in inputs.values():
        runner.prepare(_parts(len(states), config.batch_size), states.shape[1])
    for step in _parts(sum(map(len, trained)), config.batch_size):
        share = parallel.share(step)
        runner.prepare(_parts(share.stop - share.start, config.micro_batch or config.batch_size), trained[0].shape[1])


def _parts(count: int, size: int) -> set[int]:
    """The sizes that come of cutting `count` into pieces of `size`."""
    return {min(count, size), count % size} - {0}


def _label(window: range) -> str:
    return "+".join(str(i) for i in window)


class _eager_experts:
    """Experts run one by one for the walk, so that each expert's product can be seen."""

    def __init__(self, model: nn.Module) -> None:
        configs = {id(m.config): m.config for m in model.modules() if getattr(m, "config", None) is not None}
        self.configs = [c for c in configs.values() if getattr(c, "_experts_implementation", None) not in (None, "eager")]

    def __enter__(self) -> None:
        self.before = [c._experts_implementation for c in self.configs]
        for c in self.configs:
            c._experts_implementation = "eager"

    def __exit__(self, *_: object) -> None:
        for c, value in zip(self.configs, self.before, strict=True):
            c._experts_implementation = value

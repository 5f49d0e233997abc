"""Pruning a model block by block, as section 2 of the paper reads.

For each window of blocks: move both hidden states before it, compute the target with the dense blocks, prune the blocks that are new, train the
window towards the target. A block's error is measured when the hidden states move through it, after its last training.

    dense   x̄ᵢ₊₁ = gᵢ(w̄ᵢ ; x̄ᵢ)            sparse   xᵢ₊₁ = gᵢ(mᵢ⊙wᵢ ; xᵢ)
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from . import cost, criteria, overfit
from .callbacks import Callback
from .checkpoint import STREAMS, CheckpointCallback
from .config import PruneConfig, nm_pattern
from .models import WeightView, blocks
from .offload import OffloadCallback
from .progress import ProgressCallback
from .prunable import check_inputs, eager_experts, find, parameter_masks
from .reconstruct import Trainer, resolve_precision
from .streams import Errors, InputTap, Runner, error, finite_advice, store

FEW_TOKENS = 2  # an expert needs this many tokens per input column, else its mask is by magnitude
TRAINED = ("calibration", "extra")


@dataclass
class PruneResult:
    """Result of a pruning, measured while it ran."""

    errors: pd.DataFrame
    "block (int from 0), source (calibration | extra | a held-out name), mse, nmse, token_nmse, token_nmse_90; see `streams.Errors`"
    training: pd.DataFrame
    'window ("3" or "3+4"), epoch (0 = before training), source, loss'
    sparsity: float
    "Share of zeros that the masks put into the prunable matrices of all blocks."
    zeros: float
    "Share of zeros in the same matrices at the end; those of an earlier pruning and of a 4-bit format are among them."
    precision: str
    "Precision of the reconstruction: fp32, bf16 or fp16."
    seconds: float
    "Wall time of the whole pruning, including earlier calls where it continues from a checkpoint."
    peak_memory: dict[str, int]
    '"gpu": peak bytes on the GPU, "rss": peak bytes of RAM above what was in use before.'
    notes: list[str]
    "Remarks: layers left dense, earlier zeros, raised damping, experts with few tokens, skipped steps, signs of overfitting."
    config: PruneConfig
    "The configuration."
    per_parameter: float | None
    "Training scalars (samples × tokens × hidden) for each weight left in the largest window; None where nothing is trained."


@dataclass
class State:
    """The state between two windows; everything that a checkpoint holds."""

    position: int
    "Block before which the sparse hidden states stand."
    sparse: dict[str, Tensor]
    "Per source (N, T, H)."
    dense: dict[int, dict[str, Tensor]]
    "Dense hidden states by position, from `position` to the furthest block that a target needed."
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
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> PruneResult:
    """Prune and reconstruct `model` in place; it keeps its modules, dtype, device, flags and state_dict keys.

    Args:
        model: any decoder that transformers builds.
        samples: calibration tokens (N, T): they choose the masks and train.
        config: how; see `PruneConfig`.
        extra: tokens (N', T) that only train, such as self-generated text.
        held_out: name → tokens (N'', T) that do neither; the error is measured on them, block by block.
        checkpoint: a folder in which the state is kept after every window; a killed run continues from it.
        callbacks: what else listens.
        progress: show one bar with an estimate.

    Raises:
        ConfigError: something that cannot be done, by name and reason, before the first block.
        FloatingPointError: NaN or infinity in an activation or a loss, with block, layer or epoch.
    """
    check_inputs(model, samples, config, extra, held_out)
    sources = {"calibration": samples, **({} if extra is None else {"extra": extra}), **(held_out or {})}
    switches = [(m, m.training) for m in model.modules()]
    started = time.perf_counter()
    with cost.measure() as used, eager_experts(model), torch.random.fork_rng(devices=[]):
        model.eval()
        try:
            pruning = Pruning(model, sources, config)
            state: list[Callback] = [OffloadCallback(pruning.runner.offload)] if pruning.runner.offload else []
            state += [CheckpointCallback(checkpoint)] if checkpoint is not None else []
            pruning.run([*state, ProgressCallback(show=progress), overfit.OverfitCallback(), *callbacks])
        finally:
            for module, training in switches:
                module.training = training
    return pruning.result(time.perf_counter() - started, {"gpu": used.gpu_bytes, "rss": used.rss_bytes})


class Pruning:
    """One pruning: the model, its settings, and the state between two windows.

    Args:
        sources: "calibration", "extra" and the held-out names → tokens (N, T).

    Raises:
        ConfigError: the model, or what is asked of it, cannot be pruned block by block.
    """

    def __init__(self, model: nn.Module, sources: Mapping[str, Tensor], config: PruneConfig) -> None:
        self.started = time.perf_counter()
        self.model, self.sources, self.config = model, dict(sources), config
        self.runner = Runner(model, blocks(model)[1])
        self.found = find(self.runner, sources["calibration"][: config.batch_size], config)
        self.runner.check(_probes(sources))
        self.windows = windows(len(self.runner.blocks), config.window_blocks, config.overlap_blocks)
        self.precision = resolve_precision(config.precision, str(self.runner.device)) if config.trains else "fp32"
        self.done = 0
        "Windows that are finished."
        self.dense_blocks: dict[int, nn.Module] = {}
        "Copies of blocks as they were, for targets of later windows."
        self.callbacks: list[Callback] = []
        self.state: State

    @property
    def epochs(self) -> int:
        """Epochs of a window, at most."""
        trained = sum(len(ids) for source, ids in self.sources.items() if source in TRAINED)
        steps = math.ceil(trained / self.config.batch_size)
        epochs = self.config.epochs if self.config.steps is None else math.ceil(self.config.steps / steps)
        return epochs if self.config.trains else 0

    def run(self, callbacks: Sequence[Callback] = ()) -> None:
        """Prune all windows that are not done."""
        self.callbacks, failure = [*callbacks], None
        self.state = self.begin()
        try:
            self._tell("on_begin")
            while self.done < len(self.windows):
                window = self.windows[self.done]
                with _out_of_memory(self, window):
                    self._advance(window.start)
                    self._window(window)
                self.done += 1
                self._tell("on_window_end", window)
            self._advance(len(self.runner.blocks))
            _verify(self)
        except BaseException as raised:
            failure = raised
            raise
        finally:
            for callback in reversed(self.callbacks):
                callback.on_end(self, failure)

    def warn(self, text: str) -> None:
        """Keep a sentence among the notes, and tell all callbacks."""
        self.state.notes.append(text)
        self._tell("on_warning", text)

    def _tell(self, event: str, *facts: object) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *facts)

    def begin(self) -> State:
        """The state before the first block: both hidden states are the embeddings."""
        embedded = {source: self.runner.embed(ids, self.config.batch_size) for source, ids in self.sources.items()}
        for source, states in embedded.items():
            if not torch.isfinite(states).all():
                raise FloatingPointError(f"There is NaN or infinity in the embeddings of {source}.")
        embedded = store(embedded, STREAMS, self.runner.device)
        return State(position=0, sparse=embedded, dense={0: embedded}, notes=list(self.found.notes))

    def _window(self, window: range) -> None:
        """Target, masks of the new blocks, training; the hidden states stand before `window`."""
        self.dense_blocks = {i: block for i, block in self.dense_blocks.items() if i >= window.start}
        self._tell("on_window_begin", window)
        new = [i for i in window if i >= self.state.pruned]
        self._advance_dense(new)
        targets = self._targets(window)
        for i in new:
            if self.keeps_dense_blocks:
                self.dense_blocks[i] = copy.deepcopy(self.runner.blocks[i])
            self._prune_block(window, i)
            self.state.pruned = i + 1
        self._tell("on_mask_end", window)
        if self.config.trains:
            self._train(window, targets)

    def _advance_dense(self, new: list[int]) -> None:
        """The dense hidden states through blocks that are still dense."""
        state, asked = self.state, (self.config.statistics_input, self.config.reconstruction_input)
        for i in new:
            last = i == state.position and "dense" not in asked  # use of what enters block i
            before = state.dense.pop(i) if last else state.dense[i]
            state.dense[i + 1] = {
                s: self.runner.advance([i], x, self.config.batch_size, in_place=last and x is not state.sparse[s]) for s, x in before.items()
            }

    def _targets(self, window: range) -> dict[str, Tensor]:
        """What `window` is trained towards, per source: the dense hidden states (GP), or the dense window on the sparse ones."""
        if not self.config.trains or self.config.target_stream == "dense":
            return self.state.dense[window.stop]
        return {
            source: self.runner.advance(window, states, self.config.batch_size, self.dense_blocks) for source, states in self.state.sparse.items()
        }

    @property
    def keeps_dense_blocks(self) -> bool:
        """Whether a block's dense self is needed after it was pruned: a target on the sparse hidden states, in a later window."""
        return self.config.trains and self.config.target_stream == "sparse" and self.config.overlap_blocks > 0

    def _train(self, window: range, targets: dict[str, Tensor]) -> None:
        """Train `window` in fp32."""
        state, runner = self.state, self.runner
        inputs = state.dense[window.start] if self.config.reconstruction_input == "dense" else state.sparse
        pairs = {source: (inputs[source], targets[source]) for source in inputs}
        modules = [runner.blocks[i] for i in window]
        masks = {p: mask for i in window for p, mask in parameter_masks(runner.blocks[i], self.found.views[i], self._masks(i)).items()}
        dtypes = [(t, t.dtype) for m in modules for t in (*m.parameters(), *m.buffers())]
        self._prepare(inputs)
        for module in modules:
            module.float()

        def on_epoch(epoch: int, rows: list[tuple[int, str, float]]) -> None:
            state.training += [(label(window), *row) for row in rows]
            self._tell("on_epoch_end", window, epoch)

        trainer = Trainer(
            modules, lambda x: runner.through(window, x), masks, self.config,
            precision=self.precision, where=f"block {label(window)}", stream=self.done,
        )  # fmt: skip
        trained = trainer.fit({s: p for s, p in pairs.items() if s in TRAINED}, {s: p for s, p in pairs.items() if s not in TRAINED}, on_epoch)
        for p, dtype in dtypes:
            p.data = p.data.to(dtype)
        if trained.skipped:
            state.notes.append(f"Blocks {label(window)}: fp16 skipped {trained.skipped} steps whose gradients overflowed.")

    def _masks(self, index: int) -> dict[str, Tensor]:
        """Masks of a block by name in it."""
        return {name.partition(".")[2]: mask for name, mask in self.state.masks.items() if name.startswith(f"{index}.")}

    def _prepare(self, inputs: Mapping[str, Tensor]) -> None:
        """Record how the model calls its blocks for every size that training and measuring will use, while the window is in the model's dtype."""
        config, trained = self.config, [states for source, states in inputs.items() if source in TRAINED]
        for states in inputs.values():
            self.runner.prepare(_parts(len(states), config.batch_size), states.shape[1])
        for step in _parts(sum(map(len, trained)), config.batch_size):
            self.runner.prepare(_parts(step, config.micro_batch or config.batch_size), trained[0].shape[1])

    @torch.no_grad()
    def _prune_block(self, window: range, index: int) -> None:
        """One forward through the block for its statistics, then all its matrices at once."""
        groups = [[v for v in group if v.name in self.found.chosen] for group in self.found.groups[index]]
        groups = [group for group in groups if group]
        statistics = self._statistics(window, index, groups) if self.config.criterion != "magnitude" else {}
        for group in groups:
            masks = self._choose(index, group, statistics.get(group[0].name))
            for view, mask in zip(group, masks, strict=True):
                view.get().mul_(mask.view(torch.uint8)).add_(0)  # the sum makes plain zeros of minus zeros
                self.state.masks[f"{index}.{view.name}"] = mask
                self.state.zeros += mask.numel() - int(mask.count_nonzero())
        self._keep_zeros(index)

    def _choose(self, index: int, group: list[WeightView], seen: criteria.Statistics | None) -> list[Tensor]:
        """Masks (out, in) of matrices that read the same input; SparseGPT changes the weights that are left as well."""
        config, nm, notes = self.config, nm_pattern(self.config.pattern), self.state.notes
        sparsities = [config.sparsity_of(self.found.full_name(index, v)) for v in group]
        weights, zeros = [v.get().float() for v in group], [self.found.zeros(index, v) for v in group]
        few = seen is not None and group[0].expert and seen.count < FEW_TOKENS * weights[0].shape[1]
        if few:
            notes.append(f"Block {index}, {group[0].name}: {seen.count} tokens for {weights[0].shape[1]} columns, so its mask is by magnitude.")
        if config.criterion == "magnitude" or few:
            return [criteria.magnitude_mask(w, s, nm, z) for w, s, z in zip(weights, sparsities, zeros, strict=True)]
        if config.criterion == "wanda":
            return [criteria.wanda_mask(w, seen, s, nm, z) for w, s, z in zip(weights, sparsities, zeros, strict=True)]
        new, masks, raised = criteria.sparsegpt(weights, seen, sparsities, nm, damping=config.damping, column_block=config.column_block, zeros=zeros)
        notes += [f"Block {index}, {', '.join(v.name for v in group)}: {note}" for note in raised]
        for view, value in zip(group, new, strict=True):
            view.get().copy_(value)
        return masks

    def _keep_zeros(self, index: int) -> None:
        """Masks for the zeros of an earlier pruning in matrices that this call does not prune."""
        views = {f"{index}.{v.name}": v for v in self.found.views[index]}
        for name in self.found.kept - self.state.masks.keys():
            if not name.startswith(f"{index}."):
                continue
            view = views.get(name)
            self.state.masks[name] = (self.runner.blocks[index].get_parameter(name.partition(".")[2]) if view is None else view.get()) != 0
            if view is not None:
                self.state.zeros += int((~self.state.masks[name]).sum())

    def _statistics(self, window: range, index: int, groups: list[list[WeightView]]) -> dict[str, criteria.Statistics]:
        """Statistics of each distinct input of a block, by the name of its group's first view.

        The calibration's hidden states stand before the window; they pass through the window's earlier blocks as they now are.
        """
        runner, hessian = self.runner, self.config.criterion == "sparsegpt"
        statistics = {g[0].name: criteria.Statistics(g[0].get().shape[1], hessian=hessian, device=runner.device) for g in groups}

        def seen(view: WeightView, x: Tensor, _: bool) -> None:
            if view.name in statistics:
                statistics[view.name].add(x.reshape(-1, x.shape[-1]))

        dense = self.config.statistics_input == "dense"
        states = self.state.dense[index]["calibration"] if dense else self.state.sparse["calibration"]
        before = range(0) if dense else range(window.start, index)
        with InputTap([group[0] for group in groups], seen):
            runner.map_batches(lambda batch: runner.call(index, runner.through(before, batch)), states, self.config.batch_size)
        for name, found in statistics.items():
            if not torch.isfinite(found.square_sum).all():
                raise FloatingPointError(f"The input of block {index}, {name} holds NaN or infinity on the calibration samples.")
        return statistics

    def _advance(self, position: int) -> None:
        """Move both hidden states to `position`; each block passed has had its last training, so its error is measured."""
        state, runner = self.state, self.runner
        while state.position < position:
            i = state.position
            for source, states in state.sparse.items():
                state.sparse = {**state.sparse, source: runner.advance([i], states, self.config.batch_size, in_place=True)}
                measured = error(state.dense[i + 1][source], state.sparse[source])
                if not math.isfinite(measured.mse):
                    raise FloatingPointError(f"The error of block {i} on {source} is {measured.mse}; {finite_advice(runner.dtype)}.")
                state.errors.append((i, source, *measured))
            state.dense.pop(i, None)
            state.masks = {name: mask for name, mask in state.masks.items() if not name.startswith(f"{i}.")}
            self._check_pattern(i)
            state.seen += sum(int((v.get() == 0).sum()) for v in self.found.views[i])
            state.left.append(sum(int((p != 0).sum()) for p in runner.blocks[i].parameters()))
            state.position = i + 1
            self._tell("on_block_end", i)

    def _check_pattern(self, index: int) -> None:
        """Each group of M inputs of a finished block's pruned matrices has at most N weights left."""
        nm = nm_pattern(self.config.pattern)
        for view in self.found.views[index]:
            if nm and view.name in self.found.chosen and int((view.get() != 0).unflatten(1, (-1, nm[1])).sum(-1).max()) > nm[0]:
                raise RuntimeError(f"{self.found.full_name(index, view)} is not {nm[0]}:{nm[1]} along its inputs; this is a bug.")

    def result(self, seconds: float, peak_memory: dict[str, int]) -> PruneResult:
        """What was done, as `prune` returns it."""
        state, entries = self.state, sum(math.prod(v.get().shape) for views in self.found.views for v in views)
        return PruneResult(
            errors=pd.DataFrame(state.errors, columns=["block", "source", *Errors._fields]),
            training=pd.DataFrame(state.training, columns=["window", "epoch", "source", "loss"]),
            sparsity=state.zeros / entries,
            zeros=state.seen / entries,
            precision=self.precision,
            seconds=state.earlier + seconds,
            peak_memory=peak_memory,
            notes=state.notes,
            config=self.config,
            per_parameter=self._per_parameter(),
        )

    def _per_parameter(self) -> float | None:
        """Training scalars for each weight that is left in the largest window."""
        if not self.config.trains:
            return None
        largest = max(sum(self.state.left[i] for i in window) for window in self.windows)
        samples = sum(len(ids) for source, ids in self.sources.items() if source in TRAINED)
        hidden = self.model.config.get_text_config().hidden_size
        return overfit.per_parameter(samples, self.sources["calibration"].shape[1], hidden, largest)


def _probes(sources: Mapping[str, Tensor]) -> list[Tensor]:
    """Batches (at most 2, T) on which the recorded blocks are compared with the model: two of the calibration, one of each other source."""
    samples = sources["calibration"]
    others = [ids[:2] for source, ids in sources.items() if source != "calibration"]
    return [samples[:2], samples[-2:].flip(1), *others]  # turned round, so that it differs from the first whatever there is


@contextmanager
def _out_of_memory(pruning: Pruning, window: range) -> Iterator[None]:
    """One sentence with what to set, where memory does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise RuntimeError(f"Out of memory in blocks {label(window)}; {_less_memory(pruning.runner, pruning.config, window)}.") from error


def _less_memory(runner: Runner, config: PruneConfig, window: range) -> str:
    """Advice against too little memory: what to set to which value, the least costly first."""
    at_once = config.micro_batch or config.batch_size
    if config.trains and at_once > 1:
        return f"set micro_batch={at_once // 2}, which is now {at_once}"
    if config.trains and not config.recompute:
        return "set recompute=True"
    if not runner.offload:
        return "let blocks stay on disk: rk.models.open_model(folder, blocks_folder), or --offload"
    if not config.trains and config.batch_size > 1:
        return f"set batch_size={config.batch_size // 2}, which is now {config.batch_size}"
    return f"train one block at a time with a technique without CR, instead of {len(window)}" if len(window) > 1 else "take fewer or shorter samples"


def _verify(pruning: Pruning) -> None:
    """Every block was pruned, and its matrices hold at least the zeros that the masks put there."""
    state, count = pruning.state, len(pruning.runner.blocks)
    if state.pruned != count or state.seen < state.zeros:
        were = f"{state.pruned} of {count} blocks were pruned and {state.seen} of {state.zeros} masked weights are zero"
        raise RuntimeError(f"{were}; this is a bug.")
    if {b for b, *_ in state.errors} != set(range(count)):
        raise RuntimeError("Not every block's error was measured; this is a bug.")


def _parts(count: int, size: int) -> set[int]:
    """The sizes that come of cutting `count` into pieces of `size`."""
    return {min(count, size), count % size} - {0}


def label(window: range) -> str:
    return "+".join(str(i) for i in window)

"""The matrices of a model that can be pruned: where they lie, which of them read the same input, and what may be asked of them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import criteria
from .config import ConfigError, PruneConfig, check_one_process, nm_pattern
from .models import WeightView, blocks, check_adapters, check_decoder, check_float_weights, check_length, check_shared, weight_views
from .streams import InputTap, Runner


@dataclass
class Found:
    """The prunable matrices of every block, and which of them read the same input."""

    prefix: str
    views: list[list[WeightView]]
    groups: list[list[list[WeightView]]]
    chosen: set[str]
    notes: list[str]
    kept: set[str]
    "Names (with block) of the matrices whose zeros stay zero."

    def full_name(self, index: int, view: WeightView) -> str:
        return f"{self.prefix}.{index}.{view.name}"

    def zeros(self, index: int, view: WeightView) -> Tensor | None:
        """The entries (out, in) that stay zero, None where all may change."""
        return view.get() == 0 if f"{index}.{view.name}" in self.kept else None


class _Seen:
    """What one forward of the model shows: which matrices are used, how they lie in memory, and which of them read the same input."""

    def __init__(self, per_block: list[list[WeightView]]) -> None:
        self.per_block = per_block
        self.groups: list[list[list[WeightView]]] = [[] for _ in per_block]
        self.straight: dict[int, bool] = {}
        "id(parameter) → stored as (out, in)."
        self._owner = {id(v): i for i, views in enumerate(per_block) for v in views}
        self._alive: list[tuple[Tensor, list[WeightView]]] = []  # inputs of the running block and their readers; all blocks' would take gigabytes
        self._running = -1
        self._used: set[int] = set()
        self._alone: set[int] = set()

    def product(self, view: WeightView, x: Tensor, as_stored: bool) -> None:
        self.straight[id(view.parameter)] = as_stored
        block = self._owner[id(view)]
        if block != self._running:
            self._alive.clear()
            self._running = block
        group = next((g for known, g in self._alive if known is x), None)
        if group is not None and view in group:
            return
        if id(view) in self._used:  # it reads several inputs: its statistics are the sums over all of them, and nobody else's
            self._alone.add(id(view))
            return
        self._used.add(id(view))
        if group is None:
            group = []
            self._alive.append((x, group))
            self.groups[block].append(group)
        group.append(view)

    def used(self, view: WeightView) -> bool:
        return id(view) in self._used

    def known(self, view: WeightView) -> bool:
        """Whether it is known how the matrix lies in memory: a linear layer's by its type, an expert's by a product."""
        return view.index is None or id(view.parameter) in self.straight

    def turned(self, view: WeightView) -> WeightView:
        """The view as (out, in), as the products show it."""
        return view if self.straight.get(id(view.parameter), not view.transposed) != view.transposed else view.turned()

    def readers(self, index: int) -> list[list[WeightView]]:
        """The matrices of a block, those that read one tensor together."""
        together = [[v for v in group if id(v) not in self._alone] for group in self.groups[index]]
        alone = [[v] for v in self.per_block[index] if not self.used(v) or id(v) in self._alone]
        return [[self.turned(v) for v in group] for group in [*together, *alone] if group]

    def learn_experts(self) -> None:
        """Give experts that got no token the layout of those with the same name in other blocks."""
        by_name = {_expert_name(v): self.straight[id(v.parameter)] for row in self.per_block for v in row if v.index is not None and self.known(v)}
        for row in self.per_block:
            for v in row:
                if not self.known(v) and _expert_name(v) in by_name:
                    self.straight[id(v.parameter)] = by_name[_expert_name(v)]


def _expert_name(view: WeightView) -> str:
    return view.name.rpartition(".")[0]


def find(runner: Runner, ids: Tensor, config: PruneConfig) -> Found:
    """Watch one forward of the model: which matrices are used, how they are laid out and which share an input.

    Raises:
        ConfigError: a chosen matrix that cannot be pruned so: its product is not seen, so that no statistics could be had for it, or
            its layout is not known; a sparsity pattern that does not divide a matrix; a pattern of `layers` or `layer_sparsity` that
            matches no matrix; parameters that two blocks share.
        FloatingPointError: a weight is NaN or infinite.
    """
    name, per_block, dense = blocks(runner.model)[0], [], set()
    check_shared(runner.model, name, runner.blocks)
    for block in runner.blocks:
        views, left = weight_views(block)
        per_block.append(views)
        dense |= set(left)
    _check_patterns(name, per_block, config)
    seen, kept = _Seen(per_block), {}
    tap = InputTap((), seen.product)

    def entered(index: int, block: nn.Module) -> None:
        _check_finite(index, block)
        kept.update(_zeros_kept(index, block, per_block[index], config))
        tap.watch(per_block[index])

    handles = [b.register_forward_pre_hook(lambda m, _, i=i: entered(i, m)) for i, b in enumerate(runner.blocks)]
    try:
        runner.record(ids, tap)
    finally:
        for handle in handles:
            handle.remove()
    seen.learn_experts()
    views = [[seen.turned(v) for v in row] for row in per_block]
    chosen = {v.name for row in views for v in row if _wanted(v, config)}
    if not chosen:
        raise ConfigError(f"layers is {config.layers!r}, which matches none of: {', '.join(sorted({v.name for row in views for v in row})[:12])}.")
    _check_chosen(name, seen, chosen, config)
    _check_divides(name, views, chosen, nm_pattern(config.pattern))
    notes = [f"Left dense inside the blocks: {', '.join(sorted(dense))}."] if dense else []
    if kept:
        zeros, entries = (sum(values) for values in zip(*kept.values(), strict=True))
        notes.append(
            f"Zeros of an earlier pruning stay zero in {len(kept)} matrices ({zeros / entries:.1%} of their entries), such as "
            f"{next(iter(kept))}; keep_zeros=False lets them change."
        )
    return Found(name, views, [seen.readers(i) for i in range(len(views))], chosen, notes, set(kept))


def _check_finite(index: int, block: nn.Module) -> None:
    for name, p in block.named_parameters():
        if not bool(torch.isfinite(p).all()):
            raise FloatingPointError(f"The weight {name} of block {index} holds NaN or infinity before anything is pruned; load another copy.")


def _zeros_kept(index: int, block: nn.Module, views: list[WeightView], config: PruneConfig) -> dict[str, tuple[int, int]]:
    """Name → (zeros, entries) of the matrices of a block whose zeros stay zero, pruned by this call or not."""
    if config.keep_zeros is False:
        return {}
    held = {id(v.parameter) for v in views}
    matrices = {v.name: v.get() for v in views} | {
        n: p.detach() for n, p in block.named_parameters() if p.ndim == 2 and n.endswith("weight") and id(p) not in held
    }
    found = {}
    for name, matrix in matrices.items():
        zeros = int((matrix == 0).sum())
        if zeros and (config.keep_zeros is True or criteria.pruned_before(matrix)):
            found[f"{index}.{name}"] = zeros, matrix.numel()
    return found


def _check_chosen(prefix: str, seen: _Seen, chosen: set[str], config: PruneConfig) -> None:
    """Each chosen matrix has what its criterion needs: inputs, or at least a known layout."""
    statistics, pattern = config.criterion != "magnitude", nm_pattern(config.pattern)

    def usable(view: WeightView) -> bool:
        if statistics:
            return seen.known(view) and (seen.used(view) or view.expert)
        return pattern is None or seen.known(view)

    refused = [(i, v) for i, row in enumerate(seen.per_block) for v in row if v.name in chosen and not usable(v)]
    if refused:
        index, view = refused[0]
        others = sorted(chosen - {v.name for _, v in refused})
        way = f"prune the others, layers={tuple(others)!r}" if others else "no other matrix can be pruned so"
        lacks = f"{config.criterion} has no inputs to choose by" if statistics else f"{config.pattern} cannot be laid along its inputs"
        raise ConfigError(f"{prefix}.{index}.{view.name} is not used in a matrix product that can be watched, so {lacks}; {way}.")


def _check_divides(prefix: str, views: list[list[WeightView]], chosen: set[str], nm: tuple[int, int] | None) -> None:
    for i, row in enumerate(views):
        for v in row:
            if nm and v.name in chosen and v.get().shape[1] % nm[1]:
                columns = f"{v.get().shape[1]} inputs, which {nm[1]} does not divide"
                raise ConfigError(f"pattern is '{nm[0]}:{nm[1]}', but {prefix}.{i}.{v.name} has {columns}.")


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


def parameter_masks(block: nn.Module, views: list[WeightView], masks: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor]:
    """Masks of a block by name in it, (out, in) for a view, in the layout of the parameters that hold the matrices."""
    found: dict[nn.Parameter, Tensor] = {}
    by_name = {v.name: v for v in views}
    for name, mask in masks.items():
        view = by_name.get(name)
        if view is None:
            found[block.get_parameter(name)] = mask
            continue
        mask = mask.t() if view.transposed else mask
        if view.index is None:
            found[view.parameter] = mask
        else:
            found.setdefault(view.parameter, torch.ones_like(view.parameter, dtype=torch.bool))[view.index] = mask
    return found


def check_inputs(model: nn.Module, samples: Tensor, config: PruneConfig, extra: Tensor | None, held_out: Mapping[str, Tensor] | None) -> None:
    check_one_process()
    if not isinstance(config, PruneConfig):
        raise ConfigError(f"config is a {type(config).__name__}; it must be a PruneConfig, such as rk.PruneConfig(**values).")
    if held_out is not None and not isinstance(held_out, Mapping):
        raise ConfigError(f'held_out is a {type(held_out).__name__}; it must be a mapping of names to samples, such as {{"wiki": samples}}.')
    check_adapters(model)
    check_decoder(model)
    check_float_weights(model)
    vocabulary = model.get_input_embeddings().num_embeddings
    for name, ids in {"samples": samples, "extra": extra, **{f"held_out[{k}]": v for k, v in (held_out or {}).items()}}.items():
        if ids is None and name == "extra":
            continue
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool or not ids.numel():
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


class eager_experts:
    """Run experts one by one during a pruning, so that the product of each expert is observed."""

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

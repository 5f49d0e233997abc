"""Dense and sparse hidden states, and how they move through the blocks. The only module that calls a block.

Letters: N samples, B samples of a batch, T tokens, H hidden. A source is one set of samples ("calibration", "extra" or
a held-out name). Each source has dense hidden states, which pass through the original blocks, and sparse ones, which pass through the pruned blocks.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache

from . import offload
from .assets import cache_dir
from .config import ConfigError
from .models import WeightView

Call = tuple[tuple[Any, ...], dict[str, Any]]
SAME = {torch.float32: 1e-8, torch.float64: 1e-8}  # NMSE below which two hidden states are the same
SAME_HALF = 1e-3


class Runner:
    """Calls single blocks exactly as the model does. It records once how the model calls each block.

    One forward of the model per (batch size, length) keeps, for every block, all arguments besides the hidden states:
    families hand different masks and rotary embeddings to different blocks, and some masks depend on the batch size.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        self.model, self.blocks, self.offload = model, blocks, offload.of(model)
        self._rest: tuple[Any, ...] | None = None
        self._probed = False
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._example: Tensor | None = None
        "Real tokens (B, T), from which samples of other sizes are made."

    def record(self, ids: Tensor, tap: InputTap | None = None) -> None:
        """Record the calls for the batch size and length of `ids` (B, T); `tap` sees the products meanwhile.

        Raises:
            ConfigError: the model does not call each block once, in order, with hidden states (B, T, H).
        """
        calls: list[tuple[int, Call]] = []

        def called(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._hidden(args, kwargs, ids)
            calls.append((index, _without_states(args, kwargs)))

        self._example = ids if self._example is None else self._example
        if self.offload and tap is None:
            self._probe()  # before anything counts the calls
        handles = [block.register_forward_pre_hook(lambda _, a, k, i=i: called(i, a, k), with_kwargs=True) for i, block in enumerate(self.blocks)]
        try:  # blocks on disk are read for nothing but a tap
            with torch.no_grad(), tap or (self._skipped() if self.offload else _nothing()):
                self._forward(ids)
        except (AttributeError, TypeError) as error:
            if self._rest:
                raise ConfigError(f"{self._name} computes with what its blocks return besides hidden states; load the model whole.") from error
            raise ConfigError(f"{self._name} cannot be called with token ids alone ({error}), so it cannot be pruned.") from error
        except RuntimeError as error:
            if self.offload is None or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ConfigError(f"{self._name} cannot run with its blocks on disk ({error}); load the model whole.") from error
        finally:
            for handle in handles:
                handle.remove()
        if [index for index, _ in calls] != [*range(len(self.blocks))]:
            order = ", ".join(str(index) for index, _ in calls[:12])
            raise ConfigError(
                f"{self._name} has {len(self.blocks)} blocks and calls them in the order {order or 'none'}, not each once and in order, "
                "so it cannot be pruned block by block."
            )
        known: dict[int, Tensor] = {}
        self._calls[tuple(ids.shape)] = [(_once(a, known), _once(k, known)) for _, (a, k) in calls]

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any], ids: Tensor) -> Tensor:
        """The hidden states among a block's arguments.

        Raises:
            ConfigError: they are not one tensor (B, T, H).
        """
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
            found = f"of shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else "not a tensor"
            raise ConfigError(
                f"The hidden states between the blocks of {self._name} are {found}, and not (samples, tokens, hidden), here "
                f"({ids.shape[0]}, {ids.shape[1]}, hidden), so it cannot be pruned block by block."
            )
        return hidden

    def check(self, batches: Iterable[Tensor]) -> None:
        """Compare the recorded blocks with the model itself, block by block, on each batch (B, T) of token ids.

        A family whose block arguments depend on the tokens, or that computes something between its blocks, is found here before any work.

        Raises:
            ConfigError: a block gives other hidden states than inside the model; the message names the block.
            FloatingPointError: a block of the dense model gives NaN or infinity.
        """
        for ids in batches:
            self.prepare([len(ids)], ids.shape[1])
            self._check(ids, self._calls[tuple(ids.shape)])

    @torch.no_grad()
    def _check(self, ids: Tensor, calls: Sequence[Call]) -> None:
        tolerance = SAME.get(self.dtype, SAME_HALF)
        before: list[Tensor] = []  # what the block before returned
        replayed: list[Tensor] = []

        def enters(index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = self._hidden(args, kwargs, ids)
            if before and not distance(before.pop(), hidden) <= tolerance:
                raise ConfigError(
                    f"{self._name} does more between blocks {index - 1} and {index} than hand on the hidden states, "
                    "so it cannot be pruned block by block."
                )
            replayed[:] = [_first(block.forward(hidden, *calls[index][0], **calls[index][1]))]
            replayed.append(_differing(calls[index], _without_states(args, kwargs)))

        def leaves(index: int, out: Any) -> None:
            out = _first(out)
            if not torch.isfinite(out).all():
                raise FloatingPointError(f"Block {index} of the dense model gives NaN or infinity; {finite_advice(self.dtype)}.")
            if not distance(out, replayed[0]) <= tolerance:
                raise ConfigError(
                    f"Block {index} of {self._name} gives other hidden states inside the model than when it is called by itself"
                    f"{replayed[1]}, so it cannot be pruned block by block."
                )
            before[:] = [out]

        handles = [b.register_forward_pre_hook(lambda m, a, k, i=i: enters(i, m, a, k), with_kwargs=True) for i, b in enumerate(self.blocks)]
        handles += [b.register_forward_hook(lambda _, __, out, i=i: leaves(i, out)) for i, b in enumerate(self.blocks)]
        try:
            self._forward(ids)
        finally:
            for handle in handles:
                handle.remove()

    def _forward(self, ids: Tensor) -> None:
        base = self.model.base_model if hasattr(self.model, "base_model") else self.model
        base(input_ids=ids.to(next(self.model.parameters()).device), use_cache=False)

    def embed(self, ids: Tensor, batch_size: int) -> Tensor:
        """Hidden states before the first block, (N, T) → (N, T, H), in the model's dtype."""
        states: list[Tensor] = []
        self.prepare({len(batch) for batch in ids.split(batch_size)}, ids.shape[1])

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.append(self._hidden(args, kwargs, batch))
            if text := _differing(self._calls[tuple(batch.shape)][0], _without_states(args, kwargs)):
                raise ConfigError(f"Block 0 of {self._name} is called otherwise for some samples{text}, so it cannot be pruned block by block.")
            raise _Reached

        handle = self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        try:
            with torch.no_grad():
                for batch in ids.split(batch_size):
                    try:
                        self._forward(batch)
                    except _Reached:
                        pass
        finally:
            handle.remove()
        return torch.cat(states)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits from the output of the last block, (B, T, H) → (B, T, vocabulary)."""
        with self._skipped(hidden):
            return self.model(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device), use_cache=False).logits

    @contextmanager
    def _skipped(self, result: Tensor | None = None) -> Iterator[None]:
        """Inside, the blocks compute nothing: they return their input, and the last one returns `result`, in the form that the model expects."""
        rest = self._probe()

        def passing(given: Tensor | None) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
                out = hidden_states if given is None else given
                return out if rest is None else (out, *rest)

            return forward

        if self.offload:
            self.offload.skipping = True
        for block in self.blocks:
            block.forward = passing(result if block is self.blocks[-1] else None)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward
            if self.offload:
                self.offload.skipping = False

    def _probe(self) -> tuple[Any, ...] | None:
        """What stands for the values that a block returns besides its hidden states; None where it returns a plain tensor.

        Such values, attention weights say, are for those who ask for them. `check` finds a model that computes with them.
        """
        if not self._probed:
            seen: list[Any] = []

            def stop(_: nn.Module, __: tuple[Any, ...], out: Any) -> None:
                seen.append(out)
                raise _Reached

            handle = self.blocks[0].register_forward_hook(stop)
            try:
                with torch.no_grad(), torch._C.DisableTorchFunction():
                    self._forward(torch.zeros(1, 2, dtype=torch.long))
            except _Reached:
                pass
            finally:
                handle.remove()
            out = seen[0]
            self._rest, self._probed = None if isinstance(out, Tensor) else (None,) * (len(out) - 1), True
        return self._rest

    def prepare(self, batch_sizes: Iterable[int], length: int) -> None:
        """Record the calls for batches of these sizes that are not recorded yet; the model must be in its own dtype."""
        for size in batch_sizes:
            if (size, length) not in self._calls:
                with torch._C.DisableTorchFunction():  # a tap around this must not see these tokens
                    self.record(self._tokens(size, length))

    def _tokens(self, size: int, length: int) -> Tensor:
        """Tokens (size, length): real ones, repeated, where some are known. Some families would mask padding."""
        if self._example is None:
            return torch.zeros(size, length, dtype=torch.long)
        return torch.from_numpy(np.resize(self._example.cpu().numpy(), (size, length)))

    def call(self, index: int, hidden: Tensor, block: nn.Module | None = None) -> Tensor:
        """Block `index` on `hidden` (B, T, H) → (B, T, H); `block` stands in for it, such as its dense copy."""
        shape = tuple(hidden.shape[:2])
        self.prepare([shape[0]], shape[1])
        args, kwargs = self._calls[shape][index]
        if hidden.dtype != self.dtype:  # a window trains in fp32 inside a half-precision model
            args, kwargs = _cast(args, hidden.dtype), _cast(kwargs, hidden.dtype)
        return _first((block if block is not None else self.blocks[index])(hidden, *args, **kwargs))

    def through(self, indices: Iterable[int], hidden: Tensor, stand_in: dict[int, nn.Module] | None = None) -> Tensor:
        """Move `hidden` (B, T, H) through several blocks in order."""
        for i in indices:
            hidden = self.call(i, hidden, (stand_in or {}).get(i))
        return hidden

    @torch.no_grad()
    def advance(
        self, indices: Sequence[int], states: Tensor, batch_size: int, stand_in: dict[int, nn.Module] | None = None, *, in_place: bool = False
    ) -> Tensor:
        """Move stored samples (N, T, H) through the blocks `indices`, batch by batch; the result is stored beside them, or `in_place`."""
        if not len(indices):
            return states
        out = states if in_place else allocate_like(states)
        self.map_batches(lambda batch: self.through(indices, batch, stand_in), states, batch_size, out)
        return out

    def map_batches(self, work: Callable[[Tensor], Tensor], states: Tensor, batch_size: int, out: Tensor | None = None) -> None:
        """Apply `work` to each batch (B, T, H) of stored samples (N, T, H); its results are written to `out` (N, T, H)."""
        cuts = [slice(start, min(start + batch_size, len(states))) for start in range(0, len(states), batch_size)]
        batches = prefetch((lambda c=c: (states[c].to(self.device, self.dtype, non_blocking=True),) for c in cuts), self.device)
        for chosen, (batch,) in zip(cuts, batches, strict=True):
            result = work(batch)
            if out is not None:
                out[chosen].copy_(result)

    @property
    def device(self) -> torch.device:
        return next(self.blocks.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


PRODUCTS: dict[Any, tuple[str, ...]] = {
    torch.nn.functional.linear: ("input", "weight"),
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), ("input", "other")),
    **dict.fromkeys((torch.mm, torch.bmm, torch.Tensor.mm, torch.Tensor.bmm), ("input", "mat2")),
    **dict.fromkeys((torch.addmm, torch.Tensor.addmm), ("added", "mat1", "mat2")),
    **dict.fromkeys((torch.baddbmm, torch.Tensor.baddbmm), ("added", "batch1", "batch2")),
}
"Matrix products, with the names of their arguments in order; the last two are the factors."


class InputTap(TorchFunctionMode):
    """Calls `seen(view, input, straight)` before every matrix product with a watched weight.

    `straight` says that the weight is stored as (out, in). `input` is (..., in).

    A product is recognised by the memory of its weight, so Linear, Conv1D and slices of expert parameters need no code
    of their own, and layers that read one tensor are seen to read the same object. The weight may be the left or the right
    factor. In a batched product (experts, tokens, in) × (experts, in, out) each expert's slice is a product of its own, without
    the tokens that are zero because they went to other experts.
    """

    def __init__(self, views: Iterable[WeightView], seen: Callable[[WeightView, Tensor, bool], None]) -> None:
        super().__init__()
        self.seen = seen
        self.watch(views)

    def watch(self, views: Iterable[WeightView]) -> None:
        """Watch these views from now on, at their present addresses."""
        self.views = {v.get().data_ptr(): v for v in views}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if names := PRODUCTS.get(func):
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            left, right = given.get(names[-2]), given.get(names[-1])
            if isinstance(left, Tensor) and isinstance(right, Tensor):
                if func is torch.nn.functional.linear:
                    self._product(left, right)
                else:
                    turned = right.mT if right.ndim > 1 else right
                    self._product(left, turned)
                    self._product(turned, left)  # the weight is the left factor: Y = W Xᵀ
        return func(*args, **(kwargs or {}))

    def _product(self, x: Tensor, weight: Tensor) -> None:
        """`x` (..., in) times the transpose of `weight` (out, in), or of (experts, out, in) slice by slice."""
        if weight.ndim == 2:
            self._show(x, weight)
        elif weight.ndim == 3 and weight.data_ptr() in self.views and x.ndim in (2, 3):
            for rows, part in zip(x.expand(len(weight), *x.shape[-2:]), weight, strict=True):
                self._show(rows[rows.any(-1)], part)

    def _show(self, x: Tensor, weight: Tensor) -> None:
        view = self.views.get(weight.data_ptr())
        stored = None if view is None else view.stored()
        if stored is not None and weight.shape in (stored.shape, stored.shape[::-1]):  # not a slice of it
            self.seen(view, x, weight.shape == stored.shape and weight.stride() == stored.stride())


def store(sources: Mapping[str, Tensor], streams: int, device: torch.device) -> dict[str, Tensor]:
    """Move the hidden states of all sources to one place: the first of the GPU `device`, RAM (pinned where there is a GPU) and disk in which
    `streams` times their size takes at most half of the free space."""
    size = streams * sum(states.nbytes for states in sources.values())
    gpu = device.type == "cuda"
    if gpu and size <= torch.cuda.mem_get_info(device)[0] // 2:
        return {name: states.to(device) for name, states in sources.items()}
    if size > psutil.virtual_memory().available // 2:
        return {name: _on_disk(states).copy_(states) for name, states in sources.items()}
    return {name: states.cpu().pin_memory() for name, states in sources.items()} if gpu else dict(sources)


def prefetch(loads: Iterable[Callable[[], tuple[Tensor, ...]]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors of each load on `device`, in order; a GPU copies the next ones from pinned RAM while it computes.

    A load must therefore not read what is computed from the load before it.
    """
    if device.type != "cuda":
        yield from (load() for load in loads)
        return
    copying, working = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    coming: list[tuple[tuple[Tensor, ...], torch.cuda.Event]] = []

    def arrived() -> tuple[Tensor, ...]:
        tensors, copied = coming.pop(0)
        working.wait_event(copied)
        for tensor in tensors:  # keeps the memory until the work on it is done
            tensor.record_stream(working)
        return tensors

    for load in loads:
        copying.wait_stream(working)
        with torch.cuda.stream(copying):
            coming.append((load(), copying.record_event()))
        if len(coming) == 2:
            yield arrived()
    if coming:
        yield arrived()


def allocate_like(states: Tensor) -> Tensor:
    """Uninitialised memory for hidden states of the same shape and dtype, in the same place."""
    return _on_disk(states) if getattr(states, "on_disk", False) else torch.empty_like(states, pin_memory=states.is_pinned())


def _on_disk(states: Tensor) -> Tensor:
    """Memory for such hidden states in an unnamed file, which is deleted with the tensor. The system caches the file in free RAM.

    Raises:
        OSError: the disk of the cache has too little space.
    """
    free = shutil.disk_usage(folder := cache_dir()).free
    if states.nbytes > free:
        raise OSError(28, f"{states.nbytes / 1e9:.1f} GB of hidden states fit neither in memory nor on disk ({free / 1e9:.1f} GB free)", str(folder))
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # a page without space on the disk would end the process when it is written
            os.posix_fallocate(file.fileno(), 0, states.nbytes)
        mapped = np.memmap(file, np.uint8, "r+", shape=(states.nbytes,))
    found = torch.from_numpy(mapped).view(states.dtype).view(states.shape)
    found.on_disk = True
    return found


class Errors(NamedTuple):
    """Distance of the sparse hidden states from the dense ones."""

    mse: float
    "Mean square per scalar."
    nmse: float
    "The same, divided by the mean square of the dense hidden states."
    token_nmse: float
    "Median over tokens of each token's squared error divided by its own squared norm."
    token_nmse_90: float
    "90th percentile of the same."


def distance(dense: Tensor, sparse: Tensor) -> float:
    """NMSE of one tensor from another of the same shape, NaN where either is not finite; sums in float64."""
    if dense.shape != sparse.shape:
        return float("inf")
    square = _sum(dense.float().square())
    difference = _sum((dense.float() - sparse.float()).square())
    return difference / square if square else difference


def finite_advice(dtype: torch.dtype) -> str:
    """What to do where hidden states of a model in `dtype` are not finite."""
    if dtype == torch.float16:
        return "load the model in float32 or bfloat16, whose range is larger than float16's"
    return "look at the model's weights and at the samples"


@torch.no_grad()
def error(dense: Tensor, sparse: Tensor, batch_size: int = 8) -> Errors:
    """MSE, NMSE and token NMSE of two sets of hidden states (N, T, H). Sums in float64.

    A few tokens with massive activations decide the NMSE. The token NMSE counts every token alike.
    """
    difference = square = 0.0
    tokens: list[np.ndarray] = []
    for d, s in zip(dense.split(batch_size), sparse.split(batch_size), strict=True):
        differences, squares = (d.float() - s.float()).square(), d.float().square()  # (B, T, H)
        difference += _sum(differences)
        square += _sum(squares)
        relative = _doubled(differences).sum(-1) / _doubled(squares).sum(-1).clamp_min(torch.finfo(torch.float64).tiny)
        tokens.append(relative.flatten().cpu().numpy())  # (B · T,)
    median, high = np.quantile(np.concatenate(tokens), [0.5, 0.9]).tolist()
    return Errors(difference / dense.numel(), difference / square if square else float(difference > 0), median, high)


def _sum(values: Tensor) -> float:
    return float(_doubled(values).sum())


def _doubled(values: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


class _Reached(Exception):
    """Raised to end a forward pass when it has gone far enough."""


def _first(out: Any) -> Tensor:
    """The hidden states among what a block returns."""
    return out if isinstance(out, Tensor) else out[0]


def _differing(recorded: Call, given: Call) -> str:
    """Which tensors among a block's arguments differ from the recorded ones, as part of a sentence."""
    names = [f"positional argument {i + 1}" for i in range(len(recorded[0]))] + [*recorded[1]]
    pairs = zip([*recorded[0], *recorded[1].values()], [*given[0], *(given[1].get(k) for k in recorded[1])], strict=False)
    found = [name for name, (a, b) in zip(names, pairs, strict=False) if not _equal(a, b)]
    return f" (the tokens decide its {', '.join(found)})" if found else ""


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return isinstance(a, Tensor) == isinstance(b, Tensor)


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def _without_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A block's arguments without its hidden states, and without any key-value cache."""
    kwargs = {k: None if isinstance(v, Cache) else v for k, v in kwargs.items() if k != "hidden_states"}
    return tuple(None if isinstance(a, Cache) else a for a in (args[1:] if args else ())), kwargs


def _once(value: Any, known: dict[Any, Tensor]) -> Any:
    """Replace equal tensors in `value` by one of them, because blocks often share one mask."""
    if isinstance(value, Tensor):
        same = next((t for t in known.values() if t.shape == value.shape and t.dtype == value.dtype and torch.equal(t, value)), None)
        return known.setdefault(id(value), value) if same is None else same
    if isinstance(value, dict):
        return {k: _once(v, known) for k, v in value.items()}
    return type(value)(_once(v, known) for v in value) if type(value) in (list, tuple) else value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast the floating-point tensors in `value` to `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return type(value)(_cast(v, dtype) for v in value) if type(value) in (list, tuple) else value

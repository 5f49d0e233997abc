"""Streams of hidden states through the blocks. The only room that calls a block.

Letters: N samples, B samples of a batch, T tokens, H hidden. A source is one set of samples ("calibration", "extra" or
a held-out name). Each source flows twice: dense through the original blocks, sparse through the pruned ones.
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

from . import offload, parallel
from .assets import cache_dir
from .models import WeightView

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Runner:
    """Calls single blocks exactly as the model would: it records once how the model calls each of them.

    One forward of the model per (batch size, length) keeps, for every block, all arguments besides the hidden states:
    families hand different masks and rotary embeddings to different blocks, and some masks depend on the batch size.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        self.model, self.blocks, self.offload = model, blocks, offload.of(model)
        self._tuples: bool | None = None
        self._calls: dict[tuple[int, int], list[Call]] = {}

    def record(self, ids: Tensor, tap: InputTap | None = None) -> None:
        """Record the calls for the batch size and length of `ids` (B, T); `tap` sees the products meanwhile."""
        calls: list[Call] = []
        if self.offload and tap is None:
            self._return_tuples()  # before anything counts the calls
        handles = [block.register_forward_pre_hook(lambda _, a, k: calls.append(_without_states(a, k)), with_kwargs=True) for block in self.blocks]
        try:  # blocks on disk are read for nothing but a tap
            with torch.no_grad(), tap or (self._skipped() if self.offload else _nothing()):
                self._forward(ids)
        finally:
            for handle in handles:
                handle.remove()
        if len(calls) != len(self.blocks):
            raise RuntimeError(f"The model called its {len(self.blocks)} blocks {len(calls)} times in one forward, so they cannot be run one by one.")
        known: dict[int, Tensor] = {}
        self._calls[tuple(ids.shape)] = [(_once(a, known), _once(k, known)) for a, k in calls]

    def _forward(self, ids: Tensor) -> None:
        base = self.model.base_model if hasattr(self.model, "base_model") else self.model
        base(input_ids=ids.to(next(self.model.parameters()).device), use_cache=False)

    def embed(self, ids: Tensor, batch_size: int) -> Tensor:
        """What enters the first block, (N, T) → (N, T, H), in the model's dtype."""
        states: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.append(args[0] if args else kwargs["hidden_states"])
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
        """What the model makes of the last block's output, (B, T, H) → (B, T, vocabulary)."""
        with self._skipped(hidden):
            return self.model(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device), use_cache=False).logits

    @contextmanager
    def _skipped(self, result: Tensor | None = None) -> Iterator[None]:
        """The blocks compute nothing: they hand on what they get, and the last one `result`, in the form that the model expects of them."""
        tuples = self._return_tuples()

        def passing(given: Tensor | None) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
                out = hidden_states if given is None else given
                return (out,) if tuples else out

            return forward

        if self.offload:
            self.offload.asleep = True
        for block in self.blocks:
            block.forward = passing(result if block is self.blocks[-1] else None)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward
            if self.offload:
                self.offload.asleep = False

    def _return_tuples(self) -> bool:
        """Whether a block returns a tuple; asked once, on two made-up tokens.

        Raises:
            RuntimeError: it returns more than hidden states, which the model may need.
        """
        if self._tuples is None:
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
            if not isinstance(seen[0], Tensor) and len(seen[0]) > 1:
                raise RuntimeError(f"A block returns {len(seen[0])} values, so it cannot be skipped; load the model whole.")
            self._tuples = not isinstance(seen[0], Tensor)
        return self._tuples

    def prepare(self, batch_sizes: Iterable[int], length: int) -> None:
        """Record the calls for batches of these sizes, where they are not known yet; the model must be in its own dtype."""
        for size in batch_sizes:
            if (size, length) not in self._calls:
                with torch._C.DisableTorchFunction():  # a tap around this must not see the made-up tokens
                    self.record(torch.zeros(size, length, dtype=torch.long))

    def call(self, index: int, hidden: Tensor, block: nn.Module | None = None) -> Tensor:
        """Block `index` on `hidden` (B, T, H) → (B, T, H); `block` stands in for it, such as its dense copy."""
        shape = tuple(hidden.shape[:2])
        self.prepare([shape[0]], shape[1])
        args, kwargs = self._calls[shape][index]
        if hidden.dtype != self.dtype:  # a window trains in fp32 inside a half-precision model
            args, kwargs = _cast(args, hidden.dtype), _cast(kwargs, hidden.dtype)
        out = (block if block is not None else self.blocks[index])(hidden, *args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def through(self, indices: Iterable[int], hidden: Tensor, stand_in: dict[int, nn.Module] | None = None) -> Tensor:
        """`hidden` (B, T, H) through several blocks in order."""
        for i in indices:
            hidden = self.call(i, hidden, (stand_in or {}).get(i))
        return hidden

    @torch.no_grad()
    def advance(
        self, indices: Sequence[int], states: Tensor, batch_size: int, stand_in: dict[int, nn.Module] | None = None, *, in_place: bool = False
    ) -> Tensor:
        """All stored samples (N, T, H) through the blocks `indices`, batch by batch; stored where and as they were, or `in_place` of them."""
        if not len(indices):
            return states
        out = states if in_place else room(states)
        self.spread(lambda batch: self.through(indices, batch, stand_in), states, batch_size, out)
        return out

    def spread(self, work: Callable[[Tensor], Tensor], states: Tensor, batch_size: int, out: Tensor | None) -> None:
        """`work` on each batch (B, T, H) of stored samples (N, T, H); what it returns goes to `out` (N, T, H).

        Whole batches are dealt out to the ranks, so that the bits do not depend on their number; `out` is filled on all of them.
        """
        cuts = [slice(start, min(start + batch_size, len(states))) for start in range(0, len(states), batch_size)]
        mine = cuts[parallel.rank() :: parallel.count()]
        batches = fetched((lambda c=c: (states[c].to(self.device, self.dtype, non_blocking=True),) for c in mine), self.device)
        for chosen, (batch,) in zip(mine, batches, strict=True):
            result = work(batch)
            if out is not None:
                out[chosen].copy_(result)
        if out is not None:
            for number, chosen in enumerate(cuts):
                parallel.give(out[chosen], number % parallel.count())

    @property
    def device(self) -> torch.device:
        return next(self.blocks.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


class InputTap(TorchFunctionMode):
    """Shows every matrix product with a watched weight: `seen(view, input, straight)` before it is computed.

    `straight` says that the weight is stored as (out, in).

    A product is recognised by the memory of its weight, so Linear, Conv1D and slices of expert parameters need no code
    of their own, and layers that read one tensor are seen to read the same object.
    """

    SECOND = (torch.nn.functional.linear, torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm)

    def __init__(self, views: Iterable[WeightView], seen: Callable[[WeightView, Tensor, bool], None]) -> None:
        super().__init__()
        self.seen = seen
        self.watch(views)

    def watch(self, views: Iterable[WeightView]) -> None:
        """From now on these, which are where they are now."""
        self.views = {v.get().data_ptr(): v for v in views}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        place = 1 if func in self.SECOND else 2 if func is torch.addmm else None
        if place is not None and len(args) > place and isinstance(args[place], Tensor):
            view = self.views.get(args[place].data_ptr())
            if view is not None and args[place].ndim == 2:
                used = args[place] if func is torch.nn.functional.linear else args[place].t()  # (out, in)
                self.seen(view, args[place - 1], used.stride() == view.stored().stride())
        return func(*args, **(kwargs or {}))


def store(sources: Mapping[str, Tensor], streams: int, device: torch.device) -> dict[str, Tensor]:
    """The states of all sources where they will live, all in one place: the first of the GPU `device`, RAM (pinned where there is a GPU)
    and disk of which `streams` times their size takes at most half of what is free."""
    size = streams * sum(states.nbytes for states in sources.values())
    gpu = device.type == "cuda"
    if gpu and size <= torch.cuda.mem_get_info(device)[0] // 2:
        return {name: states.to(device) for name, states in sources.items()}
    if size > psutil.virtual_memory().available // 2:
        return {name: _on_disk(states).copy_(states) for name, states in sources.items()}
    return {name: states.cpu().pin_memory() for name, states in sources.items()} if gpu else dict(sources)


def fetched(loads: Iterable[Callable[[], tuple[Tensor, ...]]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """What each load puts on `device`, in order; a GPU copies the next from pinned RAM while it works on the one before.

    So a load must not read what is written with the one before it.
    """
    if device.type != "cuda":
        yield from (load() for load in loads)
        return
    copying, working = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    coming: list[tuple[tuple[Tensor, ...], torch.cuda.Event]] = []

    def arrived() -> tuple[Tensor, ...]:
        tensors, copied = coming.pop(0)
        working.wait_event(copied)
        for tensor in tensors:  # whose memory is not free again before the work on it is done
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


def room(states: Tensor) -> Tensor:
    """Room for states like these, in the same place."""
    return _on_disk(states) if getattr(states, "on_disk", False) else torch.empty_like(states, pin_memory=states.is_pinned())


def _on_disk(states: Tensor) -> Tensor:
    """Room for such states in a file without a name, which is gone with the tensor; the system keeps of it in RAM what there is room for.

    Raises:
        OSError: the disk of the cache has not so much room.
    """
    free = shutil.disk_usage(folder := cache_dir()).free
    if states.nbytes > free:
        raise OSError(28, f"{states.nbytes / 1e9:.1f} GB of hidden states fit neither in memory nor on disk ({free / 1e9:.1f} GB free)", str(folder))
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # a page that finds no room when it is written would end the process
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


@torch.no_grad()
def error(dense: Tensor, sparse: Tensor, batch_size: int = 8) -> Errors:
    """MSE, NMSE and token NMSE of two sets of hidden states (N, T, H). Sums in float64.

    A few tokens with massive activations decide the NMSE. The token NMSE counts every token alike.
    """
    difference = square = 0.0
    tokens: list[np.ndarray] = []
    for d, s in zip(dense.split(batch_size), sparse.split(batch_size), strict=True):
        differences, squares = (d.float() - s.float()).square().sum(-1), d.float().square().sum(-1)  # (B, T)
        difference += _sum(differences)
        square += _sum(squares)
        relative = differences / squares.clamp_min(torch.finfo(squares.dtype).tiny)
        tokens.append(relative.flatten().cpu().double().numpy())
    median, high = np.quantile(np.concatenate(tokens), [0.5, 0.9]).tolist()
    return Errors(difference / dense.numel(), difference / square if square else float(difference > 0), median, high)


def _sum(values: Tensor) -> float:
    """In float64, on the CPU where the device has none."""
    return float((values.cpu() if values.device.type == "mps" else values).sum(dtype=torch.float64))


class _Reached(Exception):
    """The forward has reached the first block."""


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def _without_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A block's arguments without its hidden states, and without any key-value cache."""
    kwargs = {k: None if isinstance(v, Cache) else v for k, v in kwargs.items() if k != "hidden_states"}
    return tuple(None if isinstance(a, Cache) else a for a in (args[1:] if args else ())), kwargs


def _once(value: Any, known: dict[Any, Tensor]) -> Any:
    """The same value with equal tensors replaced by one of them: twenty blocks share one mask."""
    if isinstance(value, Tensor):
        same = next((t for t in known.values() if t.shape == value.shape and t.dtype == value.dtype and torch.equal(t, value)), None)
        return known.setdefault(id(value), value) if same is None else same
    if isinstance(value, dict):
        return {k: _once(v, known) for k, v in value.items()}
    return type(value)(_once(v, known) for v in value) if type(value) in (list, tuple) else value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The same value with floating tensors in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return type(value)(_cast(v, dtype) for v in value) if type(value) in (list, tuple) else value

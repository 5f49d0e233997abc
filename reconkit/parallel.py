"""One walk on several processes, the ranks of torch.distributed's group. The only room that talks to it.

Each rank does its share of the samples; sums and what was computed of them are exchanged, and what decides (masks, new
weights, files) is the first rank's, so that all ranks hold the same bits. In a process by itself everything here is nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import ConfigError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # more than any rank waits for another that works; torchrun ends the others of one that failed
BUCKET = 2**24  # gradients summed by one call
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def launched() -> int:
    """How many processes torchrun started, as it says in the environment."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys() else 1


@contextmanager
def group(device: str = "auto") -> Iterator[bool]:
    """Make torchrun's processes one group for the while, each with the GPU of its number; yields whether this is the first of them.

    A script loads and prunes inside, on every rank, and saves on the first. Without torchrun, or in a group, nothing is done.

    Args:
        device: "cpu" talks through gloo, "cuda" through nccl; "auto" takes the GPUs where there are any.

    Raises:
        ConfigError: torchrun started more processes here than there are GPUs.
    """
    if launched() == 1 or dist.is_initialized():
        yield main()
        return
    cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if cuda:
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ConfigError(f"torchrun started a process number {local} on a machine of {gpus} GPUs; use --nproc-per-node {gpus}, or device cpu.")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    yield main()
    dist.destroy_process_group()  # not after an error: the others may be waiting, and this process is about to end


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if count() > 1 else 0


def main() -> bool:
    """Whether this is the rank that shows, prints and writes."""
    return rank() == 0


def share(number: int) -> slice:
    """This rank's part of `number` rows; parts differ by one row at most, and are empty where there are more ranks than rows."""
    return slice(number * rank() // count(), number * (rank() + 1) // count())


def add(tensor: Tensor) -> Tensor:
    """`tensor` becomes its sum over the ranks, in place."""
    return _exchange(tensor, dist.all_reduce)


def give(tensor: Tensor, owner: int = 0) -> Tensor:
    """`tensor` (contiguous) becomes what it is on rank `owner`, in place."""
    if count() > 1:
        _exchange(tensor.view(-1).view(torch.uint8), lambda t: dist.broadcast(t, owner))
    return tensor


def _exchange(tensor: Tensor, call: Callable[[Tensor], Any]) -> Tensor:
    """Through the GPU where nccl would not see the tensor."""
    if count() > 1:
        there = tensor.cuda() if tensor.is_cpu and dist.get_backend() == "nccl" else tensor
        call(there)
        if there is not tensor:
            tensor.copy_(there)
    return tensor


def add_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Gradients become their sums over the ranks; one stays None where no rank has any, so that the optimiser passes it over."""
    if count() == 1:
        return
    for bucket in _buckets(parameters):
        present = bucket[0].new_tensor([float(p.grad is not None) for p in bucket])
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = add(torch.cat([present, *(part.flatten() for part in parts)]))
        present, *sums = flat.split([len(bucket), *(p.numel() for p in bucket)])
        for p, found, total in zip(bucket, present.tolist(), sums, strict=True):
            p.grad = total.view(p.shape) if found else None


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for p in parameters:
        if bucket and sum(q.numel() for q in bucket) + p.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket


def at_main(work: Callable[[], T]) -> T:
    """What `work` returns on the first rank, which alone does it, on every rank; what it raises there, all of them raise."""
    if count() == 1:
        return work()
    answer: list[Any] = [None, None]
    if main():
        try:
            answer[0] = work()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer, 0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def give_all(value: Any) -> Any:
    """The first rank's nested dictionaries of tensors on every rank; what lies on its GPU comes to each rank's own."""
    if count() == 1:
        return value
    plan = at_main(lambda: _each(value, lambda t: (t.shape, t.dtype, t.device.type)))
    if not main():
        value = _each(plan, lambda facts: torch.empty(facts[0], dtype=facts[1], device=facts[2]))
    return _each(value, _give_in_parts)


def _give_in_parts(tensor: Tensor) -> Tensor:
    """`give`, a few rows at a time: not every stream fits the GPU."""
    for rows in tensor.split(8):
        give(rows)
    return tensor


def _each(value: Any, call: Callable[[Any], Any]) -> Any:
    return {k: _each(v, call) for k, v in value.items()} if isinstance(value, dict) else None if value is None else call(value)


def differing(parts: Mapping[str, Iterable[Tensor]]) -> list[str]:
    """Names of the parts whose bits are not the same on all ranks; every rank gets the same answer."""
    if count() == 1:
        return []
    mine = [hash(tuple(_bits(t) for t in tensors)) >> 1 for tensors in parts.values()]  # so that its negative fits as well
    sums = torch.tensor([mine, [-s for s in mine]])
    highest, lowest = _exchange(sums, lambda t: dist.all_reduce(t, dist.ReduceOp.MAX)).tolist()
    return [name for name, high, low in zip(parts, highest, lowest, strict=True) if high != -low]


def _bits(tensor: Tensor) -> tuple[int, ...]:
    """Numbers that change with nearly every change of a tensor : its shape, and its bits summed by rows and then weighted."""
    rows = tensor.detach().reshape(len(tensor) if tensor.ndim else 1, -1).view(INTEGERS[tensor.element_size()]).sum(-1, dtype=torch.int64)
    return (*tensor.shape, int((rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum()))

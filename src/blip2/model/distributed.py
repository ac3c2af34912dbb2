"""Gathering tensors across processes, with gradients. With one process every function here is the identity."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.nn import functional as F


def process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if process_count() > 1 else 0


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes, in their order. All of them must call this, and wait for each other here."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


class _Gather(torch.autograd.Function):
    """All-gather whose backward adds up what every process wants of this process's part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(process_count())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(process_count())[process_index()]


def gather(tensor: Shaped[Tensor, "B *rest"]) -> Shaped[Tensor, "N *rest"]:
    """The tensors of all processes, one after the other along the first axis; B must be the same everywhere.

    Gradients flow back to the process that made each part.
    """
    if process_count() == 1:
        return tensor
    return _Gather.apply(tensor)


def gather_padded(tensor: Shaped[Tensor, "B T"], padding: int | bool) -> Shaped[Tensor, "N L"]:
    """Like :func:`gather` for rows whose length differs between processes: padded to the longest, L."""
    if process_count() == 1:
        return tensor
    longest = torch.tensor(tensor.shape[1], device=tensor.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return gather(F.pad(tensor, (0, int(longest) - tensor.shape[1]), value=padding))

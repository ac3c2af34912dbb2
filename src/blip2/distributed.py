"""Gathering tensors across processes, with gradients. With one process every function here is the identity."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F


def process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if process_count() > 1 else 0


def shared_chances(seed: int, sets: int, rows: int) -> Float[Tensor, "sets rows"]:
    """Numbers in [0, 1) for the `rows` of this process, in several sets, on the CPU.

    They are those that one process would draw with the same seed for the rows of all, so that what they decide does not
    depend on the number of processes.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(sets, process_count() * rows, generator=generator)[:, process_index() * rows :][:, :rows]


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
        every = gradients[0].contiguous()
        own = torch.empty_like(every)
        dist.all_to_all_single(own, every)  # each part goes home, and nowhere else
        return own.unflatten(0, (process_count(), -1)).sum(dim=0)


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


class _Fetch(torch.autograd.Function):
    """Rows of other processes, which alone travel; backward takes their gradients home."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, wanted: Tensor) -> Tensor:
        every = gather(wanted).view(process_count(), -1)  # [processes, N]: what each of them wants
        owner = every // len(tensor)
        mine = process_index()
        ctx.sent = torch.cat([rows[own == mine] for rows, own in zip(every, owner, strict=True)]) - mine * len(tensor)
        ctx.order = owner[mine].argsort(stable=True)
        ctx.going = (owner == mine).sum(dim=1).tolist()
        ctx.coming = owner[mine].bincount(minlength=process_count()).tolist()
        ctx.rows = len(tensor)
        received = tensor.new_empty(len(wanted), *tensor.shape[1:])
        dist.all_to_all_single(received, tensor[ctx.sent], ctx.coming, ctx.going)
        return torch.empty_like(received).index_copy_(0, ctx.order, received)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0][ctx.order]
        returned = gradient.new_empty(len(ctx.sent), *gradient.shape[1:])
        dist.all_to_all_single(returned, gradient, ctx.going, ctx.coming)
        return gradient.new_zeros(ctx.rows, *gradient.shape[1:]).index_add_(0, ctx.sent, returned), None


def fetch(tensor: Shaped[Tensor, "B *rest"], wanted: Int[Tensor, "M"]) -> Shaped[Tensor, "M *rest"]:
    """The rows `wanted` of the tensors of all processes, B rows each, of which no others travel.

    Gradients flow back to the process that made each row; of a tensor without gradient nothing does.

    Args:
        wanted: row r of process p is p * B + r.
    """
    if process_count() == 1:
        return tensor[wanted]
    return _Fetch.apply(tensor, wanted)

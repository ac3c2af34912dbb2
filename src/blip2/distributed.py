"""Collective operations with gradients. With one process, every function here is the identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from blip2.errors import InputError

Result = TypeVar("Result")


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def rank_consistent_uniforms(seed: int, sets: int, rows: int) -> Float[Tensor, "sets rows"]:
    """Draw uniform numbers in [0, 1) for the `rows` of this process, in several sets, on the CPU.

    They are those that one process would draw with the same seed for the rows of all processes, so that the results do
    not depend on the number of processes.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(sets, world_size() * rows, generator=generator)[:, rank() * rows :][:, :rows]


def all_gather_objects(value: Any) -> list[Any]:
    """Return the values of all processes, in order of their ranks. All processes must call it, and wait here."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_0(function: Callable[[], Result]) -> Result:
    """Call a function on rank 0, and return its result in all processes, which must all call this.

    Raises:
        InputError: in all processes, if the function raises it.
    """
    result = problem = None
    if rank() == 0:
        try:
            result = function()
        except InputError as error:
            problem = str(error)
    result, problem = all_gather_objects((result, problem))[0]
    if problem is not None:
        raise InputError(problem)
    return result


class _AllGather(torch.autograd.Function):
    """All-gather. The backward pass sums the gradients that all processes have for this process's part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        grad_output = gradients[0].contiguous()
        received = torch.empty_like(grad_output)
        dist.all_to_all_single(received, grad_output)  # each part is sent to its owner only
        return received.unflatten(0, (world_size(), -1)).sum(dim=0)


def all_gather(tensor: Shaped[Tensor, "B *rest"]) -> Shaped[Tensor, "N *rest"]:
    """Concatenate the tensors of all processes along the first axis; B must be equal in all of them.

    Gradients flow back to the process that owns each part.
    """
    if world_size() == 1:
        return tensor
    return _AllGather.apply(tensor)


def all_gather_padded(tensor: Shaped[Tensor, "B T"], padding: int | bool) -> Shaped[Tensor, "N L"]:
    """Concatenate rows whose length differs between processes, padded to the longest, L; see :func:`all_gather`."""
    if world_size() == 1:
        return tensor
    longest = torch.tensor(tensor.shape[1], device=tensor.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return all_gather(F.pad(tensor, (0, int(longest) - tensor.shape[1]), value=padding))


class _GatherRows(torch.autograd.Function):
    """Exchange of the requested rows only. The backward pass returns their gradients to the owning rank."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, indices: Tensor) -> Tensor:
        requested = all_gather(indices).view(world_size(), -1)  # [world_size, M]: the indices that each rank requests
        owner = requested // len(tensor)
        here = rank()
        ctx.sent_rows = (
            torch.cat([rows[owners == here] for rows, owners in zip(requested, owner, strict=True)])
            - here * len(tensor)
        )  # fmt: skip
        ctx.order = owner[here].argsort(stable=True)
        ctx.send_counts = (owner == here).sum(dim=1).tolist()
        ctx.recv_counts = owner[here].bincount(minlength=world_size()).tolist()
        ctx.num_rows = len(tensor)
        received = tensor.new_empty(len(indices), *tensor.shape[1:])
        dist.all_to_all_single(received, tensor[ctx.sent_rows], ctx.recv_counts, ctx.send_counts)
        return torch.empty_like(received).index_copy_(0, ctx.order, received)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0][ctx.order]
        returned = gradient.new_empty(len(ctx.sent_rows), *gradient.shape[1:])
        dist.all_to_all_single(returned, gradient, ctx.send_counts, ctx.recv_counts)
        return gradient.new_zeros(ctx.num_rows, *gradient.shape[1:]).index_add_(0, ctx.sent_rows, returned), None


def gather_rows(tensor: Shaped[Tensor, "B *rest"], indices: Int[Tensor, "M"]) -> Shaped[Tensor, "M *rest"]:
    """Gather rows of the tensors of all processes, which have B rows each. Only these rows are sent.

    Gradients flow back to the process that owns each row, if the tensor requires them.

    Args:
        indices: row r of rank p has the index p * B + r.
    """
    if world_size() == 1:
        return tensor[indices]
    return _GatherRows.apply(tensor, indices)

"""Collective operations, some of them with gradients. With a single process, nothing is communicated."""

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
    """Return the index of this process, in [0, :func:`world_size`)."""
    return dist.get_rank() if world_size() > 1 else 0


def rank_consistent_uniforms(seed: int, sets: int, rows: int) -> Float[Tensor, "sets rows"]:
    """Draw random numbers in [0, 1) for the rows of this process, on the CPU.

    One process would draw the same numbers with this seed for the rows of all processes, so results do not depend on
    the number of processes.

    Args:
        seed: seed, equal in all processes.
        sets: number of random numbers per row.
        rows: number of rows of this process, equal in all processes.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(sets, world_size() * rows, generator=generator)[:, rank() * rows :][:, :rows]


def all_gather_objects(value: Any) -> list[Any]:
    """Return the values of all processes, in order of their ranks. All processes must call this function.

    Args:
        value: the value of this process, which must be picklable.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_0(function: Callable[[], Result]) -> Result:
    """Call a function on rank 0 only, and return its result in all processes, all of which must call ``on_rank_0``.

    Args:
        function: function whose result is picklable.

    Raises:
        InputError: the function has raised InputError on rank 0. All processes raise it.
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
    """All-gather. The backward pass sums the gradients that all processes have for the part of this process."""

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
    """Concatenate the tensors of all processes along the first axis, in order of their ranks.

    Gradients flow back to the process that owns each part.

    Args:
        tensor: the part of this process. The shape must be equal in all processes.

    Returns:
        N = B * :func:`world_size` rows.
    """
    if world_size() == 1:
        return tensor
    return _AllGather.apply(tensor)


def all_gather_padded(tensor: Shaped[Tensor, "B T"], padding: int | bool) -> Shaped[Tensor, "N L"]:
    """Concatenate the rows of all processes, whose length T may differ between processes; see :func:`all_gather`.

    Args:
        tensor: the rows of this process. B must be equal in all processes.
        padding: value with which rows are filled up on the right to L, the largest T of all processes.
    """
    if world_size() == 1:
        return tensor
    longest = maximum_over_processes(tensor.shape[1], tensor.device)
    return all_gather(F.pad(tensor, (0, longest - tensor.shape[1]), value=padding))


def maximum_over_processes(value: int, device: torch.device) -> int:
    """Return the largest value of all processes, which must all call this function.

    Args:
        value: the value of this process.
        device: device of the collective operation.
    """
    if world_size() == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


class _GatherRows(torch.autograd.Function):
    """Exchange of requested rows. The backward pass sends their gradients back to the processes that own the rows."""

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
    """Return M rows of the tensors of all processes. Only the rows that a process requests are sent to it.

    Gradients flow back to the process that owns each row, if the tensor requires gradients.

    Args:
        tensor: the rows of this process. The shape must be equal in all processes.
        indices: indices of the requested rows, in [0, B * :func:`world_size`). Row r of rank p has the index p * B + r.
            M must be equal in all processes.
    """
    if world_size() == 1:
        return tensor[indices]
    return _GatherRows.apply(tensor, indices)

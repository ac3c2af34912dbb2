"""Matrix products of linear layers by the fastest of PyTorch's libraries.

On CPUs PyTorch gives products in float32 to MKL, and to oneDNN only where its compiler asks for it. On the processor of
docs/performance.md, an AMD EPYC with AVX-512, oneDNN is a quarter faster; it is asked for here.

Legend: M rows, I input width, O output width.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

WORTH_IT = 2**24
"""Multiplications from which on it is used. oneDNN makes a program for each size, which takes a millisecond once."""


def _find() -> Any:
    """oneDNN's product, where this PyTorch has it and this processor gains by it; else None."""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability() or not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_onednn = _find()


class _Product(torch.autograd.Function):
    """x W^T + b by oneDNN, and the gradient of x too. MKL is as fast for that of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _onednn(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        above = gradients[0].contiguous()
        rows = above.flatten(0, -2)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            linear(above, weight.T) if of_x else None,
            rows.T @ x.flatten(0, -2) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


def linear(
    x: Float[Tensor, "*shape I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None = None
) -> Float[Tensor, "*shape O"]:
    """What ``torch.nn.functional.linear`` gives, up to rounding."""
    if not _pays(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Product.apply(x, weight, bias)
    return _onednn(x, weight, bias, "none", [], "")


def linear_gelu(
    x: Float[Tensor, "*shape I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"]
) -> Float[Tensor, "*shape O"]:
    """The exact GELU of :func:`linear`. Without gradients oneDNN does both while it has the numbers in its hands."""
    if torch.is_grad_enabled() or not _pays(x, weight):
        return F.gelu(linear(x, weight, bias))
    return _onednn(x, weight, bias, "gelu", [], "none")


def _pays(x: Tensor, weight: Tensor) -> bool:
    return (
        _onednn is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(weight) in (Tensor, nn.Parameter)  # not one that is spread over processes
        and x.numel() * len(weight) >= WORTH_IT
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # the compiler asks for it itself
    )


class Linear(nn.Linear):
    """torch's linear layer by :func:`linear`."""

    def forward(self, input: Float[Tensor, "*shape I"]) -> Float[Tensor, "*shape O"]:
        return linear(input, self.weight, self.bias)


def use_linear(network: nn.Module) -> None:
    """Make :class:`Linear` of the linear layers of a network that others wrote. Weights and names stay."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear

"""Linear layers and what is fused with them.

On CPUs PyTorch computes products in float32 by MKL, and by oneDNN only in compiled code. On processors with AVX-512
oneDNN is a quarter faster (docs/performance.md), so it is called directly here.

Legend: I input width, O output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MIN_MULTIPLICATIONS = 2**24
"""Smallest product for which oneDNN is used. It compiles a program for each new size, which takes a millisecond."""


def _find_onednn() -> Any:
    """Return oneDNN's linear layer, or None if this PyTorch lacks it or this processor does not gain from it."""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability() or not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_onednn = _find_onednn()


def _use_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        _onednn is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(weight) in (Tensor, nn.Parameter)  # no DTensor
        and x.numel() * len(weight) >= MIN_MULTIPLICATIONS
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # the compiler uses oneDNN itself
    )


def _apply(function: Any, *args: Tensor | None) -> Tensor:
    """Apply a ``torch.autograd.Function``, whose ``apply`` has no types."""
    return function.apply(*args)


class _OneDNNLinear(torch.autograd.Function):
    """x W^T + b and the gradient of x by oneDNN; the gradient of W by MKL, which is as fast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _onednn(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad_output = grad_outputs[0].contiguous()
        grad_rows = grad_output.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            linear(grad_output, weight.T) if needs_x else None,
            grad_rows.T @ x.flatten(0, -2) if needs_weight else None,
            grad_rows.sum(dim=0) if needs_bias else None,
        )


def linear(
    x: Float[Tensor, "*shape I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None = None
) -> Float[Tensor, "*shape O"]:
    """Return ``torch.nn.functional.linear(x, weight, bias)`` up to rounding."""
    if not _use_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _apply(_OneDNNLinear, x, weight, bias)
    return _onednn(x, weight, bias, "none", [], "")


class Linear(nn.Linear):
    """``torch.nn.Linear`` by :func:`linear`."""

    def forward(self, input: Float[Tensor, "*shape I"]) -> Float[Tensor, "*shape O"]:
        return linear(input, self.weight, self.bias)


def convert_linears(network: nn.Module) -> None:
    """Make each ``torch.nn.Linear`` of a network, but no subclass of it, a :class:`Linear` with the same parameters."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def to_autocast_dtype(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Cast `x` to the dtype that autocast uses, once for several projections of it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


# -- MLP -------------------------------------------------------------------------------------------------------------


def linear_gelu(
    x: Float[Tensor, "*shape I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"]
) -> Float[Tensor, "*shape O"]:
    """Return ``gelu(linear(x, weight, bias))``, with the exact GELU. Without gradients oneDNN computes both at once."""
    if torch.is_grad_enabled() or not _use_onednn(x, weight):
        return F.gelu(linear(x, weight, bias))
    return _onednn(x, weight, bias, "gelu", [], "none")


class _GeluLinear(torch.autograd.Function):
    """linear(gelu(x), weight, bias). The backward pass recomputes gelu(x), the widest tensor of a block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_output = grad_outputs[0].flatten(0, -2)
        grad_input = torch.ops.aten.gelu_backward(linear(grad_output, weight.T).view_as(x), x)
        # Unlike for other weights, oneDNN is a tenth faster for the gradient of this one.
        grad_weight = linear(grad_output.T, F.gelu(x).flatten(0, -2).T)
        return grad_input, grad_weight, grad_output.sum(dim=0)


def mlp(x: Float[Tensor, "*shape I"], fc1: nn.Linear, fc2: nn.Linear) -> Float[Tensor, "*shape O"]:
    """Return ``fc2(gelu(fc1(x)))``, with the exact GELU."""
    if not torch.is_grad_enabled():
        return fc2(linear_gelu(x, fc1.weight, fc1.bias))
    hidden = fc1(x)
    return _apply(_GeluLinear, hidden, fc2.weight.to(hidden.dtype), fc2.bias.to(hidden.dtype))


# -- LayerNorm and projections ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormalizedFeatures:
    """The input of several projections of ``norm(features)``.

    If the features need no gradient, they are normalized without the scale g and shift b of the norm, which go into
    each projection: W (g * x + b) + c = (W * g) x + (W b + c). The gradients of g and b then come from that of the
    weights, and none is computed for x.
    """

    x: Float[Tensor, "B P I"]
    norm: nn.LayerNorm | None
    """The norm whose scale and shift :meth:`project` applies; None: `x` has them already."""

    @classmethod
    def create(cls, features: Float[Tensor, "B P I"], norm: nn.LayerNorm) -> NormalizedFeatures:
        if features.requires_grad or not torch.is_grad_enabled():
            return cls(to_autocast_dtype(norm(features)), None)
        return cls(to_autocast_dtype(F.layer_norm(features, norm.normalized_shape, eps=norm.eps)), norm)

    def project(self, projection: nn.Linear) -> Float[Tensor, "B P O"]:
        """Return ``projection(norm(features))``."""
        if self.norm is None:
            return projection(self.x)
        weight, norm = projection.weight, self.norm
        return linear(self.x, weight * norm.weight, projection.bias + (weight * norm.bias).sum(dim=1))

"""Linear layers, and operations that are fused with linear layers: GELU, MLP and LayerNorm.

On CPUs PyTorch computes float32 matrix products with MKL, and with oneDNN only in compiled code. On processors with
AVX-512, oneDNN is a quarter faster (docs/performance.md), so this module calls oneDNN directly.

Legend: B batch, P image tokens, I input width, O output width.
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
"""Smallest number of multiplications for which oneDNN is used, because oneDNN spends a millisecond on each new size."""


def _find_onednn() -> Any:
    """Return oneDNN's linear layer, or None if this PyTorch does not have it or this processor has no AVX-512."""
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
    """Compute x W^T + b and the gradient of x with oneDNN, and the gradient of W with MKL, which is as fast for W."""

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
    """A ``torch.nn.Linear`` that computes its output with :func:`linear`."""

    def forward(self, input: Float[Tensor, "*shape I"]) -> Float[Tensor, "*shape O"]:
        return linear(input, self.weight, self.bias)


def convert_linears(network: nn.Module) -> None:
    """Turn each ``torch.nn.Linear`` in a network into a :class:`Linear` with the same parameters.

    Instances of subclasses of ``torch.nn.Linear`` are left unchanged.
    """
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def to_autocast_dtype(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Cast `x` to the dtype of autocast, if autocast is enabled, so that several projections of `x` share one cast."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


# -- MLP -------------------------------------------------------------------------------------------------------------


def linear_gelu(
    x: Float[Tensor, "*shape I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"]
) -> Float[Tensor, "*shape O"]:
    """Return ``gelu(linear(x, weight, bias))``, with the exact GELU.

    If gradients are disabled and oneDNN is used, linear layer and GELU are one operation.
    """
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
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_output = grad_outputs[0].flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            torch.ops.aten.gelu_backward(linear(grad_output, weight.T).view_as(x), x) if needs_x else None,
            # For this weight, unlike for others, oneDNN computes the gradient a tenth faster than MKL.
            linear(grad_output.T, F.gelu(x).flatten(0, -2).T) if needs_weight else None,
            grad_output.sum(dim=0) if needs_bias else None,
        )


def mlp(x: Float[Tensor, "*shape I"], fc1: nn.Module, fc2: nn.Module) -> Float[Tensor, "*shape O"]:
    """Return ``fc2(gelu(fc1(x)))``, with the exact GELU.

    The operations are fused if both layers are ``torch.nn.Linear``. A layer with adapters of PEFT is not: its `weight`
    lacks the adapters.
    """
    if not (isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear)):
        return fc2(F.gelu(fc1(x)))
    if not torch.is_grad_enabled():
        return fc2(linear_gelu(x, fc1.weight, fc1.bias))
    hidden = fc1(x)
    return _apply(_GeluLinear, hidden, fc2.weight.to(hidden.dtype), fc2.bias.to(hidden.dtype))


# -- LayerNorm and projections ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormalizedFeatures:
    """The input of several projections of ``norm(features)``.

    If the features need no gradient in training, `x` is normalized without the scale g and the shift b of the norm.
    Instead, :meth:`project` applies g and b to the weight W and the bias c of each projection:
    W (g * x + b) + c = (W * g) x + (W b + c). The gradients of g and b are then computed from the gradients of the
    weights and biases, and no gradient is computed for `x`.
    """

    x: Float[Tensor, "B P I"]
    norm: nn.LayerNorm | None
    """The norm whose scale and shift :meth:`project` applies. None: scale and shift are already applied."""

    @classmethod
    def create(cls, features: Float[Tensor, "B P I"], norm: nn.LayerNorm) -> NormalizedFeatures:
        if features.requires_grad or not torch.is_grad_enabled():
            return cls(to_autocast_dtype(norm(features)), None)
        return cls(to_autocast_dtype(F.layer_norm(features, norm.normalized_shape, eps=norm.eps)), norm)

    def project(self, projection: nn.Module) -> Float[Tensor, "B P O"]:
        """Return ``projection(norm(features))``. The projection may have adapters, as in :func:`mlp`."""
        if self.norm is None:
            return projection(self.x)
        if not isinstance(projection, nn.Linear):
            return projection(self.x * self.norm.weight + self.norm.bias)
        weight, norm = projection.weight, self.norm
        return linear(self.x, weight * norm.weight, projection.bias + (weight * norm.bias).sum(dim=1))

"""Dropout that stores one byte per element for the backward pass, also on CPUs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def dropout(x: Float[Tensor, "*shape"], p: float) -> Float[Tensor, "*shape"]:
    """Return ``mask * x / (1 - p)``, where each element of mask is 0 with probability `p` and otherwise 1.

    On CPUs the mask that is stored for the backward pass takes one byte per element;
    ``torch.nn.functional.dropout`` would store the mask in the dtype of `x`. On other devices this function calls
    ``torch.nn.functional.dropout``.

    Args:
        x: the input.
        p: probability of dropping an element, in [0, 1).
    """
    if x.device.type != "cpu":
        return F.dropout(x, p)
    # On CPUs uniform numbers are drawn twice as fast as Bernoulli ones.
    return x * (torch.rand(x.shape) >= p) / (1 - p)


class Dropout(nn.Module):
    """Apply :func:`dropout` with probability `p` in training mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    @property
    def active_p(self) -> float:
        """The probability of dropping an element: `p` in training mode, 0 in evaluation mode."""
        return self.p if self.training else 0.0

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return dropout(x, self.active_p) if self.active_p else x

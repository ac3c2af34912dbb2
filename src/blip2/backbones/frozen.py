"""Base class of the frozen models: no gradients, always in evaluation mode, their own data type (paper §3.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

FreezableT = TypeVar("FreezableT", bound="Freezable")  # the tests' run-time type checker does not support typing.Self


class Freezable(nn.Module):
    """A pretrained model that is frozen until a recipe gives one of its parameters a learning rate.

    While frozen, the model stays in ``eval()`` even if the model that contains it is in training mode (no dropout in a
    frozen LLM, no update of batch statistics in a frozen CNN), and it computes in the data type of its weights
    regardless of autocast.
    """

    adapter_key: str = ""
    """Substring of the names of the adapter parameters, which are the only parameters of a model with adapters that are
    trained and saved. An empty string: the model has no adapters."""

    blocks: Sequence[nn.Module] = ()
    """The repeated blocks that contain nearly all weights of the model, in order."""

    @property
    def is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights; float32 for a model without weights."""
        dtypes = (parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())
        return next(dtypes, torch.float32)

    def freeze(self: FreezableT) -> FreezableT:
        self.requires_grad_(False)
        return self.eval()

    def train(self: FreezableT, mode: bool = True) -> FreezableT:
        return super().train(mode and not self.is_frozen)

    def gradient_checkpointing_enable(self) -> bool:
        """Store only the inputs of each block; the backward pass computes the activations of the block again.

        The results are the same, including dropout. Frozen models are included, because gradients pass through a frozen
        LLM; transformers' own ``gradient_checkpointing_enable`` skips modules that are in ``eval()``.

        Returns:
            Whether the model has blocks. Without blocks this method does nothing.
        """
        for block in self.blocks:
            block.forward = partial(_recompute, block.forward)
        return bool(self.blocks)

    def autocast_context(self, device: torch.device) -> torch.autocast:
        """Return a context that disables autocast while the model is frozen and leaves it unchanged otherwise."""
        enabled = torch.is_autocast_enabled(device.type)
        return torch.autocast(device.type, enabled=enabled and not self.is_frozen)


def _recompute(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)

"""What it means for a part to be frozen: no gradients, never in training mode, its own dtype (paper §3.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Part = TypeVar("Part", bound="Freezable")  # the run-time type checks of the tests cannot read typing.Self


class Freezable(nn.Module):
    """A pretrained part that is frozen until a recipe gives one of its parameters a learning rate.

    While frozen it stays in ``eval()`` even when the model around it trains (no dropout inside a frozen LLM, no moving
    batch statistics inside a frozen CNN) and computes in the dtype of its own weights, whatever autocast says.
    """

    adapters: str = ""
    """What stands in the names of the parameters of its adapters, where it has any: they alone train and are kept."""

    blocks: Sequence[nn.Module] = ()
    """The equal blocks that hold nearly all of its weights, in each stack from the first to the last."""

    @property
    def is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    def freeze(self: Part) -> Part:
        self.requires_grad_(False)
        return self.eval()

    def train(self: Part, mode: bool = True) -> Part:
        return super().train(mode and not self.is_frozen)

    def recompute_blocks(self) -> bool:
        """Keep only the inputs of each block for the backward pass, and compute the rest of it a second time there.

        The results, dropout included, are the same. Frozen or not: gradients pass through a frozen LLM as well.
        transformers' own way leaves out whatever is in ``eval()``, as frozen parts always are.

        Returns:
            Whether there are blocks. Without, all is kept as before.
        """
        for block in self.blocks:
            block.forward = partial(_recompute, block.forward)
        return bool(self.blocks)

    def own_precision(self, device: torch.device) -> torch.autocast:
        """Autocast off while frozen; as it is around us otherwise."""
        outside = torch.is_autocast_enabled(device.type)
        return torch.autocast(device.type, enabled=outside and not self.is_frozen)


def _recompute(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    return checkpoint(partial(forward, **named), *arguments, use_reentrant=False)

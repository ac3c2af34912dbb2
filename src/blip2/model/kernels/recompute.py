"""Gradient checkpointing: the backward pass computes a function again, instead of storing intermediate results."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]  # partly without types

Result = TypeVar("Result")


def recompute(function: Callable[..., Result], *args: object) -> Result:
    """Return ``function(*args)``, storing only `args` for the backward pass, which calls `function` again."""
    return cast(Result, checkpoint(function, *args, use_reentrant=False))

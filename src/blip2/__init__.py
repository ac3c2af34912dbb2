"""BLIP-2: give a frozen language model eyes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip2.decoding.search import Decoding
    from blip2.errors import InputError
    from blip2.pipelines import GenerationPipeline, RepresentationPipeline, load
    from blip2.training.trainer import train

__all__ = ["Decoding", "GenerationPipeline", "InputError", "RepresentationPipeline", "load", "train"]
__version__ = "0.1.0"

_HOMES = {
    "Decoding": "blip2.decoding.search",
    "GenerationPipeline": "blip2.pipelines",
    "InputError": "blip2.errors",
    "RepresentationPipeline": "blip2.pipelines",
    "load": "blip2.pipelines",
    "train": "blip2.training.trainer",
}


def __getattr__(name: str) -> Any:
    # Imported at first use: `blip2 --help` need not wait for PyTorch.
    if name not in _HOMES:
        raise AttributeError(f"module 'blip2' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)

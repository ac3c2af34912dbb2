"""BLIP-2: connect a frozen image encoder to a frozen LLM by training only the Q-Former between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip2.decoding.search import Decoding
    from blip2.errors import InputError
    from blip2.evaluation.in_training import train
    from blip2.pipelines import (
        Chat,
        Explanation,
        Generated,
        GenerationPipeline,
        RepresentationPipeline,
        draw_attention,
        load,
    )
    from blip2.search.library import Library

__all__ = [
    "Chat",
    "Decoding",
    "Explanation",
    "Generated",
    "GenerationPipeline",
    "InputError",
    "Library",
    "RepresentationPipeline",
    "draw_attention",
    "load",
    "train",
]
__version__ = "0.1.0"

_MODULES = {
    "Chat": "blip2.pipelines",
    "Decoding": "blip2.decoding.search",
    "Explanation": "blip2.pipelines",
    "Generated": "blip2.pipelines",
    "GenerationPipeline": "blip2.pipelines",
    "InputError": "blip2.errors",
    "Library": "blip2.search.library",
    "RepresentationPipeline": "blip2.pipelines",
    "draw_attention": "blip2.pipelines",
    "load": "blip2.pipelines",
    "train": "blip2.evaluation.in_training",
}


def __getattr__(name: str) -> Any:
    # Imported lazily, so that `blip2 --help` does not wait for PyTorch.
    if name not in _MODULES:
        raise AttributeError(f"module 'blip2' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)

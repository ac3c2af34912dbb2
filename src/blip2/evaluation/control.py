"""The control of an evaluation: the same records with images that do not belong to them, and with blank images.

A language model answers many questions from their words alone. The difference between the score with the true images
and the scores of the two controls, the gap, is the part of the score that the images account for. The gap of a model
that ignores its images is 0.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from blip2.backbones.pretrained import load_pickle
from blip2.data.arrays import stack_inputs
from blip2.errors import InputError
from blip2.io import atomic_write

CONTROLS = ("shuffled", "blank")
"""The controls, by the keys of their scores in ``metrics.json``."""
GAPS = {name: f"gap_{name}" for name in CONTROLS}
"""The key of the difference to the score with the true images, by control."""
COLUMNS = ("metric", "true images", *(f"{name} images" for name in CONTROLS), *(f"gap to {name}" for name in CONTROLS))
"""Titles of the columns of :func:`control_rows`."""


def derange(count: int, seed: int) -> list[int]:
    """Draw a permutation that leaves no element in its place: a cycle through all elements in random order.

    Args:
        count: number of elements.
        seed: the seed; the same seed gives the same permutation.

    Raises:
        InputError: there are fewer than two elements.
    """
    if count < 2:
        raise InputError(
            f"the control needs other images for the records, but found {count} usable image, expected at least 2: give"
            " more records, or leave out --control"
        )
    order = np.random.default_rng(seed).permutation(count).tolist()
    donor = [0] * count
    for i, element in enumerate(order):
        donor[element] = order[(i + 1) % count]
    return donor


class FeatureFiles:
    """Features of images, written chunk by chunk and read image by image, so that no image is encoded twice.

    Args:
        folder: folder of the files, which all processes must share.
        chunks: the chunk of each image by the key of the image.
    """

    def __init__(self, folder: Path, chunks: Mapping[int, int]) -> None:
        self._folder, self._chunks = folder, chunks

    def write(self, chunk: int, keys: Sequence[int], features: Float[Tensor, "I P E"], dtype: torch.dtype) -> None:
        """Write the features of those images of `keys` that belong to a chunk.

        Args:
            chunk: the number of the chunk.
            keys: the keys of the images.
            features: their features.
            dtype: data type of the encoder, in which the features are stored if it represents them exactly.
        """
        mine = [i for i, key in enumerate(keys) if self._chunks[key] == chunk]
        features = features[mine].cpu()
        small = features.to(dtype)
        stored = small if torch.equal(small.float(), features) else features
        content = io.BytesIO()
        torch.save({keys[i]: each.clone() for i, each in zip(mine, stored, strict=True)}, content)
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._file(chunk)) as file:
            file.write(content.getbuffer())

    def read(self, keys: Sequence[int]) -> Float[Tensor, "I P E"]:
        """Return the features of images in float32."""
        return stack_inputs([load_pickle(self._file(self._chunks[key]))[key].float() for key in keys])

    def _file(self, chunk: int) -> Path:
        return self._folder / f"{chunk:06}.pt"


def add_control(metrics: Mapping[str, Any], controls: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Add the scores of the controls, and their gaps to the scores with the true images.

    Args:
        metrics: the metrics with the true images.
        controls: the metrics of each of :data:`CONTROLS`. Only scores (floats) that `metrics` has as well are used.

    Returns:
        `metrics` with two further keys for each control: the control's scores, and the gaps.
    """
    out = dict(metrics)
    for name in CONTROLS:
        out[name] = _common(metrics, controls[name], lambda true, control: control)
        out[GAPS[name]] = _common(metrics, controls[name], lambda true, control: true - control)
    return out


def _common(true: Mapping[str, Any], control: Mapping[str, Any], combine: Any) -> dict[str, Any]:
    """Combine each score of `control` with the score of the same name in `true`."""
    out: dict[str, Any] = {}
    for key, value in control.items():
        other = true.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            if nested := _common(other, value, combine):
                out[key] = nested
        elif isinstance(value, float) and isinstance(other, float):
            out[key] = combine(other, value)
    return out


def flatten_scores(scores: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the name and the value of each score. The name of a nested score begins with the names of its groups."""
    for key, value in scores.items():
        if isinstance(value, Mapping):
            yield from flatten_scores(value, f"{prefix}{key} ")
        elif isinstance(value, float):
            yield f"{prefix}{key}", value


def control_rows(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a table with the columns :data:`COLUMNS`, one row for each score that has a control.

    A score that a control does not have is shown as "-". Without controls there are no rows.
    """
    if not set(CONTROLS) <= set(metrics):
        return []
    true = dict(flatten_scores(metrics))
    columns = [dict(flatten_scores(metrics[name])) for name in (*CONTROLS, *GAPS.values())]
    names = dict.fromkeys(name for column in columns for name in column)
    return [
        (name, f"{true[name]:.4f}", *(f"{column[name]:.4f}" if name in column else "-" for column in columns))
        for name in names
    ]

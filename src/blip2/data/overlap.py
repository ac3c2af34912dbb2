"""Check that no held-out image is trained on. Images are compared by path, published id or bytes, without decoding."""

from __future__ import annotations

from collections.abc import Sequence

from blip2.data.benchmarks import check_disjoint
from blip2.data.records import Records, RecordStream
from blip2.distributed import on_rank_0
from blip2.errors import InputError

MAX_HASHED_IMAGES = 10_000
"""Maximum number of images embedded in a table. Larger tables are not compared, because hashing takes too long."""
OpenedSource = tuple[str, str, Records | RecordStream]
"""A data source as (its key in the recipe, such as ``data.train``; the value of the key; the opened records)."""


def check_overlap(train: Sequence[OpenedSource], held_out: Sequence[OpenedSource]) -> list[str]:
    """Check that no held-out image is also a training image. Rank 0 compares; all ranks get the result.

    Two images are the same if their paths are equal, or if they have the same published id (a COCO image id, for
    example), even in different data sets. Images embedded in tables are compared by their bytes. Copies of an image in
    different files are not detected.

    Args:
        train: the sources of training data.
        held_out: the sources of data for validation and evaluation.

    Returns:
        Messages about the pairs of sources that could not be compared.

    Raises:
        InputError: training and held-out data share images.
    """
    return on_rank_0(lambda: [note for one in held_out for other in train for note in _compare(one, other)])


def _compare(held_out: OpenedSource, train: OpenedSource) -> list[str]:
    names = f"{held_out[0]} ({held_out[1]})", f"{train[0]} ({train[1]})"
    for name, (_, _, records) in zip(names, (held_out, train), strict=True):
        reason = None
        if not isinstance(records, Records):
            reason = "a stream"
        elif records.has_embedded_images and len(records) > MAX_HASHED_IMAGES:
            reason = f"a table that holds {len(records)} images"
        if reason is not None:
            return [f"{names[0]} and {names[1]} are not checked for shared images, because {name} is {reason}"]
    one, other = held_out[2], train[2]
    assert isinstance(one, Records) and isinstance(other, Records)
    try:
        check_disjoint(one.image_identifiers(), other.image_identifiers(), names)
    except InputError as error:
        raise InputError(f"{error}, or set data.allow_overlap to true") from error
    return []

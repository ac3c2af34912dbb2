"""Check that no held-out image is trained on. Images are compared by path, number or bytes and are not decoded."""

from __future__ import annotations

from collections.abc import Sequence

from blip2.data.benchmarks import check_disjoint
from blip2.data.records import Records, RecordStream
from blip2.distributed import on_rank_0
from blip2.errors import InputError

MAX_HASHED_IMAGES = 10_000
"""Maximum number of images in a table that are hashed to compare them; more would take too long."""
OpenedSource = tuple[str, str, Records | RecordStream]
"""The recipe key of a data source (``data.train``), its value, and the opened records."""


def check_overlap(train: Sequence[OpenedSource], held_out: Sequence[OpenedSource]) -> list[str]:
    """Check that no held-out image is trained on. Rank 0 compares for all ranks.

    Two images are the same if their paths are equal, or the numbers that publishers gave them, whichever dataset names
    them. Images within tables are compared by their bytes. Copies of an image in different files are not found.

    Returns:
        Messages about sources that could not be compared.

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
            return [f"whether {names[0]} and {names[1]} share images is not checked: {name} is {reason}"]
    one, other = held_out[2], train[2]
    assert isinstance(one, Records) and isinstance(other, Records)
    try:
        check_disjoint(one.image_identifiers(), other.image_identifiers(), names)
    except InputError as error:
        raise InputError(f"{error}, or set data.allow_overlap") from error
    return []

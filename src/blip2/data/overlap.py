"""Whether images that are held out are trained on: told by what they are called, without opening one."""

from __future__ import annotations

from collections.abc import Sequence

from blip2.data.benchmarks import check_disjoint
from blip2.data.records import Records, RecordStream
from blip2.distributed import gather_objects, process_index
from blip2.errors import InputError

DIGESTED = 10_000
"""So many images that lie within a table are read to compare them; of more it would take too long."""
Source = tuple[str, str, Records | RecordStream]
"""The key of a recipe that names some data (``data.train``), what it says, and what was opened."""


def check_overlap(train: Sequence[Source], held_out: Sequence[Source]) -> list[str]:
    """Make sure that no held-out image is trained on. One process looks, for all.

    Images are the same if their paths are, or the numbers that publishers gave them, whichever data set names them;
    those that lie within a table if their bytes are. Two copies of one image in two files are not found.

    Returns:
        Lines that say what could not be compared.

    Raises:
        InputError: they share images.
    """
    said: list[str] = []
    problem = None
    if process_index() == 0:
        try:
            said = [line for one in held_out for other in train for line in _compare(one, other)]
        except InputError as error:
            problem = f"{error}, or set data.allow_overlap"
    problem, said = gather_objects((problem, said))[0]
    if problem is not None:
        raise InputError(problem)
    return said


def _compare(held_out: Source, train: Source) -> list[str]:
    names = f"{held_out[0]} ({held_out[1]})", f"{train[0]} ({train[1]})"
    for name, (_, _, records) in zip(names, (held_out, train), strict=True):
        why = None
        if not isinstance(records, Records):
            why = "a stream"
        elif records.holds_images and len(records) > DIGESTED:
            why = f"a table that holds {len(records)} images"
        if why is not None:
            return [f"whether {names[0]} and {names[1]} share images is not checked: {name} is {why}"]
    one, other = held_out[2], train[2]
    assert isinstance(one, Records) and isinstance(other, Records)
    check_disjoint(one.image_names(), other.image_names(), names)
    return []

"""The order in which a process goes through a source: epoch after epoch, without end and without a gap.

An epoch is all records of the source, each once, over all processes together. A table is shuffled as a whole by (seed,
epoch) and dealt out record by record; a stream is shuffled and dealt out by its shards. What does not fill a batch at
the end of an epoch begins the batch that the next epoch fills up, so nothing is left out. The order is a function of
the seed and the number of processes, and can be entered anywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from blip2.data.records import Record, Records, RecordStream
from blip2.errors import InputError

START: dict[str, Any] = {"since": 0, "taken": 0, "epoch": 0, "stream": None, "batch": 0}
"""The position before the first record.

since: the epoch that a table's `taken` is counted from, and in which a stream is; taken: records that this process has
taken; epoch: the latest that is begun in the window; stream: where in its epoch a stream is; batch: of the window.
"""


@dataclass(frozen=True)
class Item:
    """A record in its place in the order."""

    record: Record | int
    """The record of a stream, or the index of one in a table."""
    epoch: int
    number: int
    """Of the record within its epoch, which no other has."""


@dataclass(frozen=True)
class Chunk:
    """As many items as a batch has, one behind the other, and the position before them."""

    items: list[Item]
    position: dict[str, Any]

    @property
    def epochs(self) -> tuple[int, int]:
        """Those of the first and the last item."""
        return self.items[0].epoch, self.items[-1].epoch


class Windows:
    """The order in windows of up to `largest` chunks, which are shuffled in themselves.

    A window lies within one epoch, or is the one chunk in which an epoch ends and the next begins.
    """

    def __init__(self, chunks: Iterator[Chunk], largest: int) -> None:
        self._chunks = chunks
        self._largest = largest
        self._ahead: deque[Chunk] = deque()

    def take(self) -> list[Chunk]:
        """The next window."""
        window: list[Chunk] = []
        while len(window) < self._largest:
            if not self._ahead:
                self._ahead.append(next(self._chunks))
            if window and self._ahead[0].epochs != window[0].epochs:
                break
            window.append(self._ahead.popleft())
        return window

    def read_ahead(self) -> None:
        """Read a chunk of the next window, so that not all of it has to be waited for at once."""
        if len(self._ahead) < self._largest:
            self._ahead.append(next(self._chunks))


def read_chunks(
    records: Records | RecordStream, size: int, seed: int, process: int, processes: int, position: dict[str, Any]
) -> Iterator[Chunk]:
    """What this process takes, from a position on.

    Raises:
        InputError: while reading: there is nothing for this process.
    """
    read = _table_chunks if isinstance(records, Records) else _stream_chunks
    return read(records, size, seed, process, processes, position)  # pyright: ignore[reportArgumentType]


def _table_chunks(
    records: Records, size: int, seed: int, process: int, processes: int, position: dict[str, Any]
) -> Iterator[Chunk]:
    count = len(records)
    size = min(size, count // processes)  # or a batch would hold records twice
    if size == 0:
        raise InputError(f"{count} records are too few for {processes} processes")
    since, taken = position["since"], position["taken"]
    orders: dict[int, np.ndarray] = {}
    while True:
        places = process + processes * np.arange(taken, taken + size)
        epochs, places = (since + places // count).tolist(), places % count
        for epoch in {epochs[0], epochs[-1]} - set(orders):
            orders = {e: order for e, order in orders.items() if e >= epochs[0]}
            orders[epoch] = _shuffled(records, np.random.default_rng([seed, epoch]))
        numbers = [int(orders[epoch][place]) for epoch, place in zip(epochs, places.tolist(), strict=True)]
        items = [Item(number, epoch, number) for epoch, number in zip(epochs, numbers, strict=True)]
        yield Chunk(items, {**START, "since": since, "taken": taken})
        taken += size


def _shuffled(records: Records, random: np.random.Generator) -> Int[np.ndarray, "N"]:
    """All records in random order; those of a group stay together, of a random share of the groups."""
    order = random.permutation(len(records))
    if records.groups is None:
        return order
    groups = records.groups[order]
    count = int(groups.max()) + 1
    apart = random.random(count)[groups] >= records.group_share
    groups = np.where(apart, count + np.arange(len(order)), groups)
    place = random.permutation(count + len(order))
    return order[np.argsort(place[groups], kind="stable")]


def _stream_chunks(
    records: RecordStream, size: int, seed: int, process: int, processes: int, position: dict[str, Any]
) -> Iterator[Chunk]:
    epoch, taken, start = position["since"], position["taken"], position["stream"]
    reader, number = records.read(start, (seed, epoch)), start["number"] if start else 0
    barren = 0
    while True:
        before = {**START, "since": epoch, "taken": taken, "stream": records.position()}
        items: list[Item] = []
        while len(items) < size:
            record = next(reader, None)
            if record is not None:
                items.append(Item(record, epoch, process + processes * number))
                number += 1
                continue
            barren = 0 if number else barren + 1
            if barren == processes:  # its turn at every share came, and there was nothing
                raise InputError("the data gave this process no records: it is empty or has too few for the processes")
            epoch, number = epoch + 1, 0
            reader = records.read(None, (seed, epoch))
        yield Chunk(items, before)
        taken += size


def next_epoch(positions: list[dict[str, Any]]) -> dict[str, Any]:
    """The start of the first epoch that none of some processes has begun."""
    epoch = max(position["epoch"] for position in positions) + 1
    return {**START, "since": epoch, "epoch": epoch}

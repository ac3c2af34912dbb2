"""The order in which a process goes through a source: epoch after epoch, without end and without a gap.

An epoch is all records of the source, each once, over all processes together. A table is shuffled as a whole by (seed,
epoch) and dealt out record by record; a stream is shuffled and dealt out by its shards. What does not fill a batch at
the end of an epoch begins the batch that the next epoch fills up, so nothing is left out. The order is a function of
the seed and the number of processes, and can be entered anywhere.

A position says which records were taken, and not only how many batches. So a source can be dealt out anew in the midst
of an epoch (:func:`deal_anew`), to batches of another size or to another number of processes: what was taken by any
process is left out, and the rest comes once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from blip2.data.records import Record, Records, RecordStream
from blip2.errors import InputError

START: dict[str, Any] = {
    "since": 0, "taken": 0, "epoch": 0, "left": None, "stream": None, "batch": 0, "seen": ""
}  # fmt: skip
"""The position before the first record.

since: the epoch that a table's places are counted from, and in which a stream is; taken: records that this process has
taken; epoch: the latest that is begun in the window; left: of a table, what comes before its untouched rest; stream:
the stretches of a stream that are yet to be read; batch: of the window; seen: which records of the window were in its
batches so far.
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
    since, taken, places_of = position["since"], position["taken"], _Places(position["left"])
    orders: dict[int, np.ndarray] = {}
    while True:
        numbers = process + processes * np.arange(taken, taken + size)
        places = places_of(numbers)
        epochs, places = (since + places // count).tolist(), places % count
        for epoch in set(epochs) - set(orders):
            orders = {e: order for e, order in orders.items() if e >= epochs[0]}
            orders[epoch] = _shuffled(records, np.random.default_rng([seed, epoch]))
        found = [int(orders[epoch][place]) for epoch, place in zip(epochs, places.tolist(), strict=True)]
        items = [Item(number, epoch, number) for epoch, number in zip(epochs, found, strict=True)]
        yield Chunk(items, {**START, "since": since, "taken": taken, "left": places_of.left(int(numbers[0]))})
        taken += size


class _Places:
    """Places in the order of a table, whose epochs follow each other, by the number in which they are dealt out.

    Args:
        left: None: all places. Else ``mask``: those that come first, as bits from the place ``first`` on; all places
            from ``base`` on follow them.
    """

    def __init__(self, left: dict[str, Any] | None) -> None:
        self._left = left
        self._places = np.empty(0, np.int64)
        self._base = 0
        if left is not None:
            self._places, self._base = left["first"] + np.flatnonzero(from_hex(left["mask"])), left["base"]

    def __len__(self) -> int:
        return len(self._places)

    def __call__(self, numbers: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
        beyond = self._base + numbers - len(self)
        if numbers[0] >= len(self):
            return beyond
        return np.where(numbers < len(self), self._places[np.minimum(numbers, len(self) - 1)], beyond)

    def left(self, number: int) -> dict[str, Any] | None:
        """What is enough to find the places from a number on."""
        if self._left is None or number < len(self):
            return self._left
        return {"first": 0, "mask": "", "base": self._base - len(self)}


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
    epoch, taken = position["since"], position["taken"]
    line = _Line(records, seed, position["stream"] or [_share(process, processes, epoch)])
    while True:
        before = {**START, "since": epoch, "taken": taken, "stream": line.state()}
        items: list[Item] = []
        while len(items) < size:
            item = line.take()
            assert item is not None  # its last stretch has no end
            items.append(item)
            epoch = item.epoch
        yield Chunk(items, before)
        taken += size


# -- stretches of a stream -----------------------------------------------------------------------------------------


class _Line:
    """Stretches of a stream, one behind the other."""

    def __init__(self, records: RecordStream, seed: int, states: Sequence[dict[str, Any]]) -> None:
        self._records, self._seed = records, seed
        self._ahead = deque(states)
        self._now: _Share | _Rest | None = None

    def take(self) -> Item | None:
        """The next record; None at the end."""
        while self._now is not None or self._ahead:
            if self._now is None:
                state = self._ahead.popleft()
                self._now = (_Rest if "of" in state else _Share)(self._records, self._seed, state)
            item = self._now.take()
            if item is not None:
                return item
            self._now = None
        return None

    def state(self) -> list[dict[str, Any]]:
        """What is yet to be read, for JSON."""
        return [*([] if self._now is None else [self._now.state()]), *self._ahead]


def _share(process: int, processes: int, epoch: int) -> dict[str, Any]:
    """The stretch that one of `processes` reads from the start of an epoch on, without end."""
    return {"share": [process, processes], "epoch": epoch, "until": None, "at": None}


class _Share:
    """What one of several processes reads of a stream, epoch after epoch, to the end of the epoch ``until``."""

    def __init__(self, records: RecordStream, seed: int, state: dict[str, Any]) -> None:
        self._records, self._seed = records, seed
        self._process, self._processes = state["share"]
        self._epoch, self._until, self._at = state["epoch"], state["until"], state["at"]
        self._reader: Iterator[Record] | None = None
        self._number = self._barren = 0

    def take(self) -> Item | None:
        while self._until is None or self._epoch <= self._until:
            if self._reader is None:
                share = (self._process, self._processes)
                self._reader = self._records.read(self._at, (self._seed, self._epoch), share)
                self._number = self._at["number"] if self._at else 0
            record = next(self._reader, None)
            if record is not None:
                self._number += 1
                return Item(record, self._epoch, self._process + self._processes * (self._number - 1))
            self._barren = 0 if self._number else self._barren + 1
            if self._barren == self._processes:  # its turn at every share came, and there was nothing
                raise InputError("the data gave this process no records: it is empty or has too few for the processes")
            self._epoch, self._at, self._reader = self._epoch + 1, None, None
        return None

    def state(self) -> dict[str, Any]:
        at = self._at if self._reader is None else self._records.position()
        return {"share": [self._process, self._processes], "epoch": self._epoch, "until": self._until, "at": at}


class _Rest:
    """What some processes had not taken when a stream was dealt out anew.

    It is read one process's after the other's; of those that share it, each takes the records of its ``turn``.
    """

    def __init__(self, records: RecordStream, seed: int, state: dict[str, Any]) -> None:
        self._records, self._seed = records, seed
        self._of = deque(state["of"])
        self._turn, self._count = state["turn"], state["count"]
        self._line: _Line | None = None
        self._seen: deque[bool] = deque()

    def take(self) -> Item | None:
        while self._line is not None or self._of:
            if self._line is None:
                state = self._of.popleft()
                self._line, self._seen = _Line(self._records, self._seed, state["line"]), deque(from_hex(state["seen"]))
            item = self._line.take()
            if item is None:
                self._line = None
            elif not (self._seen and self._seen.popleft()):
                self._count += 1
                if (self._count - 1) % self._turn[1] == self._turn[0]:
                    return item
        return None

    def state(self) -> dict[str, Any]:
        now = [] if self._line is None else [{"line": self._line.state(), "seen": to_hex(np.array(self._seen, bool))}]
        return {"of": [*now, *self._of], "turn": self._turn, "count": self._count}


# -- going on in another way ---------------------------------------------------------------------------------------


def deal_anew(
    records: Records | RecordStream, positions: Sequence[dict[str, Any]], process: int, processes: int
) -> dict[str, Any]:
    """The position of one of `processes` that go on where others were, whatever the sizes of their batches.

    Args:
        positions: of all processes that there were. What none of them has taken is dealt out to those of now.
    """
    if isinstance(records, Records):
        return _deal_table(len(records), positions)
    until = max(position["epoch"] for position in positions)
    fewest = min(len(positions), processes)
    group = process % fewest
    of = []
    for old in range(group, len(positions), fewest):
        line = positions[old]["stream"] or [_share(old, len(positions), positions[old]["since"])]
        of.append({"line": [*line[:-1], {**line[-1], "until": until}], "seen": positions[old]["seen"]})
    turn = [process // fewest, len(range(group, processes, fewest))]
    stream = [{"of": of, "turn": turn, "count": 0}, _share(process, processes, until + 1)]
    return {**START, "since": until, "epoch": until, "stream": stream}


def _deal_table(count: int, positions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The position from which all processes go on in a table; its numbers are those of :class:`_Places`."""
    processes = len(positions)
    left = [position["left"] for position in positions if position["left"] is not None]
    places_of = _Places(max(left, key=lambda each: len(each["mask"]), default=None))
    windows = [(position["taken"], from_hex(position["seen"])) for position in positions]
    first = min(process + processes * taken for process, (taken, _) in enumerate(windows))
    end = max(len(places_of), *(processes * (taken + len(seen)) for taken, seen in windows))
    untaken = np.ones(max(end - first, 0), bool)
    for process, (taken, seen) in enumerate(windows):
        before = process + processes * np.arange(first // processes, taken)
        within = process + processes * (taken + np.flatnonzero(seen))
        numbers = np.concatenate([before, within]) - first
        untaken[numbers[numbers >= 0]] = False
    places = places_of(first + np.flatnonzero(untaken)) if untaken.any() else np.empty(0, np.int64)
    base = int(places_of(np.array([max(first, end)]))[0])
    start = int(places[0]) if len(places) else base
    whole = start // count * count  # epochs that are over
    mask = np.zeros(base - start, bool)
    mask[places - start] = True
    return {
        **START,
        "since": positions[0]["since"] + whole // count,
        "epoch": max(position["epoch"] for position in positions),
        "left": {"first": start - whole, "mask": to_hex(mask), "base": base - whole},
    }


def next_epoch(positions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The start of the first epoch that none of some processes has begun."""
    epoch = max(position["epoch"] for position in positions) + 1
    return {**START, "since": epoch, "epoch": epoch}


def to_hex(bits: np.ndarray) -> str:
    """Bits as hexadecimal digits, filled up with zeros."""
    return np.packbits(bits).tobytes().hex()


def from_hex(digits: str) -> np.ndarray:
    """The bits of :func:`to_hex`, with the zeros behind them."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8)).astype(bool)

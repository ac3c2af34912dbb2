"""Sampling: the order in which each process reads the data, cut into batches.

An epoch contains every record of a data set exactly once, over all processes together. A table is shuffled as a whole
by (seed, epoch) and distributed record by record; a stream is shuffled and distributed by its shards. Records that do
not fill a batch at the end of an epoch start the batch that the next epoch completes, so no record is dropped. All
randomness is a function of (seed, epoch, record number): the batches do not depend on the number of worker processes,
and sampling can resume after any batch.

A position stores which records were consumed, not only how many batches. A data set can therefore be redistributed
within an epoch (:func:`reshard`), to another batch size or another number of processes: records that any process has
consumed are left out, and the others come exactly once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from blip2.data.records import Record, Records, RecordStream
from blip2.errors import InputError

WINDOW = 50
"""Number of batches that are shuffled together and sorted by length among themselves."""
START: dict[str, Any] = {
    "since": 0, "taken": 0, "epoch": 0, "left": None, "stream": None, "batch": 0, "seen": ""
}  # fmt: skip
"""The position before the first record. Checkpoints store positions as JSON.

since: the epoch from which the places of a table are counted, and the current epoch of a stream; taken: number of
records that this process has consumed; epoch: the latest epoch in the window; left: the places of a table that remain
from before it was resharded; stream: the segments of a stream that remain to be read; batch: number of batches of the
window that were consumed; seen: bit mask of the records in these batches.
"""


@dataclass(frozen=True)
class SampleSpec:
    """A training example to be loaded."""

    record: Record | int
    """A record of a stream, or the index of a record in a table."""
    seed: tuple[int, int, int]
    """(seed, epoch, number of the record within the epoch): determines the caption and the augmentation."""
    caption_index: int = -1
    """Index of the caption among those of the record; -1 if it has none."""


@dataclass(frozen=True)
class BatchSpec:
    """A batch to be loaded."""

    samples: tuple[SampleSpec, ...]
    position: dict[str, Any]
    """Position in the data after this batch."""
    source_index: int = 0
    """Index of the source in a mixture."""


def sample_batches(
    records: Records | RecordStream,
    batch_size: int,
    seed: int,
    group_by_length: bool = True,
    rank: int = 0,
    world_size: int = 1,
    position: dict[str, Any] | None = None,
) -> Iterator[BatchSpec]:
    """Yield batches without end, epoch after epoch; each epoch contains every record once.

    The samples of :data:`WINDOW` batches are sorted by the length of their captions and cut into batches, which are
    then shuffled.

    Args:
        batch_size: number of records per batch in each process. If a table has fewer records per process, a batch
            contains all of them.
        group_by_length: put captions of similar length into one batch. Answers to questions and grouped records are
            never sorted.
        rank, world_size: the share of a table to read. A stream was sharded when it was opened.
        position: of a :class:`BatchSpec`; sampling resumes after that batch. ``None``: the start.

    Raises:
        InputError: while iterating, if there are no records for this process.
    """
    position = position or START
    settings = {
        "order": order_settings(records, seed),
        "deal": batch_settings(records, batch_size, group_by_length, world_size),
    }
    read: Any = _read_table if isinstance(records, Records) else _read_stream
    windows = _ShuffleWindows(read(records, batch_size, seed, rank, world_size, position), WINDOW)
    done = position["batch"]
    while True:
        window = windows.next()
        size, start = len(window[0].samples), window[0].position
        rng = np.random.default_rng([seed, start["since"], start["taken"], rank])
        samples, lengths = _choose_captions(records, [sample for batch in window for sample in batch.samples])
        order = rng.permutation(len(samples))
        grouped = isinstance(records, Records) and records.group_ids is not None
        if grouped:  # records already come in the order of their groups
            order = np.arange(len(samples))
        # Sorted by length, a batch would hold one answer only, which teaches its frequency and nothing about images.
        if group_by_length and not records.has_questions and not grouped:  # captions of equal length stay shuffled
            order = order[np.argsort(_fill_zero_lengths(lengths, rng)[order], kind="stable")]
        batches = order.reshape(-1, size)
        # A group that is spread over several processes must be in the same step of all of them.
        batch_order = np.arange(len(batches)) if grouped else rng.permutation(len(batches))
        seen = np.zeros(len(samples), bool)
        for number, batch in enumerate(batch_order):
            windows.prefetch()
            seen[batches[batch]] = True
            if number < done:
                continue
            after = {
                **start,
                "epoch": _epochs(window[-1])[1],
                "batch": number + 1,
                "seen": bits_to_hex(seen),
                **settings,
            }
            yield BatchSpec(tuple(samples[i] for i in batches[batch]), after)
        done = 0


def sequential_batches(records: Records, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[BatchSpec]:
    """Yield every record once, in order, with its first caption; every `world_size`-th record belongs to this rank."""
    own = range(rank, len(records), world_size)
    for start in range(0, len(own), batch_size):
        indices = own[start : start + batch_size]
        captions = records.captions(indices)
        yield BatchSpec(
            tuple(SampleSpec(i, (0, 0, i), 0 if c else -1) for i, c in zip(indices, captions, strict=True)), {}
        )


def order_settings(records: Records | RecordStream, seed: int) -> dict[str, Any]:
    """Return everything that determines the order of records. A position becomes invalid when it changes."""
    return {"seed": seed, **records.order_params}


def batch_settings(
    records: Records | RecordStream, batch_size: int, group_by_length: bool, world_size: int
) -> dict[str, Any]:
    """Return everything that determines how ordered records become the batches of all processes."""
    return {
        "batch_size": batch_size, "processes": world_size, "group_by_length": group_by_length, "window": WINDOW,
        "caption_column": records.caption_column,
    }  # fmt: skip


def _choose_captions(
    records: Records | RecordStream, samples: Sequence[SampleSpec]
) -> tuple[list[SampleSpec], list[int]]:
    """Choose a caption for each sample; return the samples and the lengths of their captions in characters."""
    if isinstance(records, Records):
        captions = records.captions([sample.record for sample in samples if isinstance(sample.record, int)])
    else:
        captions = [sample.record.captions for sample in samples if isinstance(sample.record, Record)]
    chosen, lengths = [], []
    for sample, choices in zip(samples, captions, strict=True):
        index = int(np.random.default_rng(sample.seed).integers(len(choices))) if choices else -1
        chosen.append(replace(sample, caption_index=index))
        lengths.append(len(choices[index]) if choices else 0)
    return chosen, lengths


def _fill_zero_lengths(lengths: Sequence[int], rng: np.random.Generator) -> Int[np.ndarray, "N"]:
    """Replace zeros by lengths of random captions, so that records without a caption do not share a batch."""
    filled = np.array(lengths)
    empty = filled == 0
    if not empty.all():
        filled[empty] = rng.choice(filled[~empty], empty.sum())
    return filled


def _epochs(batch: BatchSpec) -> tuple[int, int]:
    """Return the epochs of the first and the last sample of a batch in reading order."""
    return batch.samples[0].seed[1], batch.samples[-1].seed[1]


class _ShuffleWindows:
    """Splits batches in reading order into windows of up to `max_batches` batches.

    A window lies within one epoch, or consists of the single batch in which one epoch ends and the next begins.
    """

    def __init__(self, batches: Iterator[BatchSpec], max_batches: int) -> None:
        self._batches = batches
        self._max_batches = max_batches
        self._ahead: deque[BatchSpec] = deque()

    def next(self) -> list[BatchSpec]:
        window: list[BatchSpec] = []
        while len(window) < self._max_batches:
            if not self._ahead:
                self._ahead.append(next(self._batches))
            if window and _epochs(self._ahead[0]) != _epochs(window[0]):
                break
            window.append(self._ahead.popleft())
        return window

    def prefetch(self) -> None:
        """Read one batch of the next window, which spreads the time that reading a window takes."""
        if len(self._ahead) < self._max_batches:
            self._ahead.append(next(self._batches))


# -- reading order -------------------------------------------------------------------------------------------------


# Both functions yield the records of this process in reading order, each batch with the position *before* it.


def _read_table(
    records: Records, size: int, seed: int, rank: int, world_size: int, position: dict[str, Any]
) -> Iterator[BatchSpec]:
    count = len(records)
    size = min(size, count // world_size)  # otherwise a batch would contain a record twice
    if size == 0:
        raise InputError(
            f"{count} records are too few for {world_size} processes, expected one for each: use fewer processes"
        )
    base_epoch, consumed, places_of = position["since"], position["taken"], _Places(position["left"])
    orders: dict[int, np.ndarray] = {}
    while True:
        numbers = rank + world_size * np.arange(consumed, consumed + size)
        places = places_of(numbers)
        epochs, places = (base_epoch + places // count).tolist(), places % count
        for epoch in set(epochs) - set(orders):
            orders = {e: order for e, order in orders.items() if e >= epochs[0]}
            orders[epoch] = _shuffled(records, np.random.default_rng([seed, epoch]))
        indices = [int(orders[epoch][place]) for epoch, place in zip(epochs, places.tolist(), strict=True)]
        samples = tuple(SampleSpec(i, (seed, epoch, i)) for epoch, i in zip(epochs, indices, strict=True))
        remaining = places_of.remaining(int(numbers[0]))
        yield BatchSpec(samples, {**START, "since": base_epoch, "taken": consumed, "left": remaining})
        consumed += size


class _Places:
    """Maps the numbers in which records are distributed to places in the concatenated epochs of a table.

    Args:
        remaining: ``None``: number i is place i. Otherwise the first numbers are the places in ``mask``, a bit mask
            that starts at the place ``first``; all places from ``base`` on follow them.
    """

    def __init__(self, remaining: dict[str, Any] | None) -> None:
        self._remaining = remaining
        self._places = np.empty(0, np.int64)
        self._base = 0
        if remaining is not None:
            self._places = remaining["first"] + np.flatnonzero(hex_to_bits(remaining["mask"]))
            self._base = remaining["base"]

    def __len__(self) -> int:
        return len(self._places)

    def __call__(self, numbers: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
        beyond = self._base + numbers - len(self)
        if numbers[0] >= len(self):
            return beyond
        return np.where(numbers < len(self), self._places[np.minimum(numbers, len(self) - 1)], beyond)

    def remaining(self, number: int) -> dict[str, Any] | None:
        """Return arguments that map every number from `number` on to the same place."""
        if self._remaining is None or number < len(self):
            return self._remaining
        return {"first": 0, "mask": "", "base": self._base - len(self)}


def _shuffled(records: Records, rng: np.random.Generator) -> Int[np.ndarray, "N"]:
    """Return all indices in random order, in which a random ``group_share`` of the groups stay together."""
    order = rng.permutation(len(records))
    if records.group_ids is None:
        return order
    groups = records.group_ids[order]
    count = int(groups.max()) + 1
    apart = rng.random(count)[groups] >= records.group_share
    groups = np.where(apart, count + np.arange(len(order)), groups)
    place = rng.permutation(count + len(order))
    return order[np.argsort(place[groups], kind="stable")]


def _read_stream(
    records: RecordStream, size: int, seed: int, rank: int, world_size: int, position: dict[str, Any]
) -> Iterator[BatchSpec]:
    epoch, consumed = position["since"], position["taken"]
    segments = _Segments(records, seed, position["stream"] or [_shard_state(rank, world_size, epoch)])
    while True:
        before = {**START, "since": epoch, "taken": consumed, "stream": segments.state()}
        samples: list[SampleSpec] = []
        while len(samples) < size:
            sample = segments.next()
            assert sample is not None  # the last segment has no end
            samples.append(sample)
            epoch = sample.seed[1]
        yield BatchSpec(tuple(samples), before)
        consumed += size


class _Segments:
    """The segments of a stream that a process reads, one after the other."""

    def __init__(self, records: RecordStream, seed: int, states: Sequence[dict[str, Any]]) -> None:
        self._records, self._seed = records, seed
        self._ahead = deque(states)
        self._current: _Shard | _Remainder | None = None

    def next(self) -> SampleSpec | None:
        """Return the next record, or ``None`` at the end."""
        while self._current is not None or self._ahead:
            if self._current is None:
                state = self._ahead.popleft()
                self._current = (_Remainder if "of" in state else _Shard)(self._records, self._seed, state)
            sample = self._current.next()
            if sample is not None:
                return sample
            self._current = None
        return None

    def state(self) -> list[dict[str, Any]]:
        """Return what remains to be read, for JSON."""
        return [*([] if self._current is None else [self._current.state()]), *self._ahead]


def _shard_state(rank: int, world_size: int, epoch: int) -> dict[str, Any]:
    """Return the state of a :class:`_Shard` without end that starts with an epoch."""
    return {"share": [rank, world_size], "epoch": epoch, "until": None, "at": None}


class _Shard:
    """The records of a stream that belong to one rank, epoch after epoch, up to and including the epoch ``until``."""

    def __init__(self, records: RecordStream, seed: int, state: dict[str, Any]) -> None:
        self._records, self._seed = records, seed
        self._rank, self._world_size = state["share"]
        self._epoch, self._until, self._at = state["epoch"], state["until"], state["at"]
        self._reader: Iterator[Record] | None = None
        self._number = self._empty_epochs = 0

    def next(self) -> SampleSpec | None:
        while self._until is None or self._epoch <= self._until:
            if self._reader is None:
                share = (self._rank, self._world_size)
                self._reader = self._records.read(self._at, (self._seed, self._epoch), share)
                self._number = self._at["number"] if self._at else 0
            record = next(self._reader, None)
            if record is not None:
                self._number += 1
                number = self._rank + self._world_size * (self._number - 1)  # unique within the epoch
                return SampleSpec(record, (self._seed, self._epoch, number))
            self._empty_epochs = 0 if self._number else self._empty_epochs + 1
            if self._empty_epochs == self._world_size:  # it had the shards of every rank once, and all were empty
                raise InputError(
                    "the data gave this process no records, expected one at least: add data or use fewer processes"
                )
            self._epoch, self._at, self._reader = self._epoch + 1, None, None
        return None

    def state(self) -> dict[str, Any]:
        at = self._at if self._reader is None else self._records.position()
        return {"share": [self._rank, self._world_size], "epoch": self._epoch, "until": self._until, "at": at}


class _Remainder:
    """Records that some ranks had not consumed when a stream was resharded.

    The ranks that share a remainder all read it rank by rank, and each keeps the records of its ``turn``.
    """

    def __init__(self, records: RecordStream, seed: int, state: dict[str, Any]) -> None:
        self._records, self._seed = records, seed
        self._of = deque(state["of"])
        self._turn, self._count = state["turn"], state["count"]
        self._segments: _Segments | None = None
        self._seen: deque[bool] = deque()

    def next(self) -> SampleSpec | None:
        while self._segments is not None or self._of:
            if self._segments is None:
                state = self._of.popleft()
                self._segments = _Segments(self._records, self._seed, state["line"])
                self._seen = deque(hex_to_bits(state["seen"]))
            sample = self._segments.next()
            if sample is None:
                self._segments = None
            elif not (self._seen and self._seen.popleft()):
                self._count += 1
                if (self._count - 1) % self._turn[1] == self._turn[0]:
                    return sample
        return None

    def state(self) -> dict[str, Any]:
        current = []
        if self._segments is not None:
            current = [{"line": self._segments.state(), "seen": bits_to_hex(np.array(self._seen, bool))}]
        return {"of": [*current, *self._of], "turn": self._turn, "count": self._count}


# -- resuming with other settings ----------------------------------------------------------------------------------


def reshard(
    records: Records | RecordStream, positions: Sequence[dict[str, Any]], rank: int, world_size: int
) -> dict[str, Any]:
    """Return the position from which a rank continues in the same epoch with another batch size or world size.

    Args:
        positions: of all former ranks. The records that none of them has consumed are distributed to the new ranks.
    """
    if isinstance(records, Records):
        return _reshard_table(len(records), positions)
    until = max(position["epoch"] for position in positions)
    num_groups = min(len(positions), world_size)
    group = rank % num_groups
    of = []
    for old in range(group, len(positions), num_groups):
        line = positions[old]["stream"] or [_shard_state(old, len(positions), positions[old]["since"])]
        of.append({"line": [*line[:-1], {**line[-1], "until": until}], "seen": positions[old]["seen"]})
    turn = [rank // num_groups, len(range(group, world_size, num_groups))]
    stream = [{"of": of, "turn": turn, "count": 0}, _shard_state(rank, world_size, until + 1)]
    return {**START, "since": until, "epoch": until, "stream": stream}


def _reshard_table(count: int, positions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the position from which all ranks continue in a table of `count` records."""
    world_size = len(positions)
    remaining = [position["left"] for position in positions if position["left"] is not None]
    places_of = _Places(max(remaining, key=lambda each: len(each["mask"]), default=None))
    windows = [(position["taken"], hex_to_bits(position["seen"])) for position in positions]
    first = min(rank + world_size * consumed for rank, (consumed, _) in enumerate(windows))
    end = max(len(places_of), *(world_size * (consumed + len(seen)) for consumed, seen in windows))
    unconsumed = np.ones(max(end - first, 0), bool)
    for rank, (consumed, seen) in enumerate(windows):
        before = rank + world_size * np.arange(first // world_size, consumed)
        within = rank + world_size * (consumed + np.flatnonzero(seen))
        numbers = np.concatenate([before, within]) - first
        unconsumed[numbers[numbers >= 0]] = False
    places = places_of(first + np.flatnonzero(unconsumed)) if unconsumed.any() else np.empty(0, np.int64)
    base = int(places_of(np.array([max(first, end)]))[0])
    start = int(places[0]) if len(places) else base
    completed = start // count * count  # places of the epochs that are complete
    mask = np.zeros(base - start, bool)
    mask[places - start] = True
    return {
        **START,
        "since": positions[0]["since"] + completed // count,
        "epoch": max(position["epoch"] for position in positions),
        "left": {"first": start - completed, "mask": bits_to_hex(mask), "base": base - completed},
    }


def skip_to_next_epoch(positions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the start of the first epoch that none of the given positions has reached."""
    epoch = max(position["epoch"] for position in positions) + 1
    return {**START, "since": epoch, "epoch": epoch}


def bits_to_hex(bits: np.ndarray) -> str:
    """Encode booleans as hexadecimal digits; the last byte is padded with zeros."""
    return np.packbits(bits).tobytes().hex()


def hex_to_bits(digits: str) -> Bool[np.ndarray, "N"]:
    """Decode :func:`bits_to_hex`, including the padding."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8)).astype(bool)

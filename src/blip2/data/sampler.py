"""Sampling: divide the records of a source among the processes, in random order, and group them into batches.

In an epoch, every record of a source is read exactly once by one of the processes. A table is shuffled as a whole by
(seed, epoch) and its records are distributed one by one. A stream is shuffled and distributed by its shards. If the
last records of an epoch do not fill a batch, the first records of the next epoch complete the batch, so no record is
dropped. All randomness is a function of the seed and the position in the data. The batches therefore do not depend on
the number of worker processes that load data, and sampling can resume after any batch.

A position (:class:`~blip2.data.positions.SourcePosition`) identifies the records that were consumed. After a change of
the batch size or of the number of processes, :func:`reshard`, called by
:func:`~blip2.data.mixtures.resume_mixture`, redistributes the remaining records of the epoch, so that every record is
still read exactly once per epoch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Int

from blip2.data.positions import (
    START,
    FormerRank,
    RankSegment,
    RemainingRecords,
    ReshardedSegment,
    SourcePosition,
    bits_to_hex,
    hex_to_bits,
)
from blip2.data.records import Record, Records, RecordStream
from blip2.errors import InputError

WINDOW = 50
"""Number of batches in a window. The records of a window are shuffled and, by default, sorted by caption length."""

PositionT = TypeVar("PositionT")


@dataclass(frozen=True)
class SampleSpec:
    """A training example to be loaded."""

    record: Record | int
    """For a stream: the record. For a table: its index."""
    seed: tuple[int, int, int]
    """(seed, epoch, number of the record within the epoch): determines the caption and the augmentation."""
    caption_index: int = -1
    """Index of the caption among the captions of the record; -1 if the record has no caption."""


@dataclass(frozen=True)
class BatchSpec(Generic[PositionT]):
    """A batch to be loaded."""

    samples: tuple[SampleSpec, ...]
    position: PositionT
    """Position in the data after this batch: a :class:`~blip2.data.positions.SourcePosition` or a
    :class:`~blip2.data.positions.MixturePosition`; ``None`` for batches that are read in order."""
    source_index: int = 0
    """Index of the source in a mixture."""


def sample_batches(
    records: Records | RecordStream,
    batch_size: int,
    seed: int,
    group_by_length: bool = True,
    rank: int = 0,
    world_size: int = 1,
    position: SourcePosition | None = None,
) -> Iterator[BatchSpec[SourcePosition]]:
    """Yield batches without end, epoch after epoch.

    The samples of a window of up to :data:`WINDOW` batches are shuffled or sorted by caption length and divided into
    batches. The batches of the window are then shuffled.

    Args:
        records: a table, or a stream that was opened for `rank` and `world_size`.
        batch_size: number of records per batch in each process. If a table has fewer than `batch_size` records per
            process, the size of the batches is the number of records per process, rounded down.
        seed: seed of the order, the choice of captions and the augmentation.
        group_by_length: put captions of similar length into the same batch. Has no effect on records with questions and
            on a table with a group column.
        rank: rank of this process.
        world_size: number of processes.
        position: the position of the :class:`BatchSpec` after which to resume; ``None``: the start.

    Raises:
        InputError: while iterating, if there are no records for this process or a stream cannot be read.
    """
    position = position or START
    order, batching = order_settings(records, seed), batch_settings(records, batch_size, group_by_length, world_size)
    read: Any = _read_table if isinstance(records, Records) else _read_stream
    windows = _ShuffleWindows(read(records, batch_size, seed, rank, world_size, position), WINDOW)
    consumed_batches = position["batch_offset"]
    while True:
        window = windows.next()
        size, start = len(window[0].samples), window[0].position
        rng = np.random.default_rng([seed, start["base_epoch"], start["consumed"], rank])
        samples, lengths = _choose_captions(records, [sample for batch in window for sample in batch.samples])
        sample_order = rng.permutation(len(samples))
        grouped = isinstance(records, Records) and records.group_ids is not None
        if grouped:  # the records are already in the order of their groups
            sample_order = np.arange(len(samples))
        # Answers are not sorted by length: a batch would contain a single answer many times, from which the model would
        # learn how frequent the answer is, and nothing about the images.
        if group_by_length and not records.has_questions and not grouped:
            filled = _fill_zero_lengths(lengths, rng)
            sample_order = sample_order[np.argsort(filled[sample_order], kind="stable")]  # equal lengths stay shuffled
        batches = sample_order.reshape(-1, size)
        # The records of a group may be divided among processes, which must read them in the same step.
        batch_order = np.arange(len(batches)) if grouped else rng.permutation(len(batches))
        consumed = np.zeros(len(samples), bool)
        for number, batch in enumerate(batch_order):
            windows.prefetch()
            consumed[batches[batch]] = True
            if number < consumed_batches:
                continue
            after: SourcePosition = {
                **start,
                "last_epoch": _epochs(window[-1])[1],
                "batch_offset": number + 1,
                "consumed_mask": bits_to_hex(consumed),
                "order_settings": order,
                "batch_settings": batching,
            }
            yield BatchSpec(tuple(samples[i] for i in batches[batch]), after)
        consumed_batches = 0


def sequential_batches(
    records: Records, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[BatchSpec[None]]:
    """Yield batches with the records of a table in order, each once and with its first caption.

    Args:
        records: the table.
        batch_size: number of records per batch; the last batch may have fewer.
        rank: rank of this process, which reads every `world_size`-th record, starting with the record `rank`.
        world_size: number of processes.
    """
    own = range(rank, len(records), world_size)
    for start in range(0, len(own), batch_size):
        indices = own[start : start + batch_size]
        captions = records.captions(indices)
        samples = (SampleSpec(i, (0, 0, i), 0 if c else -1) for i, c in zip(indices, captions, strict=True))
        yield BatchSpec(tuple(samples), None)


def order_settings(records: Records | RecordStream, seed: int) -> dict[str, Any]:
    """Return the settings that determine the order of the records, by name. If one of them changes, a position in the
    current epoch cannot be used any more."""
    return {"seed": seed, **records.order_params}


def batch_settings(
    records: Records | RecordStream, batch_size: int, group_by_length: bool, world_size: int
) -> dict[str, Any]:
    """Return the settings that determine how ordered records become the batches of all processes, by name. If one of
    them changes, the remaining records of the current epoch have to be redistributed (:func:`reshard`)."""
    return {
        "batch_size": batch_size, "processes": world_size, "group_by_length": group_by_length, "window": WINDOW,
        "caption_column": records.caption_column,
    }  # fmt: skip


def _choose_captions(
    records: Records | RecordStream, samples: Sequence[SampleSpec]
) -> tuple[list[SampleSpec], list[int]]:
    """Choose a caption for each sample at random.

    Returns:
        The samples with their ``caption_index``, and the lengths of the chosen captions in characters; 0 without one.
    """
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
    """Replace zeros by lengths of random captions, so that records without a caption are spread over the batches."""
    filled = np.array(lengths)
    empty = filled == 0
    if not empty.all():
        filled[empty] = rng.choice(filled[~empty], empty.sum())
    return filled


def _epochs(batch: BatchSpec[Any]) -> tuple[int, int]:
    """Return the epoch of the first sample and the epoch of the last sample of a batch in reading order."""
    return batch.samples[0].seed[1], batch.samples[-1].seed[1]


class _ShuffleWindows:
    """Splits batches in reading order into windows of up to `max_batches` batches.

    All batches of a window contain the same epochs: one epoch, or the end of an epoch and the start of the next.
    """

    def __init__(self, batches: Iterator[BatchSpec[SourcePosition]], max_batches: int) -> None:
        self._batches = batches
        self._max_batches = max_batches
        self._ahead: deque[BatchSpec[SourcePosition]] = deque()

    def next(self) -> list[BatchSpec[SourcePosition]]:
        window: list[BatchSpec[SourcePosition]] = []
        while len(window) < self._max_batches:
            if not self._ahead:
                self._ahead.append(next(self._batches))
            if window and _epochs(self._ahead[0]) != _epochs(window[0]):
                break
            window.append(self._ahead.popleft())
        return window

    def prefetch(self) -> None:
        """Read one batch of the next window. Called for each batch, so that no step waits for a whole window."""
        if len(self._ahead) < self._max_batches:
            self._ahead.append(next(self._batches))


# -- reading order -------------------------------------------------------------------------------------------------


# _read_table and _read_stream yield the records of this process in reading order, as batches. The position of a batch
# is the position before the batch, not after it.


def _read_table(
    records: Records, size: int, seed: int, rank: int, world_size: int, position: SourcePosition
) -> Iterator[BatchSpec[SourcePosition]]:
    count = len(records)
    size = min(size, count // world_size)  # otherwise a batch would contain a record twice
    if size == 0:
        raise InputError(
            f"the data has {count} records for {world_size} processes, expected at least one for each process: use"
            " fewer processes or add data"
        )
    base_epoch, consumed, offsets_of = position["base_epoch"], position["consumed"], _DrawOffsets(position["remaining"])
    orders: dict[int, np.ndarray] = {}
    while True:
        draws = rank + world_size * np.arange(consumed, consumed + size)
        offsets = offsets_of(draws)
        epochs, offsets = (base_epoch + offsets // count).tolist(), offsets % count
        for epoch in set(epochs) - set(orders):
            orders = {e: order for e, order in orders.items() if e >= epochs[0]}
            orders[epoch] = _shuffled(records, np.random.default_rng([seed, epoch]))
        indices = [int(orders[epoch][offset]) for epoch, offset in zip(epochs, offsets.tolist(), strict=True)]
        samples = tuple(SampleSpec(i, (seed, epoch, i)) for epoch, i in zip(epochs, indices, strict=True))
        remaining = offsets_of.remaining(int(draws[0]))
        yield BatchSpec(samples, {**START, "base_epoch": base_epoch, "consumed": consumed, "remaining": remaining})
        consumed += size


class _DrawOffsets:
    """Maps the draws of a table to offsets.

    Draw i is the i-th record that is distributed, and belongs to rank i % world_size. Offsets are indices into the
    concatenated epochs (see :class:`~blip2.data.positions.RemainingRecords`).

    Args:
        remaining: the records that are distributed; ``None``: all, so that draw i has offset i.
    """

    def __init__(self, remaining: RemainingRecords | None) -> None:
        self._remaining = remaining
        self._offsets = np.empty(0, np.int64)
        self._tail_offset = 0
        if remaining is not None:
            self._offsets = remaining["mask_offset"] + np.flatnonzero(hex_to_bits(remaining["mask"]))
            self._tail_offset = remaining["tail_offset"]

    def __len__(self) -> int:
        """Return the number of records in the mask."""
        return len(self._offsets)

    def __call__(self, draws: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
        """Return the offsets of increasing draws."""
        in_tail = self._tail_offset + draws - len(self)
        if draws[0] >= len(self):
            return in_tail
        return np.where(draws < len(self), self._offsets[np.minimum(draws, len(self) - 1)], in_tail)

    def remaining(self, draw: int) -> RemainingRecords | None:
        """Return the argument with which a new instance maps `draw` and all later draws to the offsets of this one.

        If all records of the mask come before `draw`, the mask of the result is empty. ``None``: all records are
        distributed.
        """
        if self._remaining is None or draw < len(self):
            return self._remaining
        return {"mask_offset": 0, "mask": "", "tail_offset": self._tail_offset - len(self)}


def _shuffled(records: Records, rng: np.random.Generator) -> Int[np.ndarray, "N"]:
    """Return all indices in random order, with the fraction ``group_share`` of the groups kept together."""
    order = rng.permutation(len(records))
    if records.group_ids is None:
        return order
    groups = records.group_ids[order]
    num_groups = int(groups.max()) + 1
    is_split = rng.random(num_groups)[groups] >= records.group_share
    groups = np.where(is_split, num_groups + np.arange(len(order)), groups)
    group_order = rng.permutation(num_groups + len(order))
    return order[np.argsort(group_order[groups], kind="stable")]


def _read_stream(
    records: RecordStream, size: int, seed: int, rank: int, world_size: int, position: SourcePosition
) -> Iterator[BatchSpec[SourcePosition]]:
    epoch, consumed = position["base_epoch"], position["consumed"]
    segments = _SegmentsReader(records, seed, position["segments"] or [_rank_segment(rank, world_size, epoch)])
    while True:
        before: SourcePosition = {
            **START, "base_epoch": epoch, "consumed": consumed, "segments": segments.remaining()
        }  # fmt: skip
        samples: list[SampleSpec] = []
        while len(samples) < size:
            sample = segments.next()
            assert sample is not None  # the last segment has no end
            samples.append(sample)
            epoch = sample.seed[1]
        yield BatchSpec(tuple(samples), before)
        consumed += size


class _SegmentsReader:
    """Reads segments of a stream one after the other."""

    def __init__(self, records: RecordStream, seed: int, segments: Sequence[RankSegment | ReshardedSegment]) -> None:
        self._records, self._seed = records, seed
        self._ahead = deque(segments)
        self._current: _RankReader | _ReshardedReader | None = None

    def next(self) -> SampleSpec | None:
        """Return the next record, or ``None`` at the end of the last segment."""
        while self._current is not None or self._ahead:
            if self._current is None:
                segment = self._ahead.popleft()
                if "former_ranks" in segment:
                    self._current = _ReshardedReader(self._records, self._seed, segment)
                else:
                    self._current = _RankReader(self._records, self._seed, segment)
            sample = self._current.next()
            if sample is not None:
                return sample
            self._current = None
        return None

    def remaining(self) -> list[RankSegment | ReshardedSegment]:
        """Return the segments that remain to be read, starting with the rest of the current segment."""
        return [*([] if self._current is None else [self._current.remaining()]), *self._ahead]


def _rank_segment(rank: int, world_size: int, epoch: int) -> RankSegment:
    """Return a segment without end that starts with an epoch."""
    return {"rank": rank, "world_size": world_size, "epoch": epoch, "last_epoch": None, "stream_position": None}


class _RankReader:
    """Reads a :class:`~blip2.data.positions.RankSegment`."""

    def __init__(self, records: RecordStream, seed: int, segment: RankSegment) -> None:
        self._records, self._seed = records, seed
        self._rank, self._world_size = segment["rank"], segment["world_size"]
        self._epoch, self._last_epoch = segment["epoch"], segment["last_epoch"]
        self._position = segment["stream_position"]
        self._reader: Iterator[Record] | None = None
        self._num_read = self._empty_epochs = 0

    def next(self) -> SampleSpec | None:
        """Return the next record, or ``None`` after the last epoch."""
        while self._last_epoch is None or self._epoch <= self._last_epoch:
            if self._reader is None:
                share = (self._rank, self._world_size)
                self._reader = self._records.read(self._position, (self._seed, self._epoch), share)
                self._num_read = self._position["num_read"] if self._position else 0
            record = next(self._reader, None)
            if record is not None:
                self._num_read += 1
                number = self._rank + self._world_size * (self._num_read - 1)  # unique within the epoch
                return SampleSpec(record, (self._seed, self._epoch, number))
            self._empty_epochs = 0 if self._num_read else self._empty_epochs + 1
            # After world_size epochs, this rank has read the shards of every rank once.
            if self._empty_epochs == self._world_size:
                raise InputError(
                    "the shards of this process have no records, expected at least one: add data or use fewer processes"
                )
            self._epoch, self._position, self._reader = self._epoch + 1, None, None
        return None

    def remaining(self) -> RankSegment:
        """Return the rest of the segment."""
        return {
            "rank": self._rank, "world_size": self._world_size, "epoch": self._epoch, "last_epoch": self._last_epoch,
            "stream_position": self._position if self._reader is None else self._records.position(),
        }  # fmt: skip


class _ReshardedReader:
    """Reads a :class:`~blip2.data.positions.ReshardedSegment`."""

    def __init__(self, records: RecordStream, seed: int, segment: ReshardedSegment) -> None:
        self._records, self._seed = records, seed
        self._former_ranks = deque(segment["former_ranks"])
        self._rank, self._world_size = segment["rank"], segment["world_size"]
        self._num_read = segment["num_read"]
        self._segments: _SegmentsReader | None = None
        self._consumed: deque[bool] = deque()

    def next(self) -> SampleSpec | None:
        """Return the next record of this process, or ``None`` at the end."""
        while self._segments is not None or self._former_ranks:
            if self._segments is None:
                former = self._former_ranks.popleft()
                self._segments = _SegmentsReader(self._records, self._seed, former["segments"])
                self._consumed = deque(hex_to_bits(former["consumed_mask"]))
            sample = self._segments.next()
            if sample is None:
                self._segments = None
            elif not (self._consumed and self._consumed.popleft()):
                self._num_read += 1
                if (self._num_read - 1) % self._world_size == self._rank:
                    return sample
        return None

    def remaining(self) -> ReshardedSegment:
        """Return the rest of the segment."""
        current: list[FormerRank] = []
        if self._segments is not None:
            mask = bits_to_hex(np.array(self._consumed, bool))
            current = [{"segments": self._segments.remaining(), "consumed_mask": mask}]
        return {
            "former_ranks": [*current, *self._former_ranks], "rank": self._rank, "world_size": self._world_size,
            "num_read": self._num_read,
        }  # fmt: skip


# -- resuming with other settings ----------------------------------------------------------------------------------


def reshard(
    records: Records | RecordStream, positions: Sequence[SourcePosition], rank: int, world_size: int
) -> SourcePosition:
    """Redistribute the remaining records of the current epoch, to another batch size or number of processes.

    Args:
        records: the table or stream, in the same order as before.
        positions: the position of each former rank.
        rank: rank of this process.
        world_size: number of processes.

    Returns:
        The position from which this process resumes. In the rest of the epoch, the processes together read exactly once
        each record that no former rank has consumed.
    """
    if isinstance(records, Records):
        return _reshard_table(len(records), positions)
    last_epoch = max(position["last_epoch"] for position in positions)
    # The former ranks are divided into groups, and each new process reads what remains of one group.
    num_groups = min(len(positions), world_size)
    group = rank % num_groups
    former_ranks: list[FormerRank] = []
    for former in range(group, len(positions), num_groups):
        position = positions[former]
        segments = position["segments"] or [_rank_segment(former, len(positions), position["base_epoch"])]
        ended: Any = {**segments[-1], "last_epoch": last_epoch}  # only the last segment has no end
        former_ranks.append({"segments": [*segments[:-1], ended], "consumed_mask": position["consumed_mask"]})
    resharded: ReshardedSegment = {
        "former_ranks": former_ranks,
        "rank": rank // num_groups,
        "world_size": len(range(group, world_size, num_groups)),
        "num_read": 0,
    }
    return {
        **START,
        "base_epoch": last_epoch,
        "last_epoch": last_epoch,
        "segments": [resharded, _rank_segment(rank, world_size, last_epoch + 1)],
    }


def _reshard_table(count: int, positions: Sequence[SourcePosition]) -> SourcePosition:
    """Return the position from which all ranks resume in a table of `count` records; see :func:`reshard`."""
    world_size = len(positions)
    remaining = [position["remaining"] for position in positions if position["remaining"] is not None]
    offsets_of = _DrawOffsets(max(remaining, key=lambda each: len(each["mask"]), default=None))
    windows = [(position["consumed"], hex_to_bits(position["consumed_mask"])) for position in positions]
    first = min(rank + world_size * consumed for rank, (consumed, _) in enumerate(windows))
    end = max(len(offsets_of), *(world_size * (consumed + len(mask)) for consumed, mask in windows))
    unconsumed = np.ones(max(end - first, 0), bool)
    for rank, (consumed, mask) in enumerate(windows):
        before = rank + world_size * np.arange(first // world_size, consumed)
        within = rank + world_size * (consumed + np.flatnonzero(mask))
        draws = np.concatenate([before, within]) - first
        unconsumed[draws[draws >= 0]] = False
    offsets = offsets_of(first + np.flatnonzero(unconsumed)) if unconsumed.any() else np.empty(0, np.int64)
    tail_offset = int(offsets_of(np.array([max(first, end)]))[0])
    start = int(offsets[0]) if len(offsets) else tail_offset
    completed = start // count * count  # offset at which the first incomplete epoch starts
    remaining_mask = np.zeros(tail_offset - start, bool)
    remaining_mask[offsets - start] = True
    return {
        **START,
        "base_epoch": positions[0]["base_epoch"] + completed // count,
        "last_epoch": max(position["last_epoch"] for position in positions),
        "remaining": {
            "mask_offset": start - completed,
            "mask": bits_to_hex(remaining_mask),
            "tail_offset": tail_offset - completed,
        },
    }


def skip_to_next_epoch(positions: Sequence[SourcePosition]) -> SourcePosition:
    """Return the start of the first epoch of which none of the given positions has read a record."""
    epoch = max(position["last_epoch"] for position in positions) + 1
    return {**START, "base_epoch": epoch, "last_epoch": epoch}

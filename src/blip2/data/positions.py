"""Positions in the training data: the point from which a process resumes after a batch.

Checkpoints store positions as JSON. Each process has its own position. Its type is :class:`MixturePosition`, which
contains the position in each source of the mixture; a single source is a mixture of one.
"""

from __future__ import annotations

from types import UnionType
from typing import Any, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np
from jaxtyping import Bool


class RemainingRecords(TypedDict):
    """The records of a table that remained to be read when the table was redistributed among the processes.

    An offset is an index into the concatenation of the shuffled epochs, from the start of
    :attr:`SourcePosition.base_epoch`. The records of `mask` are distributed first, then those from `tail_offset` on.
    """

    mask_offset: int
    """Offset of the first bit of :attr:`mask`."""
    mask: str
    """Bit mask (see :func:`bits_to_hex`) with a 1 for each record that remained."""
    tail_offset: int
    """Offset from which on all records remained."""


class StreamPosition(TypedDict):
    """Position of a process in one epoch of a stream, from :meth:`~blip2.data.records.RecordStream.position`."""

    num_read: int
    """Number of rows that the process has read in this epoch."""
    state_dict: dict[str, Any]
    """``state_dict()`` of the process's :class:`datasets.IterableDataset`."""


class RankSegment(TypedDict):
    """A segment of a stream: the share of one rank, epoch after epoch."""

    rank: int
    """Rank whose share is read."""
    world_size: int
    """Number of processes among which the stream is divided."""
    epoch: int
    """Epoch of the next record."""
    last_epoch: int | None
    """Last epoch that is read; ``None``: the segment has no end."""
    stream_position: StreamPosition | None
    """Position within the epoch; ``None``: its start."""


class FormerRank(TypedDict):
    """The part of a stream that one rank still had to read when the stream was redistributed."""

    segments: list[RankSegment | ReshardedSegment]
    """The segments, from the start of the rank's last shuffle window."""
    consumed_mask: str
    """Bit mask with a 1 for each record of the window that the rank had consumed; the first bit is the first record of
    :attr:`segments`."""


class ReshardedSegment(TypedDict):
    """A segment of a stream: records that former ranks had not consumed when the stream was redistributed.

    Several processes share a segment. Each of them reads all of its records and keeps every `world_size`-th one.
    """

    former_ranks: list[FormerRank]
    """The parts that remain to be read, in the order of reading."""
    rank: int
    """Rank of this process among those that share the segment."""
    world_size: int
    """Number of processes that share the segment."""
    num_read: int
    """Number of unconsumed records that this process has read, including those that it left to other processes."""


class SourcePosition(TypedDict):
    """Position of a process in one source.

    Batches are shuffled within windows (:data:`blip2.data.sampler.WINDOW`). The position is the start of the current
    window and the batches of the window that were consumed.
    """

    base_epoch: int
    """For a table: the epoch from whose start offsets and :attr:`consumed` are counted. For a stream: the epoch of the
    last record before the window."""
    consumed: int
    """Number of records that the process had consumed at the start of the window. The count starts again at 0 when the
    source is redistributed or its order changes."""
    last_epoch: int
    """Latest epoch of a record in the window."""
    remaining: RemainingRecords | None
    """For a table that was redistributed: the records that remained; ``None``: all records."""
    segments: list[RankSegment | ReshardedSegment] | None
    """For a stream: the segments that remained at the start of the window, in the order of reading; ``None``: all
    records from the start of :attr:`base_epoch`."""
    batch_offset: int
    """Number of batches of the window that were consumed."""
    consumed_mask: str
    """Bit mask with a 1 for each record of the window that is in one of these batches."""
    order_settings: dict[str, Any]
    """The settings that determine the order of the records; empty before the first batch."""
    batch_settings: dict[str, Any]
    """The settings that determine how the records become batches; empty before the first batch."""


class MixturePosition(TypedDict):
    """Position of a process in a mixture of sources."""

    num_batches: int
    """Number of batches that were drawn, from all sources together."""
    gradient_accumulation_steps: int
    """Number of batches per step, all of which are drawn from the same source."""
    sources: dict[str, SourcePosition]
    """Position in each source from which a batch was drawn, by the name of the source."""


START: SourcePosition = {
    "base_epoch": 0, "consumed": 0, "last_epoch": 0, "remaining": None, "segments": None, "batch_offset": 0,
    "consumed_mask": "", "order_settings": {}, "batch_settings": {},
}  # fmt: skip
"""The position before the first record of a source."""


MAX_NUMBER = 10**15
"""Maximum of the numbers of a position: above any practical value, and small enough not to overflow."""


def is_position(value: Any) -> bool:
    """Return whether a JSON value has the keys and types of a :class:`MixturePosition`, no negative number, and bit
    masks in hexadecimal digits."""
    return _has_type(value, MixturePosition) and value["gradient_accumulation_steps"] > 0


def _has_type(value: Any, hint: Any) -> bool:
    if is_typeddict(hint):
        fields = get_type_hints(hint)
        return (
            isinstance(value, dict)
            and value.keys() == fields.keys()
            and all(_has_type(value[name], field) for name, field in fields.items())
            and all(_is_hex(value[name]) for name in ("mask", "consumed_mask") if name in fields)
        )
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_has_type(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_has_type(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_has_type(item, arguments[1]) for item in value.values())
    if hint is int:
        return type(value) is int and 0 <= value <= MAX_NUMBER
    return hint is Any or isinstance(value, hint)


def _is_hex(digits: str) -> bool:
    return len(digits) % 2 == 0 and set(digits) <= set("0123456789abcdef")


def bits_to_hex(bits: Bool[np.ndarray, "N"]) -> str:
    """Encode booleans as hexadecimal digits, 8 in 2 digits; the last byte is padded with zeros."""
    return np.packbits(bits).tobytes().hex()


def hex_to_bits(digits: str) -> Bool[np.ndarray, "N"]:
    """Decode the result of :func:`bits_to_hex`. The padding is included, so N is a multiple of 8."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8)).astype(bool)

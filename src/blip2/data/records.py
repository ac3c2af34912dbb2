"""Records, each one image with its texts, in a table (random access) or a stream (sequential access).

Images stay encoded here; :mod:`blip2.data.images` decodes them later, in worker processes.
:mod:`blip2.data.sources` opens data sources as records.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from jaxtyping import Int

from blip2.data.cells import (
    IMAGE_ID_COLUMNS,
    CellError,
    labels_to_names,
    read_image_cell,
    read_metadata,
    read_text,
    read_texts,
)
from blip2.data.shards import ERROR_COLUMN, KEY_COLUMN, STARTS_SHARD_COLUMN, unreadable_source
from blip2.data.tables import Table


@dataclass(frozen=True)
class Record:
    """One image with its captions, or with a question and its answers."""

    key: str
    """The name of the record in messages."""
    image: str | bytes | None
    """The path or the encoded bytes of the image; None if the row has none, which is reported when it is decoded."""
    captions: tuple[str, ...]
    """The captions that are not blank, with whitespace collapsed. For a question: the answers, duplicates included."""
    question: str | None = None
    """The question about the image; None for captions."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The row's values in the :data:`~blip2.data.cells.METADATA_COLUMNS`, used to group and submit results."""
    num_blank: int = 0
    """The number of blank captions or answers that were left out of `captions`."""
    skip_reason: tuple[str, str] | None = None
    """Why the row cannot be used: one of :data:`blip2.data.dataset.SKIP_REASONS` and a message; None if it can."""
    error: str | None = None
    """Why the rest of a shard cannot be read; None unless the record is a placeholder for that rest."""
    starts_shard: bool = False
    """Whether the record is the first of its shard."""

    @property
    def image_id(self) -> int:
        """A 63-bit hash of the image's path, or of its bytes if it has no path."""
        name = self.image if isinstance(self.image, bytes) else str(self.image).encode(errors="surrogatepass")
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class ColumnMapping:
    """The columns of a data source that records are made of."""

    source: str
    image: str
    caption: str | None
    """None for questions whose answers are not published."""
    question: str | None
    metadata: tuple[str, ...]
    root: Path
    """The folder that relative image paths start from."""
    class_names: Mapping[str, list[str]] = field(default_factory=dict)
    """The class names of each column that holds class labels as integers."""
    allowed_folders: tuple[str, ...] | None = None
    """The folders that image files must lie in; None allows every folder. Images of tar shards are always bytes."""
    group: str | None = None
    """The column whose equal values are kept in one batch."""
    group_share: float = 1.0
    """The fraction of the groups that is kept together, in [0, 1]."""

    @property
    def column_names(self) -> list[str]:
        names = (self.image, self.caption, self.question, self.group, *self.metadata, KEY_COLUMN)
        return [name for name in names if name is not None]

    def to_record(self, row: dict[str, Any], index: int) -> Record:
        """Convert a row to a record. A cell that cannot be used becomes the record's `skip_reason`."""
        starts_shard = row.get(STARTS_SHARD_COLUMN, False)
        if ERROR_COLUMN in row:
            return Record(row[KEY_COLUMN], None, (), error=row[ERROR_COLUMN], starts_shard=starts_shard)
        faults: list[tuple[str, str]] = []

        def parse(reason: str, name: str | None, parser: Callable[[Any], Any], default: Any) -> Any:
            if name is None:
                return default
            try:
                return parser(self._with_class_names(row.get(name), name))
            except CellError as error:
                faults.append((reason, f"{name} {error}"))
                return default

        image = parse("image", self.image, read_image_cell, None)
        refused = ""
        if isinstance(image, str):
            image = str(self.root / image)
            if self.allowed_folders is not None and not _lies_in(image, self.allowed_folders):
                image, refused = None, f", whose image is the name {image}, which is not read: expected the bytes"
        captions, num_blank = parse("caption", self.caption, read_texts, ((), 0))
        question = parse("question", self.question, read_text, "")
        present = [name for name in self.metadata if row.get(name) not in (None, "")]
        metadata = {name: parse("caption", name, read_metadata, None) for name in present}
        key = row.get(KEY_COLUMN) or f"{self.source} row {index}" + (f" ({image})" if isinstance(image, str) else "")
        fault = faults[0] if faults else None
        return Record(
            key + refused, image, captions, question or None, metadata, num_blank, fault, starts_shard=starts_shard
        )

    def captions(self, cell: Any) -> tuple[str, ...]:
        """Return the captions in a cell of the caption column; none if the cell cannot be used."""
        try:
            return read_texts(self._with_class_names(cell, self.caption or ""))[0]
        except CellError:
            return ()

    def _with_class_names(self, cell: Any, name: str) -> Any:
        return labels_to_names(cell, self.class_names[name]) if name in self.class_names else cell


def _lies_in(path: str, folders: tuple[str, ...]) -> bool:
    """Return whether a file lies in one of the folders once symbolic links are resolved."""
    with contextlib.suppress(OSError, ValueError):
        real = os.path.realpath(path)
        return any(real.startswith(os.path.join(os.path.realpath(folder), "")) for folder in folders)  # noqa: PTH118
    return False


class _WithColumns:
    """What tables and streams of records have in common."""

    _columns: ColumnMapping

    @property
    def has_questions(self) -> bool:
        """Whether the texts are answers to questions."""
        return self._columns.question is not None

    @property
    def caption_column(self) -> str | None:
        """The column that captions or answers are read from."""
        return self._columns.caption


class Records(_WithColumns, Sequence[Record]):
    """Records with random access, in a memory-mapped table."""

    def __init__(self, table: Table, columns: ColumnMapping) -> None:
        self._table = table
        self._rows = table.select_columns(columns.column_names)
        self._columns = columns

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._columns.to_record(self._rows.row(int(index)), int(index))

    def select_range(self, first: int, count: int) -> Records:
        """Return `count` consecutive records, starting at the record `first`."""
        return Records(self._table.select_range(first, count), self._columns)

    @property
    def order_params(self) -> dict[str, Any]:
        """The values that determine the order of the records together with a seed, as plain values for JSON."""
        return {"records": len(self), "group_column": self._columns.group, "group_share": self._columns.group_share}

    @property
    def group_share(self) -> float:
        """The fraction of the groups that stay together in an epoch, in [0, 1]."""
        return self._columns.group_share

    @cached_property
    def group_ids(self) -> Int[np.ndarray, "N"] | None:
        """The group of each record: records of one group belong in one batch. None if there is no group column."""
        if self._columns.group is None:
            return None
        values = self._table.read_column(self._columns.group, slice(None))
        return np.unique([str(value) for value in values], return_inverse=True)[1]

    def captions(self, indices: Sequence[int]) -> list[tuple[str, ...]]:
        """Return the captions of the records at `indices` without reading their images."""
        if self._columns.caption is None:
            return [()] * len(indices)
        return [self._columns.captions(cell) for cell in self._table.read_column(self._columns.caption, list(indices))]

    @property
    def has_embedded_images(self) -> bool:
        """Whether the table holds the encoded images instead of paths."""
        return not isinstance(self[0].image, str)

    def image_identifiers(self) -> Iterator[dict[str, Any]]:
        """Yield what :func:`blip2.data.benchmarks.check_disjoint` compares, for each record. No file is opened.

        Returns:
            Dicts with ``image``: the path of the image, or a digest of its bytes; and the
            :data:`~blip2.data.cells.IMAGE_ID_COLUMNS` if the table has them.
        """
        names = [name for name in IMAGE_ID_COLUMNS if name in self._table.features]
        root = os.path.abspath(self._columns.root)  # noqa: PTH100  (Path takes a minute for millions of rows)
        for row in self._table.iter_rows([self._columns.image, *names]):
            try:
                image = read_image_cell(row.get(self._columns.image))
            except CellError:
                image = None
            if isinstance(image, bytes):
                image = hashlib.blake2b(image, digest_size=16).hexdigest()
            elif image:
                image = os.path.join(root, image)  # noqa: PTH118
                image = os.path.normpath(image) if "/." in image or "//" in image else image
            yield {"image": image, **{name: row.get(name) for name in names}}


class RecordStream(_WithColumns):
    """Records with sequential access, from local files or over a network.

    Each rank reads its own share: its own shards if there are at least as many shards as ranks, otherwise every N-th
    record of all shards. The position can be saved and restored.
    """

    def __init__(self, dataset: datasets.IterableDataset, columns: ColumnMapping, rank: int, world_size: int) -> None:
        self._dataset = dataset
        self._columns = columns
        self._rank, self._world_size = rank, world_size
        self._rank_dataset = dataset
        self._num_read = 0
        self._pending_position: dict[str, Any] | None = None
        """The position to start from, until the first row after it is read."""

    @property
    def order_params(self) -> dict[str, Any]:
        """The values that determine the order of the records together with a seed, as plain values for JSON."""
        return {"shards": self._dataset.num_shards}

    def read(
        self,
        position: dict[str, Any] | None = None,
        shuffle: tuple[int, int] | None = None,
        share: tuple[int, int] | None = None,
    ) -> Iterator[Record]:
        """Iterate over the records of this rank.

        Args:
            position: a value of :meth:`position` to resume from; None: the start.
            shuffle: (seed, epoch), which determine the order of the shards and their assignment to ranks; None: the
                shards as they are listed.
            share: (rank, world_size) whose records are read instead of this rank's.
        """
        self._num_read = position["number"] if position else 0
        rank, world_size = share or (self._rank, self._world_size)
        # If the shards cannot be divided evenly, another rank gets the larger share in each epoch.
        rank = (rank + (shuffle[1] if shuffle else 0)) % world_size
        strategy = "shards" if self._dataset.num_shards >= world_size else "examples"
        self._rank_dataset = split_dataset_by_node(self._dataset, rank, world_size, strategy=strategy)
        if shuffle is not None:
            self._rank_dataset.set_epoch(1 + int(np.random.default_rng(shuffle).integers(2**31)))
        if position:
            self._rank_dataset.load_state_dict(position["state"])
        self._pending_position = position
        return self._iter_records()

    def _iter_records(self) -> Iterator[Record]:
        rows = iter(self._rank_dataset)
        while (row := next_row(rows, self._columns.source)) is not None:
            self._num_read += 1
            self._pending_position = None
            yield self._columns.to_record(row, self._num_read - 1)

    def position(self) -> dict[str, Any]:
        """Return the position of the next record, as plain values for JSON."""
        if self._pending_position is not None:  # the library returns a loaded state only after the first row
            return self._pending_position
        return {"number": self._num_read, "state": self._rank_dataset.state_dict()}


def next_row(rows: Iterator[dict[str, Any]], source: str) -> dict[str, Any] | None:
    """Return the next row of a stream, or None after the last.

    Raises:
        InputError: the row cannot be read.
    """
    try:
        return next(rows, None)
    except Exception as error:  # the builders of the datasets library raise whatever their parsers raise
        raise unreadable_source(source, error) from error

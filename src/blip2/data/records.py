"""Records: images with their texts, in a table (random access) or a stream (sequential access).

:mod:`blip2.data.sources` opens data sources as records. Records contain encoded images or paths of images;
:mod:`blip2.data.images` decodes the images later, in worker processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
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

from blip2.data.arrays import split_key
from blip2.data.cells import (
    ANSWER_COLUMNS,
    CAPTION_COLUMNS,
    IMAGE_ID_COLUMNS,
    QUESTION_COLUMNS,
    CellError,
    first_column,
    is_empty,
    labels_to_names,
    read_features_cell,
    read_image_cell,
    read_metadata,
    read_question,
    read_texts,
)
from blip2.data.positions import StreamPosition
from blip2.data.shards import ERROR_COLUMN, KEY_COLUMN, REFUSED_COLUMN, STARTS_SHARD_COLUMN, unreadable_source
from blip2.data.tables import Table

NUM_DIGESTED = 1000
"""Number of records, spread evenly over a table, by which a change of its order is noticed."""


@dataclass(frozen=True)
class Record:
    """One image with its captions, or with a question and its answers."""

    key: str
    """The name of the record in messages."""
    image: str | bytes | None
    """The path or the encoded bytes of the image, or of the array of features that stands for an image; None if the row
    has no image, which is an error only when the image is needed."""
    captions: tuple[str, ...]
    """The captions that are not blank, with whitespace collapsed. If there is a question: the answers, including
    duplicates."""
    question: str | None = None
    """The question about the image; None if there is no question."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The values of the row in :data:`~blip2.data.cells.METADATA_COLUMNS`. Evaluation groups results by them and writes
    them to the files of results."""
    other_columns: Mapping[str, Any] = field(default_factory=dict)
    """The cells of :attr:`ColumnMapping.other_columns` as the data source has them, without empty cells and bytes."""
    num_blank: int = 0
    """The number of blank captions or answers that were left out of `captions`."""
    skip_reason: tuple[str, str] | None = None
    """If the row cannot be used: one of :data:`blip2.data.dataset.SKIP_REASONS`, and a message. Otherwise None."""
    error: str | None = None
    """If the record is a placeholder for the unreadable rest of a shard: the error message. Otherwise None."""
    starts_shard: bool = False
    """Whether the record is the first of its shard."""

    @property
    def image_id(self) -> int:
        """A 63-bit hash of the image's path, or of its bytes if it has no path."""
        name = self.image if isinstance(self.image, bytes) else str(self.image).encode(errors="surrogatepass")
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class ColumnMapping:
    """The columns of a data source from which records are made.

    The texts of a row with a question are its answers, and those of another row its captions. They are in the first
    column of :meth:`text_columns` that the row has, because the samples of a tar and the objects of a JSON file may
    have different columns.
    """

    source: str
    """The data source, for messages."""
    image: str
    """The column of the image or of the features, or of their path."""
    caption: str | None
    """The first column of the captions or answers that was found; None for questions whose answers are not
    published."""
    question: str | None
    """The column of the question, without which no row can be used; None if there are no questions."""
    metadata: tuple[str, ...]
    """Those of :data:`~blip2.data.cells.METADATA_COLUMNS` that the data source has."""
    root: Path
    """The folder to which image paths are relative."""
    class_names: Mapping[str, list[str]] = field(default_factory=dict)
    """The class names of each column that holds class labels as integers."""
    allowed_folders: tuple[str, ...] | None = None
    """The folders in which image files may be; None: any folder. Empty: no image files are read, only embedded
    images."""
    group: str | None = None
    """The column that assigns records to groups: records with equal values come in the same batch. None: no groups."""
    group_share: float = 1.0
    """The fraction of the groups whose records are kept together, in [0, 1]."""
    other_columns: tuple[str, ...] = ()
    """Further columns, whose cells are not interpreted."""
    reads_features: bool = False
    """Whether the column `image` has arrays of features."""
    caption_columns: tuple[str, ...] = ()
    """The columns that may have captions or answers. Empty: the usual ones."""
    question_columns: tuple[str, ...] = QUESTION_COLUMNS
    """The columns by which a row has a question if `question` is None, as in a stream whose first rows have none."""

    def text_columns(self, question: str | None) -> tuple[str, ...]:
        """Return the columns that may have the texts of a row, in the order in which they are looked for.

        Args:
            question: the column of the question of the row; None if the row has none.
        """
        return self.caption_columns or (CAPTION_COLUMNS if question is None else ANSWER_COLUMNS)

    @property
    def column_names(self) -> list[str]:
        """The names of all columns that are read."""
        names = (self.image, self.caption, self.question, self.group, *self.metadata, *self.other_columns, KEY_COLUMN)
        return [name for name in names if name is not None]

    def to_record(self, row: dict[str, Any], index: int) -> Record:
        """Convert a row to a record. If cells cannot be used, the first of them is the ``skip_reason`` of the record.

        Args:
            row: the values of the row, by column.
            index: the number of the row in the data source, for messages.
        """
        starts_shard = row.get(STARTS_SHARD_COLUMN, False)
        if ERROR_COLUMN in row:
            return Record(row[KEY_COLUMN], None, (), error=row[ERROR_COLUMN], starts_shard=starts_shard)
        if REFUSED_COLUMN in row:
            refusal = tuple(row[REFUSED_COLUMN])
            return Record(row[KEY_COLUMN], None, (), skip_reason=refusal, starts_shard=starts_shard)
        faults: list[tuple[str, str]] = []
        question_column = self.question or first_column(row, self.question_columns)
        caption_column = first_column(row, self.text_columns(question_column))

        def parse(reason: str, name: str | None, parser: Callable[[Any], Any], default: Any) -> Any:
            if name is None:
                return default
            try:
                return parser(self._with_class_names(row.get(name), name))
            except CellError as error:
                faults.append((reason, f"{name} {error}"))
                return default

        image = parse("image", self.image, self.read_image, None)
        refused = ""
        if isinstance(image, str):
            image = str(self.root / image)
            file = split_key(image)[0] if self.reads_features else image
            if self.allowed_folders is not None and not _lies_in(file, self.allowed_folders):
                allowed = " or ".join(
                    ["the bytes of an image", *(f"a file in {each}" for each in self.allowed_folders)]
                )
                image, refused = None, f", whose image is the path {image}, which is not read: expected {allowed}"
        captions, num_blank = parse("caption", caption_column, read_texts, ((), 0))
        question = parse("question", question_column, read_question, None)
        present = [name for name in self.metadata if not is_empty(row.get(name))]
        metadata = {name: parse("caption", name, read_metadata, None) for name in present}
        others = {name: parse("caption", name, lambda cell: cell, None) for name in self.other_columns if name in row}
        others = {name: cell for name, cell in others.items() if cell not in (None, "") and not isinstance(cell, bytes)}
        key = row.get(KEY_COLUMN) or f"{self.source} row {index}" + (f" ({image})" if isinstance(image, str) else "")
        fault = faults[0] if faults else None
        return Record(
            key + refused, image, captions, question, metadata, others, num_blank, fault,
            starts_shard=starts_shard,
        )  # fmt: skip

    def read_image(self, cell: Any) -> str | bytes | None:
        """Return the path or the bytes of the image, or of the features, in a cell; None if the cell is empty."""
        return read_features_cell(cell) if self.reads_features else read_image_cell(cell)

    def captions(self, cell: Any) -> tuple[str, ...]:
        """Return the captions in a cell of the caption column; an empty tuple if the cell cannot be used."""
        try:
            return read_texts(self._with_class_names(cell, self.caption or ""))[0]
        except CellError:
            return ()

    def _with_class_names(self, cell: Any, name: str) -> Any:
        if isinstance(cell, CellError):  # the reader of a shard could not name the class
            raise cell
        return labels_to_names(cell, self.class_names[name]) if name in self.class_names else cell


def _lies_in(path: str, folders: tuple[str, ...]) -> bool:
    """Return whether a file is in one of the folders or their subfolders, with symbolic links resolved."""
    with contextlib.suppress(OSError, ValueError):
        real = os.path.realpath(path)
        return any(real.startswith(os.path.join(os.path.realpath(folder), "")) for folder in folders)  # noqa: PTH118
    return False


class _WithColumns:
    """Base class of tables and streams of records."""

    _columns: ColumnMapping

    @property
    def has_questions(self) -> bool:
        """Whether the texts are answers to questions."""
        return self._columns.question is not None

    @property
    def caption_column(self) -> str | None:
        """The column of the captions or answers; None if there is no such column."""
        return self._columns.caption


class Records(_WithColumns, Sequence[Record]):
    """Records with random access, in a memory-mapped table.

    Args:
        table: the table.
        columns: the columns of the table from which records are made.
    """

    def __init__(self, table: Table, columns: ColumnMapping) -> None:
        self._table = table
        self._rows = table.select_columns(columns.column_names)
        self._columns = columns

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._columns.to_record(self._rows.row(int(index)), int(index))

    def select_range(self, first: int, count: int) -> Records:
        """Return the `count` consecutive records that start with the record of index `first`."""
        return Records(self._table.select_range(first, count), self._columns)

    @property
    def order_params(self) -> dict[str, Any]:
        """The values that determine the order of the records together with a seed, as plain values for JSON.

        The digest of evenly spread records tells whether rows were moved, added or removed.
        """
        spread = sorted({i * (len(self) - 1) // (NUM_DIGESTED - 1) for i in range(NUM_DIGESTED)})
        return {
            "records": len(self), "group_column": self._columns.group, "group_share": self._columns.group_share,
            "digest": self.digest(spread),
        }  # fmt: skip

    def digest(self, indices: Sequence[int] | slice) -> str:
        """Return a digest of the image paths and the texts of the records at `indices`, in their order.

        Embedded images are not read.
        """
        columns = self._columns
        names = [] if self.has_embedded_images else [(columns.image,)]
        names += [] if columns.caption is None else [columns.text_columns(columns.question)]
        names += [] if columns.question is None else [(columns.question,)]
        cells = [self._table.read_column(each, indices) for each in names]
        return hashlib.blake2b(json.dumps(cells, default=str).encode(), digest_size=8).hexdigest()

    @property
    def group_share(self) -> float:
        """The fraction of the groups that stay together in an epoch, in [0, 1]."""
        return self._columns.group_share

    @cached_property
    def group_ids(self) -> Int[np.ndarray, "N"] | None:
        """The number of the group of each of the N records, from 0. None if there is no group column.

        A record with an empty cell is a group of its own.
        """
        if self._columns.group is None:
            return None
        values = self._table.read_column([self._columns.group], slice(None))
        names = [f"\0{i}" if is_empty(value) else str(value) for i, value in enumerate(values)]
        numbers = {name: number for number, name in enumerate(sorted(set(names)))}  # np.unique pads to the longest
        return np.array([numbers[name] for name in names], np.int64)

    def captions(self, indices: Sequence[int]) -> list[tuple[str, ...]]:
        """Return the captions of the records at `indices`. Images are not read."""
        if self._columns.caption is None:
            return [()] * len(indices)
        names = self._columns.text_columns(self._columns.question)
        return [self._columns.captions(cell) for cell in self._table.read_column(names, list(indices))]

    @property
    def has_embedded_images(self) -> bool:
        """Whether the table contains encoded images instead of paths, judging by the first record."""
        return not isinstance(self[0].image, str)

    def image_identifiers(self) -> Iterator[dict[str, Any]]:
        """Identify the image of each record, for :func:`blip2.data.benchmarks.check_disjoint`. No image file is opened.

        Yields:
            A dict per record: ``image`` is the absolute path of the image or, for an embedded image, a digest of its
            bytes (None if it cannot be read); and the value of each of
            :data:`~blip2.data.cells.IMAGE_ID_COLUMNS` that the table has.
        """
        names = [name for name in IMAGE_ID_COLUMNS if name in self._table.features]
        root = os.path.abspath(self._columns.root)  # noqa: PTH100  (Path takes a minute for millions of rows)
        for row in self._table.iter_rows([self._columns.image, *names]):
            try:
                image = self._columns.read_image(row.get(self._columns.image))
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

    Each rank reads its own share of the records. If there are at least as many shards as ranks, the share is a subset
    of the shards; otherwise it is every `world_size`-th record of all shards. The position can be saved and restored.

    Args:
        dataset: the rows.
        columns: the columns of the dataset from which records are made.
        rank: rank of this process.
        world_size: number of processes.
        shards: the files from which the dataset reads, in order; empty if they are not known.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        columns: ColumnMapping,
        rank: int,
        world_size: int,
        shards: Sequence[str] = (),
    ) -> None:
        self._dataset = dataset
        self._columns = columns
        self._rank, self._world_size = rank, world_size
        self._shards = shards
        self._rank_dataset = dataset
        self._num_read = 0
        self._pending_position: StreamPosition | None = None
        """The position from which reading resumes, until the first row after that position is read."""

    @property
    def order_params(self) -> dict[str, Any]:
        """The values that determine the order of the records together with a seed, as plain values for JSON."""
        names = json.dumps([Path(shard).name for shard in self._shards])
        digest = hashlib.blake2b(names.encode(), digest_size=8).hexdigest()
        return {"shards": self._dataset.num_shards, "digest": digest}

    def read(
        self,
        position: StreamPosition | None = None,
        shuffle: tuple[int, int] | None = None,
        share: tuple[int, int] | None = None,
    ) -> Iterator[Record]:
        """Iterate over the records of this rank, once. A new iteration ends the previous one.

        Args:
            position: the value of :meth:`position` from which to resume; None: the start.
            shuffle: (seed, epoch), which determine the order of the shards and which rank reads which shard. None: the
                shards are read in the order in which they are listed.
            share: (rank, world_size) of the share that is read; None: the share of this rank.

        Raises:
            InputError: while iterating, if the data cannot be read.
        """
        self._num_read = position["num_read"] if position else 0
        rank, world_size = share or (self._rank, self._world_size)
        # If the shards cannot be divided evenly, the larger shares go to other ranks in each epoch.
        rank = (rank + (shuffle[1] if shuffle else 0)) % world_size
        strategy = "shards" if self._dataset.num_shards >= world_size else "examples"
        self._rank_dataset = split_dataset_by_node(self._dataset, rank, world_size, strategy=strategy)
        if shuffle is not None:
            self._rank_dataset.set_epoch(1 + int(np.random.default_rng(shuffle).integers(2**31)))
        if position:
            self._rank_dataset.load_state_dict(position["state_dict"])
        self._pending_position = position
        return self._iter_records()

    def _iter_records(self) -> Iterator[Record]:
        rows = iter(self._rank_dataset)
        while (row := next_row(rows, self._columns.source)) is not None:
            self._num_read += 1
            self._pending_position = None
            yield self._columns.to_record(row, self._num_read - 1)

    def position(self) -> StreamPosition:
        """Return the position of the next record of the iterator that :meth:`read` returned last."""
        if self._pending_position is not None:  # the library returns a loaded state only after the first row
            return self._pending_position
        return {"num_read": self._num_read, "state_dict": self._rank_dataset.state_dict()}


def next_row(rows: Iterator[dict[str, Any]], source: str) -> dict[str, Any] | None:
    """Return the next row of a stream, or None after the last.

    Raises:
        InputError: the row cannot be read.
    """
    try:
        return next(rows, None)
    except Exception as error:  # the datasets library passes on the exceptions of all its parsers
        raise unreadable_source(source, error) from error

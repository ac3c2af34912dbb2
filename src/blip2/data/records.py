"""Readers for what people have.

Everything is read through the ``datasets`` library: memory-mapped tables where the number of rows is known, streams
where it is not. Images stay encoded here; :mod:`blip2.data.images` decodes them later, in other processes.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.config import HF_DATASETS_CACHE
from datasets.distributed import split_dataset_by_node
from huggingface_hub.constants import HF_HUB_CACHE
from jaxtyping import Int

from blip2.config import DataConfig
from blip2.data.benchmarks import find_shards, is_benchmark, read_benchmark
from blip2.data.cells import (
    ABOUT_COLUMNS,
    ANSWER_COLUMNS,
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    NAME_COLUMNS,
    QUESTION_COLUMNS,
    CellError,
    class_names,
    read_image_cell,
)
from blip2.data.folders import list_pairs
from blip2.data.record import Columns, Record
from blip2.data.shards import BEGINS, BROKEN, KEY, expand_files, is_url, read_shard, stream_shards, unreadable
from blip2.data.tables import Table, build_table, make_table, read_text_table
from blip2.errors import InputError
from blip2.io import read_json

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".tar")

CACHES = (HF_DATASETS_CACHE, HF_HUB_CACHE)
"""Where the datasets library puts the files of a data set of the hub."""

ROWS_AT_ONCE = 50_000
"""Of a benchmark become a table together: as Python's objects they take ten times as much memory."""

LOOKED_AT = 20
"""So many rows of shards are read to learn their columns: a sample may lack one. A table is refused if none of so many
rows at its start can be used."""
BROKEN_AT_FIRST = 10
"""So many shards without a row, one after the other, and there is nothing to be learned."""


class Records(Sequence[Record]):
    """Records that can be read in any order."""

    def __init__(self, table: Table, columns: Columns) -> None:
        self._table = table
        self._rows = table.only(columns.names)
        self._columns = columns

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._columns.record(self._rows.row(int(index)), int(index))

    def part(self, first: int, count: int) -> Records:
        """So many records from one on."""
        return Records(self._table.part(first, count), self._columns)

    @property
    def asks(self) -> bool:
        """Whether its texts are answers to questions."""
        return self._columns.question is not None

    @property
    def caption_column(self) -> str | None:
        """The column that its captions or answers come from."""
        return self._columns.caption

    @property
    def layout(self) -> dict[str, Any]:
        """What the order of its records depends on beside a seed, for JSON."""
        return {"records": len(self), "group_column": self._columns.group, "group_share": self._columns.group_share}

    @property
    def group_share(self) -> float:
        """Share of the groups that stay together in an epoch, in [0, 1]."""
        return self._columns.group_share

    @cached_property
    def groups(self) -> Int[np.ndarray, "N"] | None:
        """A number for each record, equal for those that belong into one batch; None where there are no groups."""
        if self._columns.group is None:
            return None
        values = self._table.texts(self._columns.group, slice(None))
        return np.unique([str(value) for value in values], return_inverse=True)[1]

    def captions(self, indices: Sequence[int]) -> list[tuple[str, ...]]:
        """Captions of some records, without reading their images."""
        if self._columns.caption is None:
            return [()] * len(indices)
        return [self._columns.captions(cell) for cell in self._table.texts(self._columns.caption, list(indices))]

    @property
    def holds_images(self) -> bool:
        """Whether images lie within it, and not in files of their own."""
        return not isinstance(self[0].image, str)

    def image_names(self) -> Iterator[dict[str, Any]]:
        """What each record's image is called: its path, or a digest of its bytes, as ``image``; of the data sets of the
        paper the names that :func:`blip2.data.benchmarks.check_disjoint` compares. No file is opened."""
        names = [name for name in NAME_COLUMNS if name in self._table.features]
        root = os.path.abspath(self._columns.root)  # noqa: PTH100  (of millions of paths Path would make a minute)
        for row in self._table.rows([self._columns.image, *names]):
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


class RecordStream:
    """Records that come in an order of their own, from local files or over a network.

    Each of N processes reads its own share: its own shards where there are enough for all, otherwise every N-th record
    of all shards. The position can be taken down and gone back to.
    """

    def __init__(self, dataset: datasets.IterableDataset, columns: Columns, process: int, processes: int) -> None:
        self._dataset = dataset
        self._columns = columns
        self._process, self._processes = process, processes
        self._reading = dataset
        self._number = 0
        self._unread: dict[str, Any] | None = None
        """The position that reading starts from, until something was read."""

    @property
    def asks(self) -> bool:
        """Whether its texts are answers to questions."""
        return self._columns.question is not None

    @property
    def caption_column(self) -> str | None:
        """The column that its captions or answers come from."""
        return self._columns.caption

    @property
    def layout(self) -> dict[str, Any]:
        """What the order of its records depends on beside a seed, for JSON."""
        return {"shards": self._dataset.num_shards}

    def read(
        self,
        position: dict[str, Any] | None = None,
        shuffle: tuple[int, int] | None = None,
        share: tuple[int, int] | None = None,
    ) -> Iterator[Record]:
        """The records of this process.

        Args:
            position: one that :meth:`position` gave, which is gone to at once; None: the start.
            shuffle: (seed, epoch), by which the shards are shuffled and dealt out; None: as they are listed.
            share: (process, processes) whose records are read in place of its own.
        """
        self._number = position["number"] if position else 0
        process, processes = share or (self._process, self._processes)
        # With shards that cannot be dealt out evenly it is each time another process that has more.
        process = (process + (shuffle[1] if shuffle else 0)) % processes
        how = "shards" if self._dataset.num_shards >= processes else "examples"
        self._reading = split_dataset_by_node(self._dataset, process, processes, strategy=how)
        if shuffle is not None:
            self._reading.set_epoch(1 + int(np.random.default_rng(shuffle).integers(2**31)))
        if position:
            self._reading.load_state_dict(position["state"])
        self._unread = position
        return self._rows()

    def _rows(self) -> Iterator[Record]:
        rows = iter(self._reading)
        while (row := _next(rows, self._columns.source)) is not None:
            self._number += 1
            self._unread = None
            yield self._columns.record(row, self._number - 1)

    def position(self) -> dict[str, Any]:
        """Where the next record is."""
        if self._unread is not None:  # the library gives a loaded state back only after the first row
            return self._unread
        return {"number": self._number, "state": self._reading.state_dict()}


def open_records(source: str, config: DataConfig, process: int = 0, processes: int = 1) -> Records | RecordStream:
    """Open image-text pairs.

    Args:
        source: what ``data.train`` of a recipe may say.
        process, processes: which share of a stream this process reads. Tables are shared by all.

    Raises:
        InputError: there is nothing there, it cannot be read, it is empty, or a column is missing.
    """
    streaming = config.streaming
    if is_benchmark(source):
        shards = find_shards(source)
        if shards is None:
            return _records(_table(source), source, config, Path(), process, processes)
        source = shards
    if source.startswith("hub:"):
        name = source.removeprefix("hub:")
        dataset = _load(source, datasets.load_dataset, name, split=config.split, streaming=bool(streaming))
        # Its files lie where the library put them.
        own = (*(str(folder) for folder in CACHES), *([name] if Path(name).is_dir() else []))
        return _records(dataset, source, config, Path(), process, processes, own)
    path, remote = Path(source), is_url(source)
    if not remote and path.is_dir():
        return _open_folder(path, config, process, processes)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"data source {source!r} is neither a folder nor a file ending in {', '.join(SUFFIXES)}: check the path,"
            " or write hub:NAME for a data set on the Hugging Face hub"
        )
    files = expand_files(source)
    streaming = suffix == ".tar" or remote if streaming is None else streaming
    if streaming:
        dataset = stream_shards(files)
    elif suffix == ".parquet":
        literal = [file if remote else glob.escape(file) for file in files]  # the library looks for patterns again
        dataset = _load(source, datasets.load_dataset, "parquet", data_files={"train": literal}, split="train")
    elif suffix == ".tar":
        kept = config.image_column or "image"
        dataset = _load(source, build_table, files, read=partial(_read_samples, image=kept), kind=kept)
    else:
        dataset = _load(source, build_table, files, read=read_text_table)
    # A .parquet may name files beside it; what a .json in a tar says is no name of a file.
    within = {".tar": (), ".parquet": (str(path.parent),)}.get(suffix)
    return _records(dataset, source, config, path.parent, process, processes, within)


def _read_samples(shard: str, image: str) -> Iterator[dict[str, Any]]:
    """The rows of a shard that has to be whole; the image lies in the column `image` alone."""
    for row in read_shard(shard):
        if BROKEN in row:
            raise InputError(row[BROKEN])
        kept = {name: cell for name, cell in row.items() if name == image or not isinstance(cell, bytes)}
        yield {**kept, KEY: f"{shard} {row[KEY]}"}


def _table(source: str) -> datasets.Dataset:
    """The rows of a benchmark that records are made of, in memory without their pictures."""
    wanted = ("image", *CAPTION_COLUMNS, *QUESTION_COLUMNS, *ANSWER_COLUMNS, *ABOUT_COLUMNS, *NAME_COLUMNS)
    rows = ({name: value for name, value in row.items() if name in wanted} for row in read_benchmark(source))
    parts = []
    while part := list(islice(rows, ROWS_AT_ONCE)):
        parts.append(_load(source, datasets.Dataset.from_list, part))
    return datasets.concatenate_datasets(parts)


def _open_folder(folder: Path, config: DataConfig, process: int, processes: int) -> Records | RecordStream:
    for saved in (folder, folder / config.split):
        if (saved / "dataset_info.json").is_file():
            dataset = _load(str(saved), datasets.load_from_disk, str(saved))
            return _records(dataset, str(saved), config, folder, process, processes)
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        found = read_json(splits)
        names = ", ".join(map(str, found.get("splits", ()))) if isinstance(found, dict) else "unknown"
        raise InputError(f"data source {folder} has the splits {names}, not {config.split}: name one with data.split")
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).is_file():
            return open_records(str(folder / name), config, process, processes)
    table = make_table(list_pairs(folder, say=process == 0))
    return Records(table, Columns(str(folder), "image", "captions", None, (), folder))


def _load(source: str, load: Callable[..., Any], what: Any, **options: Any) -> Any:
    try:
        return load(what, **options)
    except InputError as error:
        raise unreadable(source, error) from error
    except StopIteration as error:
        raise _empty(source) from error
    except Exception as error:  # the builders raise whatever their parsers raise
        raise (_empty(source) if "corresponds to no data" in str(error) else unreadable(source, error)) from error


def _next(rows: Iterator[dict[str, Any]], source: str) -> dict[str, Any] | None:
    """The next row of a stream; None behind the last."""
    try:
        return next(rows, None)
    except Exception as error:  # as above
        raise unreadable(source, error) from error


def _empty(source: str) -> InputError:
    return InputError(f"data source {source!r} is empty: it has no rows")


def _records(
    dataset: Any,
    source: str,
    config: DataConfig,
    root: Path,
    process: int,
    processes: int,
    within: tuple[str, ...] | None = None,
) -> Records | RecordStream:
    table = _as_table(dataset)
    features = (dataset.features or _columns_of(dataset, source)) if table is None else table.features
    features = {name: feature for name, feature in features.items() if name not in (KEY, BEGINS)}
    if not features:
        raise _empty(source)
    image = _column(features, config.image_column, IMAGE_COLUMNS, "image", source)
    question = None
    if config.question_column or any(name in features for name in QUESTION_COLUMNS):
        question = _column(features, config.question_column, QUESTION_COLUMNS, "question", source)
    caption = None
    if question is None:
        caption = _column(features, config.caption_column, CAPTION_COLUMNS, "caption", source)
    elif config.caption_column or any(name in features for name in ANSWER_COLUMNS):
        caption = _column(features, config.caption_column, ANSWER_COLUMNS, "caption", source)
    for name, feature in features.items():  # no library is to open what a column names
        encoded = _encoded(feature)
        if encoded is not None:
            dataset = dataset.cast_column(name, encoded)
            table = _as_table(dataset)
    about = tuple(name for name in ABOUT_COLUMNS if name in features)
    classes = {name: names for name, feature in features.items() if (names := class_names(feature))}
    group = None
    # Answers are mixed, whatever they are about.
    if config.group_column in features and question is None:
        group = config.group_column
    columns = Columns(source, image, caption, question, about, root, classes, within, group, config.group_share)
    if table is None:
        if group is not None:
            raise InputError(
                f"data.group_column is {group}, but {source!r} is read as a stream, whose records come as they lie: set"
                " data.streaming to false, or leave group_column out and write near twins beside each other"
            )
        return RecordStream(dataset, columns, process, processes)
    if len(table) == 0:
        raise _empty(source)
    records = Records(table, columns)
    first = [records[i].unusable for i in range(min(len(records), LOOKED_AT))]
    if first[0] is not None and all(first):
        others = f", and no other of the first {len(first)} rows can" if len(first) > 1 else ""
        raise InputError(f"{records[0].key} cannot be used{others}: {first[0][1]}")
    return records


def _as_table(dataset: Any) -> Table | None:
    """What can be read in any order; None for a stream."""
    if isinstance(dataset, Table):
        return dataset
    return Table(dataset) if isinstance(dataset, datasets.Dataset) else None


def _encoded(feature: Any) -> Any:
    """The type of a column that the library would decode, without that; None of a column that it reads as it is."""
    if isinstance(feature, datasets.List | datasets.LargeList):
        inner = _encoded(feature.feature)
        return inner and type(feature)(inner)
    return replace(feature, decode=False) if getattr(feature, "decode", False) else None


def _columns_of(dataset: datasets.IterableDataset, source: str) -> dict[str, Any]:
    """The columns that the first rows of a stream have between them, but for what is said of shards."""
    names: dict[str, Any] = {}
    rows, broken, seen = iter(dataset), [], 0
    while seen < LOOKED_AT and (row := _next(rows, source)) is not None:
        if BROKEN in row:
            broken.append(row)
            if not names and len(broken) == BROKEN_AT_FIRST:
                break
        else:
            names |= row
            seen += 1
    if not names and broken:
        raise InputError(f"data source {source!r} cannot be read: {broken[0][KEY]}: {broken[0][BROKEN]}")
    return dict.fromkeys(name for name in names if name not in (KEY, BEGINS))


def _column(names: Any, wanted: str | None, usual: tuple[str, ...], kind: str, source: str) -> str:
    found = [name for name in ([wanted] if wanted else usual) if name in names]
    if not found:
        raise InputError(
            f"data source {source!r} has no {kind} column{f' {wanted!r}' if wanted else ''}: its columns are"
            f" {', '.join(names)}; name one with data.{kind}_column"
        )
    return found[0]

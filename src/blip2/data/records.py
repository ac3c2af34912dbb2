"""What one example is, and readers for what people have.

Everything is read through the ``datasets`` library: memory-mapped tables where the number of rows is known, streams
where it is not. Images stay encoded here; :mod:`blip2.data.images` decodes them later, in other processes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from jaxtyping import Int

from blip2.config import DataConfig
from blip2.data.benchmarks import find_shards, is_benchmark, read_benchmark
from blip2.data.shards import BEGINS, BROKEN, IMAGE_SUFFIXES, KEY, expand_files, is_url, stream_shards, unreadable
from blip2.errors import InputError

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_path", "file_name", "filename", "img", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "texts", "sentence", "sentences")
ANSWER_COLUMNS = ("answers", "answer")
QUESTION_COLUMNS = ("question",)
NAME_COLUMNS = ("image_key", "coco_id")
ABOUT_COLUMNS = ("image_id", "question_id", "question_type", "answer_type", "domain")
BUILDERS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".tar": "webdataset"
}  # fmt: skip


ROWS_AT_ONCE = 50_000
"""Of a benchmark become a table together: as Python's objects they take ten times as much memory."""

LOOKED_AT = 20
"""So many rows of shards are read to learn their columns: a sample may lack one."""
BROKEN_AT_FIRST = 10
"""So many shards without a row, one after the other, and there is nothing to be learned."""


@dataclass(frozen=True)
class Record:
    """One image and what is said about it."""

    key: str
    """Names it in messages."""
    image: str | bytes | None
    """Path or encoded bytes; None where the data set has none, which is found out when it is decoded."""
    captions: tuple[str, ...]
    """Those that are not blank; of a question the answers, each as often as it was given."""
    question: str | None = None
    """What is asked about the image; None where captions are to be written."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What its row says in the :data:`ABOUT_COLUMNS`, by which results are told apart and handed in."""
    broken: str | None = None
    """Why the rest of a shard could not be read, which this record stands for."""
    begins: bool = False
    """Whether a shard begins with it."""

    @property
    def image_id(self) -> int:
        """Equal for equal images (by path, or by content where there is no path), in 63 bits."""
        name = self.image if isinstance(self.image, bytes) else str(self.image).encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class _Columns:
    """How to make records of a data set's rows."""

    source: str
    image: str
    caption: str | None
    """None for questions whose answers are not published."""
    question: str | None
    about: tuple[str, ...]
    root: Path
    """Where relative paths of images start."""
    group: str | None = None
    """Column whose equal values belong into one batch."""
    group_share: float = 1.0
    """Share of the groups that do."""

    def record(self, row: dict[str, Any], number: int) -> Record:
        begins = row.get(BEGINS, False)
        if BROKEN in row:
            return Record(row[KEY], None, (), broken=row[BROKEN], begins=begins)
        image = _unpacked(row.get(self.image))
        if image and not isinstance(image, bytes):
            image = str(self.root / str(image))
        key = row.get(KEY) or f"{self.source} row {number}" + (f" ({image})" if isinstance(image, str) else "")
        question = " ".join(str(row.get(self.question) or "").split()) if self.question else ""
        about = {name: row[name] for name in self.about if row.get(name) is not None}
        captions = clean_captions(row.get(self.caption)) if self.caption else ()
        return Record(key, image or None, captions, question or None, about, begins=begins)


def _unpacked(image: Any) -> Any:
    """The path or the bytes of a cell: Hugging Face's image has one of them, or both."""
    return (image.get("bytes") or image.get("path")) if isinstance(image, dict) else image


def clean_captions(value: Any) -> tuple[str, ...]:
    """The captions of a cell that holds one, a list of them, or nothing; whitespace is collapsed."""
    captions = value if isinstance(value, list | tuple) else [value]
    return tuple(" ".join(str(c).split()) for c in captions if c is not None and str(c).strip())


class Records(Sequence[Record]):
    """Records that can be read in any order."""

    def __init__(self, dataset: datasets.Dataset, columns: _Columns) -> None:
        self._dataset = dataset
        self._columns = columns
        self._captions = dataset.select_columns([columns.caption] if columns.caption else [])

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._columns.record(self._dataset[int(index)], int(index))

    def part(self, first: int, count: int) -> Records:
        """So many records from one on."""
        return Records(self._dataset.select(range(first, first + count)), self._columns)

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
        values = self._dataset.select_columns([self._columns.group])[:][self._columns.group]
        return np.unique([str(value) for value in values], return_inverse=True)[1]

    def captions(self, indices: Sequence[int]) -> list[tuple[str, ...]]:
        """Captions of some records, without reading their images."""
        if self._columns.caption is None:
            return [()] * len(indices)
        return [clean_captions(value) for value in self._captions[list(indices)][self._columns.caption]]

    @property
    def holds_images(self) -> bool:
        """Whether images lie within it, and not in files of their own."""
        return not isinstance(self[0].image, str)

    def image_names(self) -> Iterator[dict[str, Any]]:
        """What each record's image is called: its path, or a digest of its bytes, as ``image``; of the data sets of the
        paper the names that :func:`blip2.data.benchmarks.check_disjoint` compares. No file is opened."""
        names = [name for name in NAME_COLUMNS if name in self._dataset.column_names]
        root = os.path.abspath(self._columns.root)  # noqa: PTH100  (of millions of paths Path would make a minute)
        named = self._dataset.select_columns([self._columns.image, *names])
        for start in range(0, len(self), 1000):
            rows = named[start : start + 1000]
            for cell, *others in zip(*(rows[name] for name in (self._columns.image, *names)), strict=True):
                image = _unpacked(cell)
                if isinstance(image, bytes):
                    image = hashlib.blake2b(image, digest_size=16).hexdigest()
                elif image:
                    image = os.path.join(root, str(image))  # noqa: PTH118
                    image = os.path.normpath(image) if "/." in image or "//" in image else image
                yield {"image": image or None, **dict(zip(names, others, strict=True))}


class RecordStream:
    """Records that come in an order of their own, from local files or over a network.

    Each of N processes reads its own share: its own shards where there are enough for all, otherwise every N-th record
    of all shards. The position can be taken down and gone back to.
    """

    def __init__(self, dataset: datasets.IterableDataset, columns: _Columns, process: int, processes: int) -> None:
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
        return _records(dataset, source, config, Path(), process, processes)
    path, remote = Path(source), is_url(source)
    if not remote and path.is_dir():
        return _open_folder(path, config, process, processes)
    suffix = path.suffix.lower()
    if suffix not in BUILDERS:
        raise InputError(
            f"data source {source!r} is neither a folder nor a file ending in {', '.join(BUILDERS)}: check the path,"
            " or write hub:NAME for a data set on the Hugging Face hub"
        )
    files = expand_files(source)
    builder = BUILDERS[suffix]
    options: dict[str, Any] = {"data_files": {"train": files}, "split": "train"}
    if suffix == ".tsv":
        options["sep"] = "\t"
    streaming = builder == "webdataset" or remote if streaming is None else streaming
    if streaming and builder in ("webdataset", "parquet"):
        dataset = stream_shards(files)
    else:
        dataset = _load(source, datasets.load_dataset, builder, streaming=streaming, **options)
        if builder == "webdataset":
            dataset = _spread_json(dataset)
    return _records(dataset, source, config, path.parent, process, processes)


def _spread_json(dataset: datasets.Dataset) -> datasets.Dataset:
    """What the ``.json`` of a sample says as columns beside its other members, which come first."""
    known: Any = dataset.features
    said = known.get("json")
    for name in said if isinstance(said, dict) else ():
        if name not in known:
            column = dataset.data.column("json").combine_chunks().field(name)
            dataset = dataset.add_column(name, column, feature=said[name])
    return dataset


def _table(source: str) -> datasets.Dataset:
    """The rows of a benchmark that records are made of, in memory without their pictures."""
    wanted = ("image", *CAPTION_COLUMNS, *QUESTION_COLUMNS, *ANSWER_COLUMNS, *ABOUT_COLUMNS, *NAME_COLUMNS)
    rows = ({name: value for name, value in row.items() if name in wanted} for row in read_benchmark(source))
    parts = []
    while part := list(islice(rows, ROWS_AT_ONCE)):
        parts.append(datasets.Dataset.from_list(part))
    return datasets.concatenate_datasets(parts)


def _open_folder(folder: Path, config: DataConfig, process: int, processes: int) -> Records | RecordStream:
    for saved in (folder, folder / config.split):
        if (saved / "dataset_info.json").is_file():
            dataset = _load(str(saved), datasets.load_from_disk, str(saved))
            return _records(dataset, str(saved), config, folder, process, processes)
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = ", ".join(json.loads(splits.read_text(encoding="utf-8"))["splits"])
        raise InputError(f"data source {folder} has the splits {names}, not {config.split}: name one with data.split")
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).is_file():
            return open_records(str(folder / name), config, process, processes)
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise InputError(f"folder {folder} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no metadata.jsonl")
    texts = [path.with_suffix(".txt") for path in images]
    if not any(text.is_file() for text in texts):
        raise InputError(
            f"folder {folder} holds {len(images)} images but no captions: put a .txt beside each image, or a"
            " metadata.jsonl with file_name and caption"
        )
    captions = [t.read_text(encoding="utf-8", errors="replace").splitlines() if t.is_file() else [] for t in texts]
    table = datasets.Dataset.from_dict(
        {"image": [str(path.relative_to(folder)) for path in images], "captions": captions}
    )
    return Records(table, _Columns(str(folder), "image", "captions", None, (), folder))


def _load(source: str, load: Callable[..., Any], name: str, **options: Any) -> Any:
    try:
        return load(name, **options)
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
    dataset: Any, source: str, config: DataConfig, root: Path, process: int, processes: int
) -> Records | RecordStream:
    features = dataset.features or _columns_of(dataset, source)
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
    if isinstance(features[image], datasets.Image):
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    about = tuple(name for name in ABOUT_COLUMNS if name in features)
    group = None
    # Answers are mixed, whatever they are about.
    if config.group_column in features and question is None:
        group = config.group_column
    columns = _Columns(source, image, caption, question, about, root, group, config.group_share)
    if isinstance(dataset, datasets.IterableDataset):
        if group is not None:
            raise InputError(
                f"data.group_column is {group}, but {source!r} is read as a stream, whose records come as they lie: set"
                " data.streaming to false, or leave group_column out and write near twins beside each other"
            )
        return RecordStream(dataset, columns, process, processes)
    if len(dataset) == 0:
        raise _empty(source)
    return Records(dataset, columns)


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

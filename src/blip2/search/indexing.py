"""Bring a library up to date with a source: embed new and changed images, delete those that are gone, build the index.

Rows are written in batches, each of which LanceDB commits as a whole. A killed run therefore leaves a library that can
be searched, and the next run continues: it embeds only what the library does not contain.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from jaxtyping import Float
from pyarrow import compute
from torch import Tensor

from blip2.config import DataConfig, Precision
from blip2.console import Display
from blip2.corpus.models import resolve_checkpoint
from blip2.data.assets import resolve
from blip2.data.benchmarks import is_benchmark
from blip2.data.images import ImageError, preprocess, read_bytes, read_image, unreadable_image
from blip2.data.records import Record, Records, RecordStream
from blip2.data.shards import is_url
from blip2.data.sources import open_records
from blip2.errors import InputError
from blip2.feature_cache.store import digest
from blip2.io import atomic_write, convert_os_errors, lock_folder
from blip2.pipelines import RepresentationPipeline, load
from blip2.search.columns import TYPES, column_name, convert_cell, infer_types
from blip2.search.library import (
    EXACT_ROWS,
    MEAN,
    OWN_COLUMNS,
    TABLE,
    VECTORS,
    Library,
    connect,
    convert_lance_errors,
    library_uri,
    read_vectors,
    sql_text,
    to_stored,
)
from blip2.search.options import Vectors

log = logging.getLogger("blip2")

WRITE_ROWS = 1024
"""Maximum number of rows that are written at a time."""
WRITE_SECONDS = 10.0
"""Rows are written after this time at the latest, so that a killed run loses no more than this."""
MAX_PENDING_BYTES = 256 << 20
"""Rows are written before their images exceed this size."""
PROBE_RECORDS = 200
"""Number of records of a stream, or of a table with embedded images, from which the types of columns are inferred."""
SKIPPED_FILE = "skipped.jsonl"
"""File in the folder of a library that names each image that the last run skipped, with the reason."""
MAX_WARNINGS = 20
"""Maximum number of skipped images of which a warning is logged."""
MAX_SMALL_FILES = 100
"""Maximum number of files with few rows that a library with an index may have before they are merged."""
NUM_BITS = 3
"""Bits per dimension of a vector in the index. With LanceDB's default of 1, fewer of the nearest images are found: see
docs/search.md."""
INDEXED_ROWS = "indexed_rows"
"""Key, in the metadata of the column of the vectors, of the number of rows from which the index was built."""


@dataclass
class IndexReport:
    """The result of :func:`index`."""

    added: int = 0
    """Number of new images."""
    updated: int = 0
    """Number of images whose bytes, captions or metadata have changed."""
    deleted: int = 0
    """Number of images that are no longer in the source."""
    unchanged: int = 0
    embedded: int = 0
    """Number of images that went through the model. Images with the same bytes are embedded once."""
    duplicates: int = 0
    """Number of images of the library that have the same bytes as another one."""
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    """Images that cannot be used: name, category of the problem, message."""
    notes: list[str] = field(default_factory=list)
    """Remarks, such as cells that do not have the type of their column."""
    images: int = 0
    """Number of images in the library."""

    def as_json(self) -> dict[str, Any]:
        """Return the numbers, the number of skipped images by category, and the notes."""
        reasons = Counter(reason for _, reason, _ in self.skipped)
        return {**vars(self), "skipped": dict(reasons), "notes": self.notes}


def index(
    model: str | RepresentationPipeline,
    data: str,
    output: str | Path,
    *,
    vectors: Vectors | None = None,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    device: str | None = None,
    dtype: Precision | None = None,
    overrides: dict[str, object] | None = None,
) -> IndexReport:
    """Bring a library of images up to date with a source, or make the library.

    Only images that are new or have changed are embedded; images that are no longer in the source are deleted. A
    library may contain several sources: images of other sources are kept.

    Args:
        model: a stage-1 checkpoint of any format that :func:`blip2.load` reads, or a model that is already loaded.
        data: a folder of images, or any source that data.train of a recipe can name (docs/data.md). Captions are
            optional; all other columns become metadata.
        output: folder of the library, or its URI on object storage.
        vectors: all: store the vectors of all queries of an image. 1: store their mean, which takes less space; a
            search then reads the images of its shortlist again. None: as the library is, and all for a new library.
        split: split of a data set of the Hugging Face Hub, or of a folder that was written by save_to_disk.
        image_column: column of the image. None: it is found by its name, as data.image_column of a recipe.
        caption_column: column of the captions. None: it is found by its name, if there is one.
        device: device to run on: cpu, cuda, cuda:1 or mps. None: a GPU if there is one.
        dtype: data type of the image encoder. None: the dtype in the model's config, else bf16 on a CUDA GPU and fp32
            on other devices.
        overrides: keys of the model's config to override.

    Raises:
        InputError: the model or the source cannot be read; the library cannot be written, is being written by another
            process, or was made with another model or with other `vectors`; or LanceDB is not installed.
    """
    uri = library_uri(output)
    connect(uri)  # fail before the work
    source = resolve(data)
    if not (is_url(source) or source.startswith("hub:") or is_benchmark(source)):
        source = str(Path(source).absolute())
    config = DataConfig(train=source, split=split, image_column=image_column, caption_column=caption_column)
    records = open_records(source, config, all_columns=True)
    with _lock(uri):
        pipeline = model if isinstance(model, RepresentationPipeline) else _load(model, device, dtype, overrides)
        library = _open_or_create(uri, pipeline, vectors)
        return _Update(library, pipeline, source).run(records)


def _load(
    model: str, device: str | None, dtype: Precision | None, overrides: dict[str, object] | None
) -> RepresentationPipeline:
    pipeline = load(resolve_checkpoint(model), device, dtype, overrides=overrides, stage="representation")
    assert isinstance(pipeline, RepresentationPipeline)
    return pipeline


@contextmanager
def _lock(uri: str) -> Iterator[None]:
    """Lock a library for writing, because LanceDB's writers may duplicate each other's rows.

    A library on object storage is locked against other processes of this machine only.
    """
    folder = Path(uri)
    if is_url(uri):
        name = hashlib.blake2b(uri.encode(), digest_size=16).hexdigest()
        folder = Path(tempfile.gettempdir()) / f"blip2-library-{name}"
    with lock_folder(folder, name=uri):
        yield


def _open_or_create(uri: str, pipeline: RepresentationPipeline, vectors: Vectors | None) -> Library:
    with convert_lance_errors(uri):
        exists = TABLE in connect(uri).list_tables().tables
    if not exists:
        return Library.create(uri, pipeline, vectors or "all")
    library = Library.open(uri, pipeline)
    if vectors not in (None, library.config.vectors):
        raise InputError(
            f"the library {uri} was made with --vectors {library.config.vectors}, not {vectors}: leave it out, or"
            " give another output"
        )
    return library


@dataclass
class _Row:
    """A row that waits to be written."""

    cells: dict[str, Any]
    image: str | bytes
    """Path or bytes of the image."""
    is_new: bool
    vectors: Float[np.ndarray, "Q C"] | None = None
    """None: they are not computed yet, or are those of another image with the same bytes."""


class _Update:
    """Compares a source with a library, and changes the library.

    Args:
        library: the library, which this process has locked.
        pipeline: the model of the library.
        source: name of the source.
    """

    def __init__(self, library: Library, pipeline: RepresentationPipeline, source: str) -> None:
        self.library, self.pipeline, self.source = library, pipeline, source
        self.table = library.table
        self.report = IndexReport()
        self._pending: list[_Row] = []
        self._pending_bytes = 0
        self._to_embed: list[tuple[_Row, Tensor]] = []
        self._written = time.monotonic()
        self._columns: dict[str, tuple[str, pyarrow.DataType]] = {}
        self._bad_cells: dict[str, tuple[int, str]] = {}
        with convert_lance_errors(library.uri):
            names = ["source", "image", "digest", "size", "modified", "record"]
            rows = self.table.search().select(names).to_arrow()
            self._version = self.table.version
        self._digests: set[str] = set(rows["digest"].to_pylist())
        own = rows.filter(compute.field("source") == source)
        self._stored = {name: own[name].to_pylist() for name in names[1:]}
        self._positions = {image: number for number, image in enumerate(self._stored["image"])}
        self._seen = np.zeros(len(own), bool)
        self._new: set[str] = set()

    def run(self, records: Records | RecordStream) -> IndexReport:
        """Bring the library up to date with `records`."""
        images, total, types = _list_images(records)
        self._add_columns(types)
        display = Display("index")
        display.start(total)
        is_complete, started = True, time.monotonic()
        try:
            for done, group in enumerate(images, 1):
                is_complete &= self._compare(group)
                if (
                    len(self._pending) >= WRITE_ROWS
                    or self._pending_bytes > MAX_PENDING_BYTES
                    or time.monotonic() - self._written > WRITE_SECONDS
                ):
                    self._write()
                display.update(done, f"images  {done / (time.monotonic() - started):.1f} images/s")
            self._write()
        finally:
            display.close()
        if is_complete:
            self._delete_missing()
        elif not self._seen.all():
            self.report.notes.append("no image was deleted, because a part of the source could not be read")
        for name, (count, example) in self._bad_cells.items():
            self.report.notes.append(f"column {name}: {count} cells are stored as missing; the first, of {example}")
        with convert_lance_errors(self.library.uri):
            self._check_version()  # because optimizing deletes the files of a write that is not complete
            optimize(self.library)
            digests = self.table.search().select(["digest"]).to_arrow()["digest"]
        self.report.images, self.report.duplicates = len(digests), len(digests) - len(digests.unique())
        if not is_url(self.library.uri):
            file = Path(self.library.uri) / SKIPPED_FILE
            lines = [dict(zip(("image", "reason", "message"), each, strict=True)) for each in self.report.skipped]
            with convert_os_errors(file), atomic_write(file) as out:
                out.writelines(json.dumps(line).encode() + b"\n" for line in lines)
        return self.report

    # -- metadata ------------------------------------------------------------------------------------------------------

    def _add_columns(self, types: Mapping[str, pyarrow.DataType]) -> None:
        """Add the columns that the library does not have."""
        with convert_lance_errors(self.library.uri):
            existing = {each.name: each.type for each in self.table.schema}
            names = {name: column_name(name, OWN_COLUMNS) for name in types}
            for name, same in combinations(names, 2):
                if names[name] == names[same]:
                    raise InputError(
                        f"found the columns {name!r} and {same!r}, which would both be {names[name]} in the library:"
                        " rename one of them"
                    )
            new = {names[name]: kind for name, kind in types.items() if names[name] not in existing}
            if new:
                self._check_version()
                self.table.add_columns(pyarrow.schema(new))
                self._version = self.table.version
        self._columns = {name: (names[name], (existing | new)[names[name]]) for name in types}
        wrong = next((column for column, kind in self._columns.values() if kind not in TYPES.values()), None)
        if wrong is not None:
            raise InputError(
                f"the column {wrong} of the library {self.library.uri} has the type {(existing | new)[wrong]}, expected"
                f" one of {', '.join(TYPES)}: give another output"
            )

    def _metadata(self, record: Record) -> dict[str, Any]:
        cells = {}
        for name, cell in record.other_columns.items():
            if name not in self._columns:
                self._note_bad_cell(name, f"{record.key}, is in a column that the first records do not have")
                continue
            column, kind = self._columns[name]
            try:
                cells[column] = convert_cell(cell, kind)
            except ValueError as error:
                self._note_bad_cell(column, f"{record.key}, is {error}")
        return cells

    def _note_bad_cell(self, column: str, example: str) -> None:
        count, first = self._bad_cells.get(column, (0, example))
        self._bad_cells[column] = count + 1, first

    # -- comparison ----------------------------------------------------------------------------------------------------

    def _compare(self, records: Sequence[Record]) -> bool:
        """Compare an image with the library, and prepare a row if one has to be written.

        Args:
            records: the records of the image, which have the same path. Their captions are joined; the metadata is that
                of the first.

        Returns:
            False if the record stands for a part of the source that cannot be read.
        """
        record = records[0]
        if record.error is not None:
            self._skip(record.key, "shard broken", record.error)
            return False
        if record.image is None:
            reason, message = record.skip_reason or ("image", "it has no image")
            self._skip(record.key, f"{reason} not read", message)
            return True
        name = record.image if isinstance(record.image, str) else record.key
        name = name.encode(errors="backslashreplace").decode()  # Arrow stores no lone surrogates
        position = self._positions.get(name)
        if name in self._new or (position is not None and self._seen[position]):
            self._skip(name, "name used twice", "an earlier image of the source has the same name")
            return True
        try:
            row, is_changed = self._make_row(record, records, name, position)
        except _UnreadableError as error:  # the file may come back, so that its row stays in the library
            self._skip(name, "image not read", str(error))
            if position is not None:
                self._seen[position] = True
            return True
        except ImageError as error:
            self._skip(name, "image not decoded", str(error))
            return True
        if position is None:
            self._new.add(name)
        else:
            self._seen[position] = True
        if not is_changed:
            self.report.unchanged += 1
            return True
        if position is None:
            self.report.added += 1
        else:
            self.report.updated += 1
        self._pending.append(row)
        self._pending_bytes += len(row.cells.get("data", b""))
        return True

    def _make_row(
        self, record: Record, records: Sequence[Record], name: str, position: int | None
    ) -> tuple[_Row, bool]:
        """Return the row of an image, and whether it differs from the row in the library."""
        assert record.image is not None
        captions = list(dict.fromkeys(caption for each in records for caption in each.captions))
        cells: dict[str, Any] = {"source": self.source, "image": name, "captions": captions, **self._metadata(record)}
        cells["record"] = digest(json.dumps(cells, sort_keys=True).encode())
        row = _Row(cells, record.image, position is None)
        stored = {} if position is None else {key: values[position] for key, values in self._stored.items()}
        is_same_record = stored.get("record") == cells["record"]
        if isinstance(record.image, str):
            cells |= _describe_file(record.image)
            if is_same_record and all(stored[key] == cells[key] for key in ("size", "modified")):
                return row, False
            try:
                data = read_bytes(record.image)
            except ImageError as error:
                raise _UnreadableError(str(error)) from error
        else:
            data = cells["data"] = record.image
        cells["digest"] = digest(data)
        if "data" in cells and is_same_record and stored["digest"] == cells["digest"]:
            return row, False
        if cells["digest"] not in self._digests:
            self._prepare(row, data)
            self._digests.add(cells["digest"])
        return row, True

    def _prepare(self, row: _Row, data: bytes) -> None:
        """Decode the image of a row; images are embedded as soon as there are enough for a forward pass."""
        image = read_image(data, f"image {row.cells['image']}")
        self._to_embed.append((row, preprocess(image, self.pipeline.model.vision.preprocessing)))
        if len(self._to_embed) >= self.pipeline.batch_size:
            self._embed()

    def _embed(self) -> None:
        if self._to_embed:
            features = self.pipeline.encode_pixels(torch.stack([pixels for _, pixels in self._to_embed]))
            embedded = self.pipeline.embed_images(features).float().cpu().numpy()
            for (row, _), vectors in zip(self._to_embed, embedded, strict=True):
                row.vectors = vectors
            self.report.embedded += len(self._to_embed)
            self._to_embed = []

    def _skip(self, key: str, reason: str, message: str) -> None:
        self.report.skipped.append((key, reason, message))
        if len(self.report.skipped) <= MAX_WARNINGS:
            log.warning("skipped %s: %s", key, message)

    # -- writing -------------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Write all rows that wait, in one commit."""
        self._embed()
        rows, self._pending, self._pending_bytes = self._pending, [], 0
        self._written = time.monotonic()
        rows = self._copy_vectors(rows)
        if not rows:
            return
        with convert_lance_errors(self.library.uri):
            self._check_version()
            schema, config = self.table.schema, self.library.config
            vectors = to_stored(np.stack([row.vectors for row in rows if row.vectors is not None]), config)
            columns = [
                vectors if each.name in (VECTORS, MEAN) else [row.cells.get(each.name) for row in rows]
                for each in schema
            ]
            arrays = [pyarrow.array(column, each.type) for column, each in zip(columns, schema, strict=True)]
            table = pyarrow.Table.from_arrays(arrays, schema=schema)
            if all(row.is_new for row in rows):
                self.table.add(table)
            else:
                merge = self.table.merge_insert(["source", "image"])
                merge.when_matched_update_all().when_not_matched_insert_all().execute(table)
            self._version = self.table.version

    def _copy_vectors(self, rows: list[_Row]) -> list[_Row]:
        """Give rows whose image was not embedded the vectors of an image with the same bytes."""
        known = {row.cells["digest"]: row.vectors for row in rows if row.vectors is not None}
        missing = {row.cells["digest"] for row in rows} - set(known)
        if missing:
            column = VECTORS if self.library.config.vectors == "all" else MEAN
            with convert_lance_errors(self.library.uri):
                where = f"digest IN ({', '.join(map(sql_text, sorted(missing)))})"
                found = self.table.search().where(where).select(["digest", column]).to_arrow()
            known |= dict(zip(found["digest"].to_pylist(), read_vectors(found, self.library.config), strict=True))
        complete = []
        for row in rows:
            row.vectors = known.get(row.cells["digest"])
            try:
                if row.vectors is None:  # the image whose vectors were to be copied has changed in this run
                    self._prepare(row, row.image if isinstance(row.image, bytes) else read_bytes(row.image))
            except ImageError as error:
                self._skip(row.cells["image"], "image not read", str(error))
                continue
            complete.append(row)
        self._embed()
        return complete

    def _delete_missing(self) -> None:
        gone = [self._stored["image"][number] for number in np.flatnonzero(~self._seen).tolist()]
        for start in range(0, len(gone), WRITE_ROWS):
            names = ", ".join(map(sql_text, gone[start : start + WRITE_ROWS]))
            with convert_lance_errors(self.library.uri):
                self._check_version()
                self.table.delete(f"source = {sql_text(self.source)} AND image IN ({names})")
                self._version = self.table.version
        self.report.deleted = len(gone)

    def _check_version(self) -> None:
        if self.table.version != self._version:
            raise InputError(
                f"the library {self.library.uri} was changed by another process while this one was writing to it: let"
                " one process write at a time, and run the command again"
            )


class _UnreadableError(ImageError):
    """An image file that cannot be read, as opposed to one that cannot be decoded."""


def _describe_file(path: str) -> dict[str, int]:
    try:
        stat = Path(path).stat()
    except (OSError, ValueError) as error:
        raise _UnreadableError(str(unreadable_image(path, error))) from error
    return {"size": stat.st_size, "modified": stat.st_mtime_ns}


def _list_images(
    records: Records | RecordStream,
) -> tuple[Iterator[Sequence[Record]], int | None, dict[str, pyarrow.DataType]]:
    """List the images of a source.

    Returns:
        The records of each image; the number of images, or None if it is unknown; and the types of the other columns.
        Records of a table that name the same file belong to the same image.
    """
    if isinstance(records, Records) and not records.has_embedded_images:
        groups: dict[str | int, list[int]] = {}

        def read_columns() -> Iterator[Mapping[str, Any]]:
            for number in range(len(records)):
                record = records[number]
                groups.setdefault(record.image if isinstance(record.image, str) else number, []).append(number)
                yield record.other_columns

        types = infer_types(read_columns())
        return ([records[number] for number in group] for group in groups.values()), len(groups), types
    total = len(records) if isinstance(records, Records) else None
    every = iter(records) if isinstance(records, Records) else records.read()
    first = list(islice(every, PROBE_RECORDS))
    types = infer_types(record.other_columns for record in first)
    return ([record] for record in chain(first, every)), total, types


# -- the index of the vectors ------------------------------------------------------------------------------------------


def optimize(library: Library) -> None:
    """Merge small files, delete old ones, and build the index of the vectors, if it is worth the time.

    A library of more than :data:`~blip2.search.library.EXACT_ROWS` rows has an index (IVF with RaBitQ). It is not
    extended, because LanceDB takes longer for that than for building it: a search compares images that were added
    later one by one. The index is rebuilt when more than ``EXACT_ROWS`` images have been added or deleted since, or
    when there are more than :data:`MAX_SMALL_FILES` small files.
    """
    from lancedb.index import IvfRq

    table, column = library.table, VECTORS if library.config.vectors == "all" else MEAN
    names = [each.name for each in table.list_indices() if each.columns == [column]]
    rows = table.count_rows()
    if names:
        stats: Any = table.index_stats(names[0])
        files: Any = table.stats()
        metadata = table.schema.field(column).metadata or {}
        deleted = int(metadata.get(INDEXED_ROWS.encode(), stats.num_indexed_rows)) - stats.num_indexed_rows
        changed = stats.num_unindexed_rows + deleted
        if rows > EXACT_ROWS >= changed and files["fragment_stats"]["num_small_fragments"] <= MAX_SMALL_FILES:
            return
        # Merging the files of a table with an index rewrites the index, which takes longer than building it.
        table.drop_index(names[0])
    _merge_files(table)
    if rows > EXACT_ROWS:
        table.create_index(column, config=IvfRq(distance_type="cosine", num_bits=NUM_BITS))
        table.update_field_metadata({"path": column, "metadata": {INDEXED_ROWS: str(rows)}})


def _merge_files(table: Any) -> None:
    with warnings.catch_warnings():
        # LanceDB warns that readers of an older version will fail. A Library then reads the newest version.
        warnings.simplefilter("ignore")
        table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)

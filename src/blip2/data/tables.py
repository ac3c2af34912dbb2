"""Tables whose rows may differ in columns and types: CSV, TSV, JSON, JSON Lines, and shards read as a table.

Arrow needs one type for each column, and libraries that infer it change values (``007`` to 7, a date to a timestamp).
Each row is therefore stored as one JSON text, which is parsed when the row is read; values that are bytes are stored in
a separate column. The table is a memory-mapped dataset of the ``datasets`` library and is built once for all processes.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow
from datasets.config import HF_DATASETS_CACHE
from filelock import FileLock

from blip2.data.cells import METADATA_COLUMNS, describe, detect_encoding, first_column
from blip2.data.json_stream import MAX_VALUE_CHARACTERS, iter_members
from blip2.errors import InputError
from blip2.io import atomic_write

Row = dict[str, Any]
TEXT_TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
COMPRESSED_SUFFIXES = {
    ".gz": "gzip", ".tgz": "gzip", ".bz2": "bzip2", ".tbz2": "bzip2", ".xz": "xz", ".txz": "xz", ".zst": "zstd",
    ".tzst": "zstd", ".zip": "zip",
}  # fmt: skip
"""Kinds of compression by the suffix of a file."""
COMPRESSED_STARTS = {
    rb"\x1f\x8b": "gzip", rb"BZh[1-9]1AY": "bzip2", rb"\xfd7zXZ\0": "xz", rb"\x28\xb5\x2f\xfd": "zstd",
    rb"PK\x03\x04": "zip",
}  # fmt: skip
"""Kinds of compression by the first bytes of a file, as regular expressions."""
MAGIC_BYTES = 8
"""Number of bytes that :data:`COMPRESSED_STARTS` need."""
CACHE_VERSION = 2
"""Version of the format of cached tables. If the number is changed, all tables are built again."""
MAX_LINE_CHARACTERS = MAX_VALUE_CHARACTERS
"""Maximum number of characters in a line of a table, and in a cell of a CSV file."""
PROBE_CHARACTERS = 1 << 10
"""Number of characters that are read at a time to find the first one of a JSON file that is no white space."""
BATCH_ROWS = 1000
"""Number of rows in an Arrow record batch."""
_ROW, _NAMES, _BYTES = "row", "names", "bytes"
_SCHEMA = pyarrow.schema(
    {
        _ROW: pyarrow.string(),
        _NAMES: pyarrow.string(),
        _BYTES: pyarrow.list_(pyarrow.struct({"name": pyarrow.string(), "data": pyarrow.large_binary()})),
    }
)


# -- reading files ---------------------------------------------------------------------------------------------------


def is_text_table(file: str) -> bool:
    """Return whether :func:`read_text_table` can read a file, according to the suffix of its name."""
    return file.lower().endswith(TEXT_TABLE_SUFFIXES)


def describe_compression(file: str, start: bytes) -> str | None:
    """Describe how a file is compressed, and how to uncompress it.

    Args:
        file: path or URL of the file.
        start: its first :data:`MAGIC_BYTES` bytes; if empty, the suffix of `file` decides.

    Returns:
        The end of a sentence that begins with the file; None if the file is not compressed.
    """
    path = Path(file)
    found = (kind for magic, kind in COMPRESSED_STARTS.items() if re.match(magic, start))
    kind = next(found, None) if start else COMPRESSED_SUFFIXES.get(path.suffix.lower())
    if kind is None:
        return None
    plain = path.stem if path.suffix.lower() in COMPRESSED_SUFFIXES else path.name
    is_table = plain.lower().endswith((*TEXT_TABLE_SUFFIXES, ".parquet"))
    if not is_table and not plain.lower().endswith(".tar"):
        plain += ".tar"
    name, plain, folder = map(shlex.quote, (path.name, plain, plain[:-4]))
    if kind == "zip":
        command = (
            f"unzip {name}" if is_table else f"unzip {name} -d {folder} && tar --sort=name -C {folder} . -cf {plain}"
        )
    else:
        command = f"{kind} -dc {name} > " + (f"{name}.tmp && mv {name}.tmp {name}" if plain == name else plain)
    what = "table" if is_table else "shard, because a run resumes at a position inside a shard"
    return f"is compressed with {kind}, expected an uncompressed {what}: run {command}"


def read_text_table(file: str) -> Iterator[Row]:
    """Read the rows of a CSV, TSV, JSON or JSON Lines file.

    Cells of CSV and TSV files are texts, except integers in :data:`~blip2.data.cells.METADATA_COLUMNS`. In JSON files,
    integers of up to 18 digits are numbers, and all other numbers become texts, as they are written.

    Args:
        file: a path or a URL.

    Raises:
        InputError: the file is not such a table; the message names the line.
    """
    suffix = file[file.rfind(".") :].lower()
    try:
        with fsspec.open(file, "rb") as opened:
            binary: Any = opened
            start = binary.read(MAGIC_BYTES)
            if problem := describe_compression(file, start):
                raise _TableError(problem)
            encoding = detect_encoding(start)
            binary.seek(0)
            errors = "surrogateescape" if encoding == "utf-8-sig" else "surrogatepass"
            newline = "" if suffix in (".csv", ".tsv") else "\n"
            text = io.TextIOWrapper(binary, encoding, errors, newline)
            yield from _read_json(text) if newline else _read_delimited(text, quoted=suffix == ".csv")
            text.detach()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} has the byte order mark of {error.encoding}, but is not in this encoding ({error.reason}): save"
            " the file as UTF-8"
        ) from error
    except _TableError as error:
        raise InputError(f"{Path(file).name} {error}") from error


class _TableError(Exception):
    """An error in a table. The message continues a sentence that begins with the name of the file."""


def _read_delimited(text: io.TextIOWrapper, quoted: bool) -> Iterator[Row]:
    """Read cells as texts. In metadata columns, integers become numbers if that does not change their digits."""
    lines = _csv_cells(text) if quoted else ((n, line.rstrip("\r\n").split("\t")) for n, line in _lines(text))
    names: list[str] | None = None
    for number, cells in lines:
        if cells in ([], [""]):  # blank line
            continue
        if names is None:
            names = cells
            if repeated := {name for name in names if name and names.count(name) > 1}:
                raise _TableError(
                    f"has the column {', '.join(sorted(repeated))} more than once: give each column its own name"
                )
        elif len(cells) != len(names):
            advice = (
                "write texts with commas in quotation marks" if quoted else "remove tabs and line breaks from texts"
            )
            raise _TableError(
                f"line {number} has {len(cells)} cells, expected {len(names)} ({', '.join(names)[:200]}): {advice}"
            )
        else:
            yield {name: _parse_id(cell) if name in METADATA_COLUMNS else cell for name, cell in zip(names, cells)}  # noqa: B905


def _lines(text: io.TextIOWrapper) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line, but do not read a line of gigabytes into memory."""
    for number, line in enumerate(iter(lambda: text.readline(MAX_LINE_CHARACTERS), ""), 1):
        if len(line) == MAX_LINE_CHARACTERS:
            raise _TableError(
                f"line {number} has more than the {MAX_LINE_CHARACTERS:,} characters allowed: check that the file is a"
                " table"
            )
        yield number, line


def _csv_cells(text: io.TextIOWrapper) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_CHARACTERS))
    reader = csv.reader((line for _, line in _lines(text)), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise _TableError(
                f"line {number} is not CSV ({error}): enclose texts with commas or line breaks in quotation marks, and"
                " double the quotation marks inside a text"
            ) from error
        if cells is None:
            return
        yield number, cells


def _parse_id(cell: str) -> int | str:
    return int(cell) if cell.isascii() and cell.isdigit() and len(cell) < 19 and str(int(cell)) == cell else cell


def _parse_int(digits: str) -> int | str:
    """Parse an integer. -0 and integers that may exceed 64 bits are returned as texts."""
    return int(digits) if len(digits) < 19 and digits != "-0" else digits


def _parse_object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(members)
    if len(values) < len(members):
        names = [name for name, _ in members]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated} occurs more than once in an object")
    return values


JSON_DECODER = json.JSONDecoder(parse_float=str, parse_int=_parse_int, object_pairs_hook=_parse_object)
"""Decodes JSON. Numbers with a decimal point or an exponent become texts, as they are written. A repeated key, of whose
values only one could be kept, raises ValueError."""


def _read_json(text: io.TextIOWrapper) -> Iterator[Row]:
    """Read an array of objects, or one object per line."""
    start = next((part for part in iter(lambda: text.read(PROBE_CHARACTERS), "") if part.strip()), "")
    text.seek(0)
    if start.lstrip().startswith("["):  # perhaps all of it in one line
        number = 0
        try:
            for number, (_, value) in enumerate(iter_members(text, JSON_DECODER), 1):
                yield _check_object(value, f"entry {number}")
        except ValueError as error:
            reason = getattr(error, "msg", error)
            raise _TableError(
                f"is not JSON after entry {number} ({reason}), expected an array of objects: correct the file"
            ) from error
        return
    for number, line in _lines(text):
        if not line.strip():
            continue
        try:
            value = JSON_DECODER.decode(line)
        except ValueError as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise _TableError(
                f"line {number} is not JSON ({reason}), expected one object per line, or an"
                " array of objects: correct the file"
            ) from error
        except RecursionError as error:
            raise _TableError(
                f"line {number} is nested too deeply, expected an object with texts: correct the line"
            ) from error
        yield _check_object(value, f"line {number}")


def _check_object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise _TableError(
            f'{where} is {describe(value)}, expected an object: write it as {{"image": ..., "caption": ...}}'
        )
    return value


# -- tables ----------------------------------------------------------------------------------------------------------


def _pack(rows: Iterable[Row]) -> Iterator[pyarrow.RecordBatch]:
    """Convert rows to record batches of :data:`_SCHEMA`.

    The column names are stored only in rows whose columns differ from those of the row before.
    """
    rows, last = iter(rows), None
    while batch := list(islice(rows, BATCH_ROWS)):
        texts, names, data = [], [], []
        for row in batch:
            members = [
                {"name": n.encode(errors="replace").decode(), "data": v} for n, v in row.items() if isinstance(v, bytes)
            ]
            texts.append(json.dumps({n: v for n, v in row.items() if not isinstance(v, bytes)} if members else row))
            columns = list(row)
            names.append(None if columns == last else json.dumps(columns))
            data.append(members or None)
            last = columns
        arrays = [pyarrow.array(c, kind) for c, kind in zip((texts, names, data), _SCHEMA.types, strict=True)]
        yield pyarrow.RecordBatch.from_arrays(arrays, schema=_SCHEMA)


def to_rows(table: pyarrow.Table | pyarrow.RecordBatch) -> list[Row]:
    """Convert an Arrow table to rows.

    Arrow does not check that texts are UTF-8. A text that is not, or the cell that contains it, becomes a text with
    lone surrogates, as :func:`~blip2.data.cells.decode_text` returns it, so that one row is unusable and not the table.
    """
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        columns = [map(_to_cell, column) for column in table.columns]
        return [dict(zip(table.column_names, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _to_cell(scalar: pyarrow.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error.object.decode("utf-8", "surrogateescape")


class Table:
    """Rows with random access.

    Args:
        dataset: a dataset with typed columns, or a dataset with the columns of :data:`_SCHEMA`, as
            :func:`build_cached_table` writes them.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset.with_format("arrow")  # a saved dataset may have another format, such as NumPy's
        self._packed = dataset.column_names == _SCHEMA.names
        self.features: dict[str, Any] = dict(dataset.features)
        """The type of each column, in order; None for columns whose type may differ from row to row."""
        if self._packed:
            listed = [json.loads(names) for names in dataset.unique(_NAMES) if names is not None]
            self.features = {name: None for names in listed for name in names}
            if dataset.data.column(_BYTES).null_count == len(dataset):
                self.dataset = self.dataset.select_columns([_ROW])

    def __len__(self) -> int:
        return len(self.dataset)

    def select_range(self, first: int, count: int) -> Table:
        """Return a table of `count` consecutive rows, starting at the row `first`."""
        table = copy(self)
        table.dataset = self.dataset.select(range(first, first + count))
        return table

    def select_columns(self, names: Sequence[str]) -> Table:
        """Return a table with only the columns `names`; the others are not read from disk.

        A table that stores rows as JSON texts is returned unchanged.
        """
        if self._packed:
            return self
        return Table(self.dataset.select_columns([name for name in self.features if name in names]))

    def row(self, index: int) -> Row:
        """Return one row with the cells of all columns."""
        row = to_rows(self.dataset[index])[0]
        return _unpack(**row) if self._packed else row

    def read_column(self, names: Sequence[str], indices: Sequence[int] | slice) -> list[Any]:
        """Return the cells of one column at `indices`, without reading images. The cells must not be bytes.

        Args:
            names: names of the column; that of a row is the first that it has. The cell of a row without one is None.
            indices: the indices of the rows.
        """
        column: Any = _ROW if self._packed else first_column(self.features, names)
        cells = [row[column] for row in to_rows(self.dataset.select_columns([column])[indices])]
        rows = map(json.loads, cells) if self._packed else ()
        return [row.get(first_column(row, names)) for row in rows] if self._packed else cells

    def iter_rows(self, names: Sequence[str]) -> Iterator[Row]:
        """Iterate over all rows, in order. Only the columns `names` are certain to be in the rows."""
        dataset = self.select_columns(names).dataset
        for start in range(0, len(self), BATCH_ROWS):
            for row in to_rows(dataset[start : start + BATCH_ROWS]):
                yield _unpack(**row) if self._packed else row


def _unpack(row: str, names: str | None = None, bytes: list[Row] | None = None) -> Row:
    values = json.loads(row)
    return values | {member["name"]: member["data"] for member in bytes} if bytes else values


def build_cached_table(files: Sequence[str], read: Callable[[str], Iterator[Row]], kind: str = "") -> Table:
    """Build a table of the rows of files in the cache of the datasets library, or open the table if it is there.

    The table is built again if the size or the time of modification of a file has changed.

    Args:
        files: the paths or URLs of the files.
        read: the function that reads the rows of a file.
        kind: a part of the cache key, for functions that read the same files in different ways.

    Raises:
        InputError: CSV or TSV files have different columns, or `read` raises the error.
    """
    if len(files) > 1:
        _check_headers([file for file in files if file.lower().endswith((".csv", ".tsv"))])
    key = hashlib.blake2b(json.dumps([CACHE_VERSION, kind]).encode(), digest_size=16)
    for file in files:
        path = Path(file).absolute()
        stat = path.stat() if path.is_file() else None
        key.update(json.dumps([str(path), file, stat and stat.st_size, stat and stat.st_mtime_ns]).encode())
    cached = Path(HF_DATASETS_CACHE) / "blip2" / f"{key.hexdigest()}.arrow"
    cached.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cached}.lock"):  # one process builds the table for all
        # After a crash of the machine, the file may be incomplete.
        with contextlib.suppress(OSError, pyarrow.ArrowException):
            return Table(datasets.Dataset.from_file(str(cached)))
        with atomic_write(cached) as out, pyarrow.ipc.new_stream(out, _SCHEMA) as writer:
            for batch in _pack(row for file in files for row in read(file)):
                writer.write_batch(batch)
        return Table(datasets.Dataset.from_file(str(cached)))


def _check_headers(files: Sequence[str]) -> None:
    first: list[str] = []
    for file in files:
        names = list(next(read_text_table(file), {}))
        first = first or names
        if names and set(names) != set(first):
            raise InputError(
                f"{file} has the columns {', '.join(names)}, expected {', '.join(first)} as in the other files: rename"
                " the columns, or give this file as a separate source"
            )


def table_from_rows(rows: Iterable[Row]) -> Table:
    """Return a table of rows that is held in memory."""
    return Table(datasets.Dataset(pyarrow.Table.from_batches(_pack(rows), _SCHEMA)))

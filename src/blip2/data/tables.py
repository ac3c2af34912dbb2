"""Tables of rows that differ from each other: CSV, TSV, JSON, JSON Lines, and shards read as a table.

Arrow wants one type for a column, and the libraries that guess it rewrite what they read (``007`` to 7, a date to a
timestamp). So a row is kept as one text of JSON, which is taken apart when the row is read; bytes lie beside it. The
table itself is one of the ``datasets`` library: memory-mapped, and made once for all processes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
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

from blip2.data.cells import ABOUT_COLUMNS, find_encoding
from blip2.data.json_stream import read_members
from blip2.errors import InputError
from blip2.io import written

Row = dict[str, Any]
TEXT_TABLES = (".csv", ".tsv", ".json", ".jsonl")
LAYOUT = 1
"""Of what is kept in the cache of the datasets library; another number makes it anew."""
LONGEST_CELL = 1 << 28
"""Characters of a cell in a CSV file, at most."""
AT_ONCE = 1000
"""Rows that are written together."""
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
    """Whether :func:`read_text_table` reads a file of this name."""
    return file.lower().endswith(TEXT_TABLES)


def read_text_table(file: str) -> Iterator[Row]:
    """The rows of a CSV, TSV, JSON or JSON Lines file, by path or URL, with every value as it is written.

    Raises:
        InputError: the file is no such table; the message names the line.
    """
    suffix = file[file.rfind(".") :].lower()
    try:
        with fsspec.open(file, "rb") as opened:
            binary: Any = opened
            encoding = find_encoding(binary.read(4))
            binary.seek(0)
            errors = "surrogateescape" if encoding == "utf-8-sig" else "surrogatepass"
            newline = "" if suffix in (".csv", ".tsv") else "\n"
            text = io.TextIOWrapper(binary, encoding, errors, newline)
            yield from _read_json(text) if newline else _read_delimited(text, quoted=suffix == ".csv")
            text.detach()
    except UnicodeDecodeError as error:
        raise InputError(f"{file} begins as {error.encoding} and cannot be decoded ({error.reason})") from error
    except _TableError as error:
        raise InputError(f"{Path(file).name} {error}") from error


class _TableError(Exception):
    """Continues the name of a file."""


def _read_delimited(text: io.TextIOWrapper, quoted: bool) -> Iterator[Row]:
    """Cells are texts; numbers that identify a record are numbers if that changes no digit."""
    lines = _csv_cells(text) if quoted else ((n, line.rstrip("\r\n").split("\t")) for n, line in enumerate(text, 1))
    names: list[str] | None = None
    for number, cells in lines:
        if cells in ([], [""]):  # a blank line
            continue
        if names is None:
            names = cells
            if doubled := {name for name in names if name and names.count(name) > 1}:
                raise _TableError(f"has the column {', '.join(sorted(doubled))} more than once: rename one")
        elif len(cells) != len(names):
            advice = (
                "write texts with commas in quotation marks" if quoted else "take tabs and line breaks out of texts"
            )
            raise _TableError(
                f"line {number} has {len(cells)} cells, expected {len(names)} ({', '.join(names)[:200]}): {advice}"
            )
        else:
            yield {name: _identifier(cell) if name in ABOUT_COLUMNS else cell for name, cell in zip(names, cells)}  # noqa: B905


def _csv_cells(text: io.TextIOWrapper) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
    reader = csv.reader(text, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise _TableError(
                f"line {number} is not CSV ({error}): double the quotation marks within a text"
            ) from error
        if cells is None:
            return
        yield number, cells


def _identifier(cell: str) -> int | str:
    return int(cell) if cell.isascii() and cell.isdigit() and len(cell) < 19 and str(int(cell)) == cell else cell


def _whole_number(digits: str) -> int | str:
    """Integers beyond 64 bits and -0 stay as they are written."""
    return int(digits) if len(digits) < 19 and digits != "-0" else digits


DECODER = json.JSONDecoder(parse_float=str, parse_int=_whole_number)
"""Decodes JSON and leaves numbers with a point or an exponent as they are written."""


def _read_json(text: io.TextIOWrapper) -> Iterator[Row]:
    """An array of objects, or an object a line."""
    number, first = 1, text.readline()
    while first and not first.strip():
        number, first = number + 1, text.readline()
    if first.lstrip().startswith("["):
        text.seek(0)
        number = 0
        try:
            for number, (_, value) in enumerate(read_members(text, DECODER), 1):
                yield _object(value, f"entry {number}")
        except ValueError as error:
            why = getattr(error, "msg", error)
            raise _TableError(f"is not JSON after entry {number} ({why}), expected an array of objects") from error
        return
    while first:
        if first.strip():
            try:
                value = DECODER.decode(first)
            except json.JSONDecodeError as error:
                raise _TableError(
                    f"line {number} is not JSON ({error.msg} at column {error.colno}), expected an object a line, or an"
                    " array of objects"
                ) from error
            except RecursionError as error:
                raise _TableError(f"line {number} is nested too deeply, expected an object with texts") from error
            yield _object(value, f"line {number}")
        number, first = number + 1, text.readline()


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise _TableError(f'{where} is a {type(value).__name__}, expected an object such as {{"image": ..., ...}}')
    return value


# -- tables ----------------------------------------------------------------------------------------------------------


def _pack(rows: Iterable[Row]) -> Iterator[pyarrow.RecordBatch]:
    """Rows as a table keeps them. The names of the columns are noted where they change."""
    rows, last = iter(rows), None
    while part := list(islice(rows, AT_ONCE)):
        said, noted, held = [], [], []
        for row in part:
            members = [{"name": _utf8(n), "data": v} for n, v in row.items() if isinstance(v, bytes)]
            said.append(json.dumps({n: v for n, v in row.items() if not isinstance(v, bytes)} if members else row))
            names = list(row)
            noted.append(None if names == last else json.dumps(names))
            held.append(members or None)
            last = names
        columns = zip((said, noted, held), _SCHEMA.types, strict=True)
        yield pyarrow.RecordBatch.from_arrays([pyarrow.array(c, kind) for c, kind in columns], schema=_SCHEMA)


def _utf8(name: str) -> str:
    return name.encode(errors="replace").decode()


class Table:
    """Rows that can be read in any order.

    Args:
        dataset: of the datasets library, with columns of its own types, or as :func:`pack` makes it.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset
        self._packed = dataset.column_names == _SCHEMA.names
        self.features: dict[str, Any] = dict(dataset.features)
        """The type of each column, in order; None where every row may have another."""
        if self._packed:
            known = dataset.unique(_NAMES)
            self.features = {name: None for names in known if names is not None for name in json.loads(names)}
            if dataset.data.column(_BYTES).null_count == len(dataset):
                self.dataset = dataset.select_columns([_ROW])

    def __len__(self) -> int:
        return len(self.dataset)

    def part(self, first: int, count: int) -> Table:
        """So many rows from one on."""
        out = copy(self)
        out.dataset = self.dataset.select(range(first, first + count))
        return out

    def only(self, names: Sequence[str]) -> Table:
        """The rows without the columns that are not named, which then cost nothing to leave unread."""
        if self._packed:
            return self
        return Table(self.dataset.select_columns([name for name in self.features if name in names]))

    def row(self, index: int) -> Row:
        """A row, image included."""
        row = self.dataset[index]
        return _unpack(**row) if self._packed else row

    def texts(self, name: str, indices: Sequence[int] | slice) -> list[Any]:
        """The cells of a column of texts, without reading images."""
        if not self._packed:
            return self.dataset.select_columns([name])[indices][name]
        return [json.loads(row).get(name) for row in self.dataset.select_columns([_ROW])[indices][_ROW]]

    def rows(self, names: Sequence[str]) -> Iterator[Row]:
        """All rows with these columns, in order."""
        table = self.only(names).dataset
        for start in range(0, len(self), AT_ONCE):
            part = table[start : start + AT_ONCE]
            for cells in zip(*part.values(), strict=True):
                row = dict(zip(part, cells, strict=True))
                yield _unpack(**row) if self._packed else row


def _unpack(row: str, names: str | None = None, bytes: list[Row] | None = None) -> Row:
    said = json.loads(row)
    return said | {member["name"]: member["data"] for member in bytes} if bytes else said


def build_table(files: Sequence[str], read: Callable[[str], Iterator[Row]], kind: str = "") -> Table:
    """The rows of files as a table, kept in the cache of the datasets library until a file changes.

    Args:
        read: gives the rows of a file.
        kind: names what `read` does, where it may do different things to the same files.

    Raises:
        InputError: the files have other columns than each other, or `read` raises it.
    """
    if len(files) > 1:
        _check_headers([file for file in files if file.lower().endswith((".csv", ".tsv"))])
    known = hashlib.blake2b(json.dumps([LAYOUT, kind]).encode(), digest_size=16)
    for file in files:
        path = Path(file).absolute()
        stamp = path.stat() if path.is_file() else None
        known.update(json.dumps([str(path), file, stamp and stamp.st_size, stamp and stamp.st_mtime_ns]).encode())
    made = Path(HF_DATASETS_CACHE) / "blip2" / f"{known.hexdigest()}.arrow"
    made.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{made}.lock"):  # one process makes it for all
        if not made.exists():
            with written(made) as out, pyarrow.ipc.new_stream(out, _SCHEMA) as writer:
                for batch in _pack(row for file in files for row in read(file)):
                    writer.write_batch(batch)
    return Table(datasets.Dataset.from_file(str(made)))


def _check_headers(files: Sequence[str]) -> None:
    first: list[str] = []
    for file in files:
        names = list(next(read_text_table(file), {}))
        first = first or names
        if names and set(names) != set(first):
            raise InputError(
                f"{file} has the columns {', '.join(names)}, expected {', '.join(first)} as in the others: give it as a"
                " source of its own"
            )


def make_table(rows: Iterable[Row]) -> Table:
    """Rows that are there already, as a table in memory."""
    return Table(datasets.Dataset(pyarrow.Table.from_batches(_pack(rows), _SCHEMA)))

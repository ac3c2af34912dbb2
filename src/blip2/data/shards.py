"""Shards, read one row after the other from wherever fsspec reads, and as far as they can be read.

A shard that is broken ends with a row that says so (:data:`BROKEN`); what was read of it before counts. So a broken
shard has its place in the order of the data as every sample has: it is met once an epoch, by one process, also after a
resume.
"""

from __future__ import annotations

import contextlib
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow
import pyarrow.parquet

from blip2.data.cells import class_names, decode_text, name_classes
from blip2.data.images import IMAGE_SUFFIXES, MAX_BYTES, USUAL_SUFFIXES
from blip2.data.tables import DECODER, is_text_table, read_text_table
from blip2.errors import InputError

BROKEN = "__broken__"
"""In a row that is no sample: the reason why a shard could not be read on."""
BEGINS = "__begins__"
"""In the first row of a shard."""
KEY = "__where__"
"""In every row: the shard and the name within it."""
AT_ONCE = 64
"""Rows of a Parquet file that become Python's objects together."""
MAX_SAMPLE = MAX_BYTES + (1 << 20)
"""Bytes of all members of a sample of a tar together, and of a row of a Parquet file."""
MAX_TEXT = 1 << 24
"""Bytes of a member that is text: .txt, .json."""
MAX_HEADER = 1 << 14
"""Bytes of what a tar says about a member before it: a long name, attributes."""

TEXTS = ("txt", "text", "json")

Row = dict[str, Any]


def is_url(source: str) -> bool:
    """Whether a source lies where fsspec has to read it (``s3://``, ``gs://``, ``hf://`` ...)."""
    return "://" in source


def expand_files(pattern: str) -> list[str]:
    """Files that a path or a URL with ``{000..127}`` ranges and globs stands for, sorted.

    Those of a range of URLs are not looked for, which would take a request each.
    """
    span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if span:
        first, last = span[1], span[2]
        return [
            file
            for number in range(int(first), int(last) + 1)
            for file in expand_files(pattern[: span.start()] + str(number).zfill(len(first)) + pattern[span.end() :])
        ]
    path = Path(pattern)
    if is_url(pattern):
        files = _expand_url(pattern)
    elif path.is_file():
        return [str(path)]
    else:
        names = (path.name, path.name.replace("[", "[[]"))  # brackets are also part of names
        there = (path.parent.glob(name) for name in names) if path.parent.is_dir() else ()
        found = (sorted(str(file) for file in each if file.is_file()) for each in there)  # no pipe, which never ends
        files = next(filter(None, found), [])
    if not files:
        raise InputError(f"no file {pattern!r}: check the path of the data")
    return files


def _expand_url(pattern: str) -> list[str]:
    if not re.search(r"[*?[]", pattern):
        return [pattern]
    try:
        files, folder = fsspec.url_to_fs(pattern)
        return sorted(files.unstrip_protocol(name) for name in files.glob(folder))
    except Exception as error:  # each store raises its own
        raise unreadable(pattern, error) from error


def unreadable(source: str, error: BaseException) -> InputError:
    """Says in a line why a source cannot be read."""
    while error.__cause__ is not None and not isinstance(error, InputError):
        error = error.__cause__
    return InputError(f"data source {source!r} cannot be read: {' '.join(str(error).split()).rstrip('.')}")


def stream_shards(shards: list[str]) -> datasets.IterableDataset:
    """The rows of files, by path or URL, as a stream that the datasets library shuffles by files, deals out and
    continues."""
    return datasets.IterableDataset.from_generator(_read, gen_kwargs={"shards": shards})


def _read(shards: list[str]) -> Iterator[Row]:
    for shard in shards:
        if is_text_table(shard):  # an error of its text is raised: what follows it cannot be trusted
            yield from read_text_table(shard)
            continue
        begins = True
        for row in read_shard(shard):
            yield {**row, KEY: f"{shard} {row[KEY]}" if KEY in row else shard, BEGINS: begins}
            begins = False


def read_shard(shard: str) -> Iterator[Row]:
    """The rows of one shard, each with its name under :data:`KEY`; a broken one ends with a row that says so."""
    try:
        with fsspec.open(shard, "rb") as file:
            yield from _read_parquet(file) if shard.lower().endswith(".parquet") else _read_tar(file)
    except Exception as error:  # each store and each parser raises its own
        yield {BROKEN: " ".join(str(error).split()) or type(error).__name__}


def _read_parquet(file: Any) -> Iterator[Row]:
    number, parquet = 0, pyarrow.parquet.ParquetFile(file)
    schema = parquet.schema_arrow
    columns = datasets.Features.from_arrow_schema(schema) if b"huggingface" in (schema.metadata or {}) else {}
    classes = {name: names for name, feature in columns.items() if (names := class_names(feature))}
    for batch in parquet.iter_batches(AT_ONCE):
        for part in _small_enough(batch):
            for row in part.to_pylist():
                named = {name: name_classes(row[name], names) for name, names in classes.items()}
                yield {**_unmarked(row), **named, KEY: f"row {number}"}
                number += 1


def _small_enough(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    """The rows of a batch, together where they are small; else one by one, so that one at a time becomes objects."""
    repeats = any(pyarrow.types.is_dictionary(kind) for kind in batch.schema.types)  # a value that many rows share
    if batch.nbytes <= MAX_SAMPLE and not repeats:
        yield batch
        return
    for number in range(len(batch)):
        row = batch.slice(number, 1)
        if row.nbytes > MAX_SAMPLE:
            raise InputError(f"a row has {row.nbytes:,} bytes, expected at most {MAX_SAMPLE:,}")
        yield row


def _unmarked(row: Row) -> Row:
    """A row without columns of the names by which this module says something of a row."""
    return {name: value for name, value in row.items() if name not in (BROKEN, BEGINS, KEY)}


class _Before:
    """A stream with bytes before it that were read already."""

    def __init__(self, read: bytes, stream: Any) -> None:
        self._read, self._stream = read, stream

    def read(self, size: int) -> bytes:
        read, self._read = self._read, b""
        return read or self._stream.read(size)

    def tell(self) -> int:
        return self._stream.tell()


class _Header(tarfile.TarInfo):
    """Notes why an archive has no further member: tarfile takes damage behind the first for its end."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except Exception as error:
            tarfile.ended_by = error
            raise

    def _proc_member(self, tarfile: Any) -> Any:
        """Refuse what a kilobyte can say and no memory can hold, before it is read."""
        about = self.type in (b"L", b"K", b"x", b"g", b"X")  # a long name, attributes: read whole as a header
        if about and not 0 <= self.size <= MAX_HEADER:
            raise ValueError(f"a header of {self.size:,} bytes, expected at most {MAX_HEADER:,}")
        return super()._proc_member(tarfile)  # pyright: ignore[reportAttributeAccessIssue]

    def _proc_pax(self, tarfile: Any) -> Any:
        """tarfile searches attributes with an expression that takes minutes over a long row of digits."""
        stream = tarfile.fileobj
        attributes = stream.read(self._block(self.size))  # pyright: ignore[reportAttributeAccessIssue]
        if re.search(rb"\d{1000}", attributes):
            raise ValueError("an attribute with a number of a thousand digits")
        tarfile.fileobj = _Before(attributes, stream)
        try:
            return super()._proc_pax(tarfile)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            tarfile.fileobj = stream

    def _refuse(self, *_: Any) -> Any:
        raise ValueError(f"{self.name} is a sparse file, whose holes would be filled: pack it again without --sparse")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse


def _read_tar(file: Any) -> Iterator[Row]:
    """Samples are members with the same name up to its first dot, one behind the other."""
    sample: Row = {}
    whole: set[str] = set()
    size = 0
    with tarfile.open(fileobj=file, mode="r|", tarinfo=_Header, bufsize=1 << 20) as tar:
        for member in tar:
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  or it would hold all it has seen
            folder, slash, name = member.name.rpartition("/")
            name, dot, kind = name.partition(".")
            content = tar.extractfile(member) if member.isfile() and name and dot else None
            if content is None:  # a folder, a link, or nothing that belongs to a sample
                continue
            key, kind = folder + slash + name, kind.lower()
            if sample and (sample[KEY] != key or kind in sample):
                whole = set(sample)
                yield _complete(sample)
                sample, size = {}, 0
            size += member.size
            _check_member(member, kind, size)
            sample |= {KEY: key, kind: content.read()}
        # What is held when an archive breaks off is a sample if it has all that the one before it had.
        ended_by: Exception = tar.ended_by  # pyright: ignore[reportAttributeAccessIssue]
        is_whole = isinstance(ended_by, tarfile.EOFHeaderError)  # pyright: ignore[reportAttributeAccessIssue]
        if sample and (is_whole or (whole and set(sample) >= whole)):
            yield _complete(sample)
        if not is_whole:
            where = f" behind {sample[KEY]}" if sample else ""
            reason = f" ({ended_by})" if str(ended_by) else ""
            raise tarfile.ReadError(f"it breaks off{where}{reason}")


def _check_member(member: tarfile.TarInfo, kind: str, size: int) -> None:
    limit = MAX_TEXT if kind in TEXTS else MAX_SAMPLE
    if not 0 <= member.size <= limit or size > MAX_SAMPLE:
        raise InputError(
            f"{member.name} has {member.size:,} bytes, expected at most {limit:,}, and {MAX_SAMPLE:,} with the other"
            " members of its sample"
        )


def _complete(sample: Row) -> Row:
    """The columns of a sample: its members, what its .json says, and its picture as ``image``."""
    row: Row = {}
    said: Any = None
    for kind, content in sample.items():
        if kind == "json":
            with contextlib.suppress(ValueError, RecursionError):  # then it says nothing
                said = DECODER.decode(decode_text(content))
        elif kind in TEXTS:
            row[kind] = decode_text(content)
        else:
            row[kind] = content
    images = [kind for kind in row if f".{kind}" in IMAGE_SUFFIXES]
    if images and "image" not in row:
        row["image"] = row[next((kind for kind in images if f".{kind}" in USUAL_SUFFIXES), images[0])]
    return {**_unmarked(said), **row} if isinstance(said, dict) else row

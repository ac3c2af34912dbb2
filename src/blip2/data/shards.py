"""Read shards (tar files, Parquet files and text tables) row by row with fsspec, and write tar files.

If a shard is damaged, its rows before the damage are used. They are followed by a placeholder row that contains the
error (:data:`ERROR_COLUMN`). The damage therefore has a place in the order of the data, like a row: it is reported once
per epoch, by one process, even if the run is resumed in between.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import datasets
import fsspec
import pyarrow
import pyarrow.parquet

from blip2.data.cells import (
    ANSWER_COLUMNS,
    CAPTION_COLUMNS,
    QUESTION_COLUMNS,
    CellError,
    class_names,
    decode_text,
    labels_to_names,
)
from blip2.data.images import COMMON_SUFFIXES, IMAGE_SUFFIXES, MAX_FILE_BYTES
from blip2.data.tables import JSON_DECODER, MAGIC_BYTES, describe_compression, is_text_table, read_text_table, to_rows
from blip2.errors import InputError

ERROR_COLUMN = "__broken__"
"""Column of the placeholder row for the unreadable rest of a shard: the error message."""
STARTS_SHARD_COLUMN = "__begins__"
"""Column of the rows of :func:`stream_shards`: whether the row is the first of its shard."""
KEY_COLUMN = "__where__"
"""Column of the name of a row. :func:`read_shard`: the key of the sample, or the number of the row, within the shard.
Streams, and tables made from tar files: the path or URL of the shard, and this name."""
REFUSED_COLUMN = "__refused__"
"""Column of the rows of a tar that cannot be used: one of :data:`blip2.data.dataset.SKIP_REASONS`, and a message."""
RESERVED_COLUMNS = (ERROR_COLUMN, STARTS_SHARD_COLUMN, KEY_COLUMN, REFUSED_COLUMN)
PARQUET_BATCH_ROWS = 64
"""Number of rows of a Parquet file that are converted to Python objects at a time."""
MAX_SAMPLE_BYTES = MAX_FILE_BYTES + (1 << 20)
"""Maximum size in bytes of a row of a Parquet file, and of all members of a sample of a tar together."""
MAX_TEXT_BYTES = 1 << 24
"""Maximum size in bytes of a text member of a tar (:data:`TEXT_EXTENSIONS`)."""
MAX_PADDING_BYTES = 1 << 20
"""Number of bytes after the end of a tar that are checked. They are zeros, unless another tar follows."""
MAX_HEADER_BYTES = 1 << 14
"""Maximum size in bytes of the extended header of a tar member, which contains a long name or attributes."""
MAX_RANGE = 10**6
"""Maximum number of files in the ranges (``{000..127}``) of a pattern."""
TEXT_EXTENSIONS = ("json", *CAPTION_COLUMNS, *QUESTION_COLUMNS, *ANSWER_COLUMNS)
"""Extensions of the text members of a tar."""

Row = dict[str, Any]


def is_url(source: str) -> bool:
    """Return whether a source is a URL (``s3://``, ``gs://``, ``hf://`` ...)."""
    return "://" in source


def expand_files(pattern: str) -> list[str]:
    """Return the files that match a pattern, sorted.

    Args:
        pattern: a path or URL, which may contain globs and ranges such as ``{000..127}``. A glob matches suffixes in
            upper and lower case. The URLs of a range are returned without a check that the files exist, because each
            check would take a request.

    Raises:
        InputError: no file matches, a range is too long, or a file system cannot be accessed.
    """
    ranges = list(re.finditer(r"\{(\d+)\.\.(\d+)\}", pattern))
    if ranges:
        span, (first, last) = ranges[0], ranges[0].groups()
        is_long = any(len(end) > 9 for each in ranges for end in each.groups())
        if is_long or math.prod(abs(int(each[2]) - int(each[1])) + 1 for each in ranges) > MAX_RANGE:
            names = " ".join(each[0] for each in ranges)
            raise InputError(f"{names} in {pattern!r} is more than {MAX_RANGE:,} files: use a shorter range")
        if int(last) < int(first):
            raise InputError(f"{span[0]} in {pattern!r} ends before it begins: write the smaller number first")
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
        names = map(_any_case, (path.name, path.name.replace("[", "[[]")))  # brackets may be part of a name
        matches = (path.parent.glob(name) for name in names) if path.parent.is_dir() else ()
        # is_file() excludes pipes, because reading a pipe may never end.
        found = (sorted(str(file) for file in group if file.is_file()) for group in matches)
        files = next(filter(None, found), [])
    if not files:
        raise InputError(f"no file {pattern!r}: check the path of the data")
    return files


def _expand_url(pattern: str) -> list[str]:
    if not re.search(r"[*?[]", pattern):
        return [pattern]
    try:
        filesystem, path = fsspec.url_to_fs(_any_case(pattern))
        return sorted(filesystem.unstrip_protocol(name) for name in filesystem.glob(path))
    except Exception as error:  # each file system has its own exceptions
        raise unreadable_source(pattern, error) from error


def _any_case(pattern: str) -> str:
    """Return a glob that matches the suffix of `pattern` in upper and lower case."""
    stem, dot, suffix = pattern.rpartition(".")
    letters = "".join(f"[{each.lower()}{each.upper()}]" if each.isalpha() else each for each in suffix)
    return stem + dot + letters if dot and suffix.isalnum() else pattern


def unreadable_source(source: str, error: BaseException) -> InputError:
    """Return an error of one line for a source that cannot be read.

    Args:
        source: the source.
        error: the exception that was raised while the source was read.
    """
    while error.__cause__ is not None and not isinstance(error, InputError):
        error = error.__cause__
    advice = "" if isinstance(error, InputError) else "; check the path, the permissions and that the data is complete"
    return InputError(f"data source {source!r} cannot be read: {' '.join(str(error).split()).rstrip('.')}{advice}")


def stream_shards(shards: list[str]) -> datasets.IterableDataset:
    """Return the rows of shards as a stream, which the datasets library can shuffle by shard, divide and resume.

    Args:
        shards: paths or URLs of tar files, Parquet files and text tables.
    """
    return datasets.IterableDataset.from_generator(_read_shards, gen_kwargs={"shards": shards})


def _read_shards(shards: list[str]) -> Iterator[Row]:
    for shard in shards:
        if is_text_table(shard):  # an error ends the run, because the rest of a damaged text may be misread
            yield from read_rows(shard)
            continue
        for number, row in enumerate(read_shard(shard)):
            key = f"{shard} {row[KEY_COLUMN]}" if KEY_COLUMN in row else shard
            yield {**row, KEY_COLUMN: key, STARTS_SHARD_COLUMN: number == 0}


def read_rows(file: str) -> Iterator[Row]:
    """Yield the rows of a text table as :func:`~blip2.data.tables.read_text_table` does, without
    :data:`RESERVED_COLUMNS`."""
    return map(_without_reserved, read_text_table(file))


def read_shard(shard: str) -> Iterator[Row]:
    """Yield the rows of one shard.

    Args:
        shard: path or URL of a Parquet file (``.parquet``) or a tar file (any other name).

    Yields:
        A dict per row or sample: its name in :data:`KEY_COLUMN`, and its columns. If the shard is damaged, the last row
        has only :data:`ERROR_COLUMN`.
    """
    try:
        with fsspec.open(shard, "rb") as opened:
            file: Any = opened
            if shard.lower().endswith(".parquet"):
                yield from _read_parquet(file)
                return
            start = file.read(MAGIC_BYTES)
            if problem := describe_compression(shard, start):
                raise InputError(f"it {problem}")
            yield from _read_tar(_PrefixedStream(start, file))
    except Exception as error:  # each file system and each parser has its own exceptions
        advice = "" if isinstance(error, InputError) else "; download or create the shard again"
        yield {ERROR_COLUMN: (" ".join(str(error).split()) or type(error).__name__) + advice}


# -- Parquet ---------------------------------------------------------------------------------------------------------


def _read_parquet(file: Any) -> Iterator[Row]:
    number, parquet = 0, pyarrow.parquet.ParquetFile(file)
    schema = parquet.schema_arrow
    _check_names(schema)
    columns = datasets.Features.from_arrow_schema(schema) if b"huggingface" in (schema.metadata or {}) else {}
    classes = {name: names for name, feature in columns.items() if (names := class_names(feature))}
    for batch in parquet.iter_batches(PARQUET_BATCH_ROWS):
        for part in _split_large(batch):
            for row in to_rows(part):
                named = {name: _class_of(row[name], names) for name, names in classes.items()}
                yield {**_without_reserved(row), **named, KEY_COLUMN: f"row {number}"}
                number += 1


def _class_of(cell: Any, names: list[str]) -> Any:
    """Return the class name of a cell, or the error for a label without a name, which makes only its row unusable."""
    try:
        return labels_to_names(cell, names)
    except CellError as error:
        return error


def _check_names(schema: pyarrow.Schema) -> None:
    if repeated := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise InputError(f"the column {', '.join(repeated)} occurs more than once: give each column its own name")


def check_parquet(files: list[str], columns: Collection[str | None]) -> list[str]:
    """Check the schemas of Parquet files before they are read as one table.

    The ``datasets`` library converts the cells of all files to the types of the first file, which changes them (``007``
    to 7), and cannot read a file without rows.

    Args:
        files: paths or URLs of the files.
        columns: names of the columns whose cells must not be converted.

    Returns:
        The files that have rows.

    Raises:
        InputError: the columns have different types, or a name occurs twice.
        Exception: a file cannot be read.
    """
    kinds: dict[str, tuple[str, str]] = {}
    with_rows = []
    for file in files:
        with fsspec.open(file, "rb") as opened:
            parquet = pyarrow.parquet.ParquetFile(opened)
            schema, num_rows = parquet.schema_arrow, parquet.metadata.num_rows
        _check_names(schema)
        for column in schema:
            kind = _kind(column.type)
            expected, first = kinds.setdefault(column.name, (kind, file)) if kind else (kind, file)
            if kind != expected and column.name in columns:
                raise InputError(
                    f"{file} holds {kind} in the column {column.name}, expected {expected} as in {first}: write the"
                    " files with equal types, or set data.streaming to true, which reads each file as it is"
                )
        if num_rows:
            with_rows.append(file)
    return with_rows


def _kind(arrow_type: pyarrow.DataType) -> str:
    """Return the name of a simple type, such as ``texts``; else an empty string."""
    types = pyarrow.types
    value = arrow_type.value_type if isinstance(arrow_type, pyarrow.DictionaryType) else arrow_type
    if types.is_string(value) or types.is_large_string(value) or types.is_string_view(value):
        return "texts"
    return "integers" if types.is_integer(value) else "floating-point numbers" if types.is_floating(value) else ""


def _split_large(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    """Yield a small batch as it is, and a large batch row by row, which limits the memory for Python objects."""
    # A dictionary column stores a value once for many rows, so nbytes is smaller than the Python objects.
    repeats = any(pyarrow.types.is_dictionary(kind) for kind in batch.schema.types)
    if batch.nbytes <= MAX_SAMPLE_BYTES and not repeats:
        yield batch
        return
    for number in range(len(batch)):
        row = batch.slice(number, 1)
        if row.nbytes > MAX_SAMPLE_BYTES:
            raise InputError(
                f"a row has {row.nbytes:,} bytes, expected at most {MAX_SAMPLE_BYTES:,}: store smaller images and texts"
            )
        yield row


def _without_reserved(row: Row) -> Row:
    """Return a row without the columns whose names this module reserves."""
    return {name: value for name, value in row.items() if name not in RESERVED_COLUMNS}


# -- tar -------------------------------------------------------------------------------------------------------------


class _PrefixedStream:
    """A stream from which bytes were read, with these bytes put back before the rest."""

    def __init__(self, prefix: bytes, stream: Any) -> None:
        self._prefix, self._stream = prefix, stream

    def read(self, size: int) -> bytes:
        prefix, self._prefix = self._prefix, b""
        return prefix or self._stream.read(size)

    def tell(self) -> int:
        return self._stream.tell()


class _SafeTarInfo(tarfile.TarInfo):
    """A member header that raises an exception for dangerous members.

    ``ended_by`` of the archive is set to the exception that ended the reading, because :mod:`tarfile` treats damage
    after the first member as the end of the archive.
    """

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except Exception as error:
            tarfile.ended_by = error
            raise

    def _proc_member(self, tarfile: Any) -> Any:
        """Refuse a large extended header (:data:`MAX_HEADER_BYTES`), because tarfile reads all of it into memory."""
        is_extended = self.type in (b"L", b"K", b"x", b"g", b"X")  # a long name or attributes
        if is_extended and not 0 <= self.size <= MAX_HEADER_BYTES:
            raise ValueError(f"a header has {self.size:,} bytes, expected at most {MAX_HEADER_BYTES:,}")
        return super()._proc_member(tarfile)  # pyright: ignore[reportAttributeAccessIssue]

    def _proc_pax(self, tarfile: Any) -> Any:
        """Refuse attributes with a very long number, on which a regular expression of tarfile would take minutes."""
        stream = tarfile.fileobj
        attributes = stream.read(self._block(self.size))  # pyright: ignore[reportAttributeAccessIssue]
        if re.search(rb"\d{1000}", attributes):
            raise ValueError("an attribute contains a number of more than a thousand digits")
        tarfile.fileobj = _PrefixedStream(attributes, stream)
        try:
            return super()._proc_pax(tarfile)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            tarfile.fileobj = stream

    def _refuse(self, *_: Any) -> Any:
        raise ValueError(
            f"{self.name} is stored as a sparse file, which is not supported: create the archive again without --sparse"
        )

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse


def _read_tar(file: Any) -> Iterator[Row]:
    """Yield the samples of a tar as rows.

    A sample consists of consecutive members in the same folder whose file names are equal up to the first dot. If two
    of them differ only in the case of the extension, the sample is refused, because either may be meant.
    """
    sample: Row = {}
    names: dict[str, str] = {}  # of the members of the sample, by extension
    last_extensions: set[str] = set()
    size = 0
    with tarfile.open(fileobj=file, mode="r|", tarinfo=_SafeTarInfo, bufsize=1 << 20) as tar:
        for member in tar:
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  otherwise the list of members grows
            folder, slash, name = member.name.rpartition("/")
            name, dot, extension = name.partition(".")
            content = tar.extractfile(member) if member.isfile() and name and dot else None
            if content is None:  # a folder, a link, or a file that belongs to no sample
                continue
            key, extension = folder + slash + name, extension.lower()
            is_repeated = bool(sample) and sample[KEY_COLUMN] == key and extension in names
            if is_repeated and names[extension] != member.name:
                found = f"it has both {names[extension]} and {member.name}, expected one of them: remove the other"
                sample[REFUSED_COLUMN] = ("image" if f".{extension}" in IMAGE_SUFFIXES else "caption", found)
                continue
            if sample and (sample[KEY_COLUMN] != key or is_repeated):
                last_extensions = set(names)
                yield _to_row(sample)
                sample, names, size = {}, {}, 0
            size += member.size
            _check_member(member, extension, size)
            sample |= {KEY_COLUMN: key, extension: content.read()}
            names[extension] = member.name
        # If the archive is damaged, the last sample may be incomplete. It is used if it has all members of the sample
        # before it.
        ended_by: Exception = tar.ended_by  # pyright: ignore[reportAttributeAccessIssue]
        is_whole = isinstance(ended_by, tarfile.EOFHeaderError)  # pyright: ignore[reportAttributeAccessIssue]
        if sample and (is_whole or (last_extensions and set(names) >= last_extensions)):
            yield _to_row(sample)
        where = f" after {sample[KEY_COLUMN]}" if sample else ""
        rest: Any = tar.fileobj
        if is_whole and any(rest.read(MAX_PADDING_BYTES)):
            raise InputError(
                f"the archive goes on after its end{where}, as cat writes several into one: keep them in files of their"
                " own, or join them with tar --concatenate"
            )
        if not is_whole:
            reason = f" ({ended_by})" if str(ended_by) else ""
            raise tarfile.ReadError(f"the archive is incomplete or damaged{where}{reason}")


def _check_member(member: tarfile.TarInfo, extension: str, size: int) -> None:
    limit = MAX_TEXT_BYTES if extension in TEXT_EXTENSIONS else MAX_SAMPLE_BYTES
    if not 0 <= member.size <= limit or size > MAX_SAMPLE_BYTES:
        raise InputError(
            f"{member.name} has {member.size:,} bytes, expected at most {limit:,}, and at most {MAX_SAMPLE_BYTES:,}"
            " together with the other files of the same sample: store smaller files"
        )


def _to_row(sample: Row) -> Row:
    """Convert a sample to a row.

    Args:
        sample: :data:`KEY_COLUMN`, and the content of each member by its extension.

    Returns:
        The members by their extensions, with texts decoded; the image also as ``image``; and the values of the object
        in the ``.json`` member, except those whose names are taken.
    """
    row: Row = {}
    values: Any = None
    for extension, content in sample.items():
        if extension == "json":
            with contextlib.suppress(ValueError, RecursionError):  # a .json that cannot be parsed is ignored
                values = JSON_DECODER.decode(decode_text(content))
        elif extension in TEXT_EXTENSIONS:
            row[extension] = decode_text(content)
        else:
            row[extension] = content
    image = _find_image(row)
    if image is not None and "image" not in row:
        row["image"] = row[image]
    return {**_without_reserved(values), **row} if isinstance(values, dict) else row


def _find_image(row: Row) -> str | None:
    """Return the first column whose name is the suffix of an image file, or None. Common formats are preferred."""
    images = (column for column in row if f".{column}" in IMAGE_SUFFIXES)
    return min(images, key=lambda column: f".{column}" not in COMMON_SUFFIXES, default=None)


# -- samples of a tar ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """An encoded image with its captions."""

    key: str
    """Key of the sample, unique within its shard."""
    image: bytes
    """The encoded image."""
    captions: tuple[str, ...]
    suffix: str
    """File suffix of the image, such as ``jpg``."""


class SkippedSample(NamedTuple):
    """A sample that cannot be used."""

    key: str
    """Name of the sample in messages."""
    reason: str
    """Category of the problem, such as ``no image``, by which skipped samples are counted."""
    message: str
    """Description of the problem."""


class ShardWriter:
    """Writes samples to a tar. Equal samples result in archives with equal bytes.

    Args:
        file: a binary file that is open for writing.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115

    def add(self, key: str, suffix: str, image: bytes, metadata: Mapping[str, Any]) -> None:
        """Write a sample.

        Args:
            key: name of the members, without suffix.
            suffix: file suffix of the image, such as ``jpg``.
            image: the encoded image, which is written unchanged.
            metadata: the content of the ``.json`` member.
        """
        # Paths may contain surrogates, which UTF-8 cannot encode. Python escapes a surrogate in the same way as JSON.
        text = json.dumps(metadata, ensure_ascii=False).encode(errors="backslashreplace")
        for name, data in ((f"{key}.{suffix}", image), (f"{key}.json", text)):
            entry = tarfile.TarInfo(name)  # no time and no owner, so that equal samples have equal bytes
            entry.size = len(data)
            self._tar.addfile(entry, BytesIO(data))

    def close(self) -> None:
        """Write the end of the archive. `file` stays open."""
        self._tar.close()

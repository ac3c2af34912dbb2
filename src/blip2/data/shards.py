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
import pyarrow.parquet

from blip2.data.cells import class_names, decode_text, name_classes
from blip2.data.images import IMAGE_SUFFIXES, USUAL_SUFFIXES
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
        found = (sorted(map(str, path.parent.glob(name))) for name in names) if path.parent.is_dir() else ()
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
        for row in batch.to_pylist():
            named = {name: name_classes(row[name], names) for name, names in classes.items()}
            yield {**row, **named, KEY: f"row {number}"}
            number += 1


class _Header(tarfile.TarInfo):
    """Notes why an archive has no further member: tarfile takes damage behind the first for its end."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except Exception as error:
            tarfile.ended_by = error
            raise


def _read_tar(file: Any) -> Iterator[Row]:
    """Samples are members with the same name up to its first dot, one behind the other."""
    sample: Row = {}
    whole: set[str] = set()
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
                sample = {}
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


def _complete(sample: Row) -> Row:
    """The columns of a sample: its members, what its .json says, and its picture as ``image``."""
    row: Row = {}
    said: Any = None
    for kind, content in sample.items():
        if kind == "json":
            with contextlib.suppress(ValueError):  # then it says nothing
                said = DECODER.decode(decode_text(content))
        elif kind in ("txt", "text"):
            row[kind] = decode_text(content)
        else:
            row[kind] = content
    images = [kind for kind in row if f".{kind}" in IMAGE_SUFFIXES]
    if images and "image" not in row:
        row["image"] = row[next((kind for kind in images if f".{kind}" in USUAL_SUFFIXES), images[0])]
    return {**said, **row} if isinstance(said, dict) else row

"""Read a corpus as units of work, and each unit as samples.

A unit is the input of one output shard: an input shard (``.tar``), or a range of records of a source without shards.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

from PIL.Image import Image

from blip2.config import DataConfig
from blip2.data.assets import resolve
from blip2.data.benchmarks import find_shards, is_benchmark
from blip2.data.images import COMMON_SUFFIXES, ImageError, read_bytes, read_image
from blip2.data.records import ColumnMapping, Records
from blip2.data.shards import KEY_COLUMN, Sample, SkippedSample, expand_files, is_url, read_shard
from blip2.data.sources import open_records
from blip2.errors import InputError
from blip2.io import describe_version


@dataclass(frozen=True)
class Unit:
    """The input of one output shard."""

    name: str
    """Name of the output files, without suffix."""
    source: str
    """Path or URL of a ``.tar``, or any other source that ``data.train`` of a recipe may name."""
    start: int = 0
    """Index of the first record."""
    count: int | None = None
    """Number of records. None: the source is a ``.tar``, and the unit is all of it."""
    version: str = ""
    """Value that differs if the records are others: :func:`~blip2.io.describe_version` of the files of the source or,
    if it is not a name of files, :meth:`~blip2.data.records.Records.digest` of the records."""


def list_units(source: str, shard_size: int) -> list[Unit]:
    """List the units of a corpus.

    Args:
        source: a source that ``data.train`` of a recipe may name.
        shard_size: number of records in a unit, if the source has no shards.

    Raises:
        InputError: the source cannot be read or has no records, or two shards would have the same name.
    """
    source = resolve(source)
    shards = find_shards(source) if is_benchmark(source) else source
    if shards is not None and shards.lower().endswith(".tar"):
        files = expand_files(shards)
        names = [Path(file).stem for file in files]
        if len(set(names)) < len(names):  # shards in several folders
            root = Path(os.path.commonpath(files))
            names = ["-".join(Path(file).relative_to(root).with_suffix("").parts) for file in files]
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:  # such as a/b.tar and a-b.tar
            found = " and ".join(file for file, name in zip(files, names, strict=True) if name == twice)
            raise InputError(f"{found} would have the same output shard, {twice}.tar: rename one of them")
        return [
            Unit(name, _absolute(file), version=describe_version([file]))
            for name, file in zip(names, files, strict=True)
        ]
    if Path(source).exists():
        source = _absolute(source)
    open_corpus.cache_clear()  # the files may have changed since the last pass of this process
    records = open_corpus(source)
    count = len(records)
    is_other = is_benchmark(source) or source.startswith("hub:") or Path(source).is_dir()
    version = None if is_other else describe_version(expand_files(source))
    return [
        Unit(f"{i:05}", source, start, end - start, version or records.digest(slice(start, end)))
        for i, start in enumerate(range(0, count, shard_size))
        for end in [min(start + shard_size, count)]
    ]


def _absolute(file: str) -> str:
    """Return an absolute path, because workers may have another current folder. URLs are returned unchanged."""
    return file if is_url(file) else str(Path(file).absolute())


@lru_cache(1)
def open_corpus(source: str) -> Records:
    """Open a corpus that has no shards. The last corpus is kept open."""
    records = open_records(source, DataConfig(train=source, streaming=False))
    assert isinstance(records, Records)
    return records


def read_unit(unit: Unit) -> Iterator[Sample | SkippedSample]:
    """Read the samples of a unit in order, one at a time.

    Yields:
        A :class:`~blip2.data.shards.Sample`, whose captions may be empty, or a
        :class:`~blip2.data.shards.SkippedSample` if the sample, or the rest of a damaged shard, cannot be used.
    """
    if unit.count is None:
        return _read_samples(unit.source)
    return _read_records(open_corpus(unit.source), unit)


def read_batches(unit: Unit, batch_size: int, skipped: list[SkippedSample]) -> Iterator[list[tuple[Sample, Image]]]:
    """Yield the samples of a unit with their decoded images, in batches.

    Args:
        unit: the unit.
        batch_size: number of samples per batch; the last batch may be smaller.
        skipped: a list to which samples that cannot be used are appended.
    """

    def decode() -> Iterator[tuple[Sample, Image]]:
        for sample in read_unit(unit):
            if isinstance(sample, SkippedSample):
                skipped.append(sample)
                continue
            try:
                yield sample, read_image(sample.image, f"image {sample.key} of {unit.source}")
            except ImageError as error:
                skipped.append(SkippedSample(f"{sample.key} in {unit.source}", "image not decoded", str(error)))

    samples = decode()
    while batch := list(islice(samples, batch_size)):
        yield batch


def _read_samples(shard: str) -> Iterator[Sample | SkippedSample]:
    """Read the samples of a tar. Their captions are those that training reads."""
    columns = ColumnMapping(shard, "image", None, None, (), Path(), allowed_folders=())
    for row in read_shard(shard):
        record, key = columns.to_record({KEY_COLUMN: shard, **row}, 0), row.get(KEY_COLUMN)
        name, image = f"{key} in {shard}", row.get("image")
        if record.error is not None:
            yield SkippedSample(shard, "shard broken", f"{shard} cannot be read to its end: {record.error}")
        elif not isinstance(image, bytes):  # a value of a .json member is not an image
            found = ", ".join(column for column in row if column != KEY_COLUMN)
            expected = f"{', '.join(COMMON_SUFFIXES)}, or another format that Pillow reads"
            yield SkippedSample(name, "no image", f"the sample has {found}, expected an image ({expected})")
        elif record.skip_reason is not None:
            reason, message = record.skip_reason
            yield SkippedSample(name, f"{reason} not read", message)
        else:
            # Two columns contain the image: the member, and "image".
            suffix = next((column for column in row if column != "image" and row[column] is image), "image")
            yield Sample(str(key), image, record.captions, suffix)


def _read_records(records: Records, unit: Unit) -> Iterator[Sample | SkippedSample]:
    for i in range(unit.start, unit.start + (unit.count or 0)):
        record = records[i]
        if record.skip_reason is not None:
            reason, message = record.skip_reason
            yield SkippedSample(record.key, f"{reason} not read", message)
            continue
        if record.image is None:
            yield SkippedSample(record.key, "no image", "it has no image")
            continue
        try:
            data = record.image if isinstance(record.image, bytes) else read_bytes(record.image)
        except ImageError as error:
            yield SkippedSample(record.key, "image not read", str(error))
            continue
        yield Sample(f"{i:09}", data, record.captions, _suffix(data))


MAGIC_BYTES = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*": "tif", b"MM": "tif"}
"""File suffix of an image by its first bytes."""


def _suffix(data: bytes) -> str:
    """Return the file suffix of an encoded image."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((suffix for magic, suffix in MAGIC_BYTES.items() if data.startswith(magic)), "jpg")

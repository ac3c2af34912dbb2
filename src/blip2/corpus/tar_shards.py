"""Read a corpus as units and samples, and write WebDataset shards.

A unit is the work that yields one output shard: one input ``.tar``, or a range of records of any other source that
``data.train`` of a recipe may name.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL.Image import Image

from blip2.config import DataConfig
from blip2.data.assets import resolve
from blip2.data.benchmarks import find_shards, is_benchmark
from blip2.data.cells import CAPTION_COLUMNS, CellError, read_texts
from blip2.data.images import COMMON_SUFFIXES, IMAGE_SUFFIXES, ImageError, read_bytes, read_image
from blip2.data.records import Records
from blip2.data.shards import ERROR_COLUMN, KEY_COLUMN, expand_files, read_shard
from blip2.data.sources import open_records


@dataclass(frozen=True)
class Unit:
    """The work that yields one output shard."""

    name: str
    """Name of the output files, without a suffix."""
    source: str
    """Path of a ``.tar``, or a source that ``data.train`` may name."""
    start: int = 0
    """Index of the first record."""
    count: int | None = None
    """Number of records; None means a whole ``.tar``."""


@dataclass(frozen=True)
class Sample:
    """An encoded image with its captions."""

    key: str
    """Key of the sample, unique within its unit."""
    image: bytes
    captions: tuple[str, ...]
    suffix: str
    """File suffix of the image, such as ``jpg``."""


class SkippedSample(NamedTuple):
    """A sample that cannot be used."""

    key: str
    reason: str
    """Category by which skipped samples are counted."""
    message: str


def list_units(source: str, shard_size: int) -> list[Unit]:
    """List the units of a corpus.

    Args:
        source: a source that ``data.train`` of a recipe may name.
        shard_size: number of records in a unit, if the source has no shards.

    Raises:
        InputError: the source has no records, or two shards have the same name.
    """
    source = resolve(source)
    shards = find_shards(source) if is_benchmark(source) else source
    if shards is not None and shards.endswith(".tar"):
        files = expand_files(shards)
        names = [Path(file).stem for file in files]
        if len(set(names)) < len(names):  # shards of several folders
            root = Path(os.path.commonpath(files))
            names = ["-".join(Path(file).relative_to(root).with_suffix("").parts) for file in files]
        return [Unit(name, str(Path(file).absolute())) for name, file in zip(names, files, strict=True)]
    if Path(source).exists():
        source = str(Path(source).absolute())  # workers may have another current folder
    count = len(open_corpus(source))
    starts = range(0, count, shard_size)
    return [Unit(f"{i:05}", source, start, min(shard_size, count - start)) for i, start in enumerate(starts)]


@lru_cache(1)
def open_corpus(source: str) -> Records:
    """Open a corpus that has no shards."""
    records = open_records(source, DataConfig(train=source, streaming=False))
    assert isinstance(records, Records)
    return records


def read_unit(unit: Unit) -> Iterator[Sample | SkippedSample]:
    """Read the samples of a unit in order, one at a time."""
    if unit.count is None:
        return _read_tar(unit)
    return _read_records(open_corpus(unit.source), unit)


def read_batches(unit: Unit, batch_size: int, skipped: list[SkippedSample]) -> Iterator[list[tuple[Sample, Image]]]:
    """Read the samples of a unit in batches with their decoded images; append unusable samples to `skipped`."""

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


# -- reading shards ------------------------------------------------------------------------------------------------


def _read_tar(unit: Unit) -> Iterator[Sample | SkippedSample]:
    for row in read_shard(unit.source):
        key = row.get(KEY_COLUMN, "")
        name = f"{key} in {unit.source}"
        images = [column for column in row if f".{column}" in IMAGE_SUFFIXES]
        suffix = next((column for column in images if f".{column}" in COMMON_SUFFIXES), images[0] if images else None)
        if ERROR_COLUMN in row:
            message = f"{unit.source} cannot be read to its end ({row[ERROR_COLUMN]}): download it again"
            yield SkippedSample(unit.source, "shard broken", message)
        elif suffix is None or not isinstance(row[suffix], bytes):  # a key of a .json file is no image
            found = ", ".join(column for column in row if column != KEY_COLUMN)
            expected = f"{', '.join(COMMON_SUFFIXES)}, or another format that Pillow reads"
            yield SkippedSample(name, "no image", f"it has {found}, expected an image ({expected})")
        else:
            column = next((column for column in CAPTION_COLUMNS if column in row), "")
            try:
                captions, _ = read_texts(row.get(column))
            except CellError as error:
                yield SkippedSample(name, "caption not read", f"{column} {error}")
                continue
            yield Sample(key, row[suffix], captions, suffix)


# -- writing shards ------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes samples to a tar; equal samples give equal bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115

    def add(self, sample: Sample, metadata: Mapping[str, Any]) -> None:
        """Write the unchanged image and a ``.json`` file."""
        text = json.dumps(metadata, ensure_ascii=False).encode()
        for suffix, data in ((sample.suffix, sample.image), ("json", text)):
            entry = tarfile.TarInfo(f"{sample.key}.{suffix}")  # without time and owner, for equal bytes
            entry.size = len(data)
            self._tar.addfile(entry, BytesIO(data))

    def close(self) -> None:
        self._tar.close()

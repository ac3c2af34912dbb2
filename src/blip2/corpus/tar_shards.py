"""What a pass over a corpus goes through and writes: a corpus in units, samples, WebDataset shards.

A unit is one input shard, from which one output shard is made. A ``.tar`` is a unit; of everything else that
``data.train`` of a recipe may say, so many records are.
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
from typing import IO, Any

from PIL.Image import Image

from blip2.config import DataConfig
from blip2.data.assets import resolve
from blip2.data.benchmarks import find_shards, is_benchmark
from blip2.data.cells import CAPTION_COLUMNS, CellError, read_texts
from blip2.data.images import IMAGE_SUFFIXES, USUAL_SUFFIXES, ImageError, read_bytes, read_image
from blip2.data.records import Records, open_records
from blip2.data.shards import BROKEN, KEY, expand_files, read_shard


@dataclass(frozen=True)
class Unit:
    """One input shard."""

    name: str
    """Of what is made of it, without a suffix."""
    source: str
    """A tar, or what ``data.train`` may say."""
    first: int = 0
    """Its first record."""
    count: int | None = None
    """How many records it has; None: all of a tar."""


@dataclass(frozen=True)
class Sample:
    """A picture as it lies in its shard, and what is said about it."""

    key: str
    """Unique within the corpus's unit."""
    image: bytes
    captions: tuple[str, ...]
    suffix: str
    """Of its file: ``jpg``, ``png`` ..."""


@dataclass(frozen=True)
class Skipped:
    """What cannot be used."""

    key: str
    cause: str
    """Of its kind, by which it is counted."""
    why: str


def list_units(source: str, size: int) -> list[Unit]:
    """The units of a corpus.

    Args:
        source: what ``data.train`` of a recipe may say.
        size: records a unit, of what has no shards.

    Raises:
        InputError: there is nothing there, or two shards have one name.
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
        source = str(Path(source).absolute())  # wherever it is then read
    count = len(open_table(source))
    return [Unit(f"{n:05}", source, at, min(size, count - at)) for n, at in enumerate(range(0, count, size))]


@lru_cache(1)
def open_table(source: str) -> Records:
    """The records of a corpus without shards."""
    records = open_records(source, DataConfig(train=source, streaming=False))
    assert isinstance(records, Records)
    return records


def read_unit(unit: Unit) -> Iterator[Sample | Skipped]:
    """The samples of a unit, in order, and what of it cannot be used. Nothing else is held."""
    if unit.count is None:
        return _read_tar(unit)
    return _read_records(open_table(unit.source), unit)


def batches(unit: Unit, size: int, skipped: list[Skipped]) -> Iterator[list[tuple[Sample, Image]]]:
    """The samples of a unit whose pictures can be decoded, in batches; `skipped` takes the others."""

    def good() -> Iterator[tuple[Sample, Image]]:
        for sample in read_unit(unit):
            if isinstance(sample, Skipped):
                skipped.append(sample)
                continue
            try:
                yield sample, read_image(sample.image, f"image {sample.key} of {unit.source}")
            except ImageError as error:
                skipped.append(Skipped(f"{sample.key} in {unit.source}", "image not decoded", str(error)))

    samples = good()
    while batch := list(islice(samples, size)):
        yield batch


def _read_records(records: Records, unit: Unit) -> Iterator[Sample | Skipped]:
    for number in range(unit.first, unit.first + (unit.count or 0)):
        record = records[number]
        if record.unusable is not None:
            cause, why = record.unusable
            yield Skipped(record.key, f"{cause} not read", why)
            continue
        if record.image is None:
            yield Skipped(record.key, "no image", "it has no image")
            continue
        try:
            data = record.image if isinstance(record.image, bytes) else read_bytes(record.image)
        except ImageError as error:
            yield Skipped(record.key, "image not read", str(error))
            continue
        yield Sample(f"{number:09}", data, record.captions, _suffix(data))


STARTS = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*": "tif", b"MM": "tif"}
"""How the files of pictures begin."""


def _suffix(data: bytes) -> str:
    """Of a picture, by what it is."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((suffix for start, suffix in STARTS.items() if data.startswith(start)), "jpg")


# -- reading shards ------------------------------------------------------------------------------------------------


def _read_tar(unit: Unit) -> Iterator[Sample | Skipped]:
    for row in read_shard(unit.source):
        key = row.get(KEY, "")
        name = f"{key} in {unit.source}"
        images = [kind for kind in row if f".{kind}" in IMAGE_SUFFIXES]
        suffix = next((kind for kind in images if f".{kind}" in USUAL_SUFFIXES), images[0] if images else None)
        if BROKEN in row:
            why = f"{unit.source} cannot be read to its end ({row[BROKEN]}): download it again"
            yield Skipped(unit.source, "shard broken", why)
        elif suffix is None or not isinstance(row[suffix], bytes):  # what its .json says is no image
            found = ", ".join(kind for kind in row if kind != KEY)
            expected = f"{', '.join(USUAL_SUFFIXES)}, or another that Pillow reads"
            yield Skipped(name, "no image", f"it has {found}, expected an image ({expected})")
        else:
            column = next((column for column in CAPTION_COLUMNS if column in row), "")
            try:
                captions, _ = read_texts(row.get(column))
            except CellError as error:
                yield Skipped(name, "caption not read", f"{column} {error}")
                continue
            yield Sample(key, row[suffix], captions, suffix)


# -- writing shards ------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes samples to a tar, the same bytes for the same samples."""

    def __init__(self, file: IO[bytes]) -> None:
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115

    def add(self, sample: Sample, about: Mapping[str, Any]) -> None:
        """The picture as it was, and a ``.json``."""
        text = json.dumps(about, ensure_ascii=False).encode()
        for suffix, data in ((sample.suffix, sample.image), ("json", text)):
            entry = tarfile.TarInfo(f"{sample.key}.{suffix}")  # of no time, owner or machine
            entry.size = len(data)
            self._tar.addfile(entry, BytesIO(data))

    def close(self) -> None:
        self._tar.close()

"""A store of frozen features: a folder that many processes add to at once and any number read.

A store holds the features of any number of images under one setting. It consists of parts. A part is written by one
process in one session, is only ever appended to, and is two files:

- ``NAME.bin``: rows, one an image, of fixed size: its features [views, P, E], and for int8 their scales [views, P];
- ``NAME.index.jsonl``: a line for each thing that is known:

  - ``{"image": DIGEST, "row": 3}``: the features of an image are row 3 of this part;
  - ``{"image": DIGEST, "why": "it is damaged"}``: an image cannot be decoded;
  - ``{"image": DIGEST, "file": "/a.png", "size": 812, "mtime_ns": 17}``: which image a file holds, so that it need not
    be read again to know.

A line is written after its row has reached the disk, and counts only if both are whole. So a process can be killed at
any moment, and what it has written stays good. Readers take all parts together.

Legend: N images, V views, P image tokens, E width of the image encoder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

from blip2.distributed import process_index
from blip2.errors import InputError
from blip2.io import parse_json, read_json, write_json

StoredDtype = Literal["bf16", "int8"]
DIGEST = np.dtype("S32")
"""Of a digest's hexadecimal digits."""


def digest(data: bytes) -> str:
    """Names an image by the bytes of its file: 32 hexadecimal digits of BLAKE2b."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


# -- rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How the features of one image lie in a row."""

    views: int
    tokens: int
    """P"""
    width: int
    """E"""
    dtype: StoredDtype

    @property
    def row(self) -> np.dtype[np.void]:
        # bfloat16 has no numpy type: its bits are kept as int16.
        shape = (self.views, self.tokens, self.width)
        if self.dtype == "bf16":
            return np.dtype([("values", "<i2", shape)])
        return np.dtype([("values", "<i1", shape), ("scales", "<f4", shape[:2])])

    def pack(self, features: Float[Tensor, "N V P E"]) -> dict[str, Tensor]:
        """The fields of rows.

        int8 is symmetric, with one scale a token: its largest absolute value becomes 127.
        """
        if self.dtype == "bf16":
            return {"values": features.bfloat16().view(torch.int16)}
        scales = features.abs().amax(dim=-1) / 127
        scaled = features / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        return {"values": scaled.round().to(torch.int8), "scales": scales}

    def unpack(self, fields: Mapping[str, Tensor]) -> BFloat16[Tensor, "*rows P E"]:
        """What :meth:`pack` kept, in bfloat16, int8 too: its own error is several times that of bfloat16."""
        if self.dtype == "bf16":
            return fields["values"].view(torch.bfloat16)
        return (fields["values"].float() * fields["scales"][..., None]).bfloat16()


# -- writing -------------------------------------------------------------------------------------------------------


class Part:
    """What this process adds to a store. Its files are made when there is something to write.

    Raises:
        OSError: from every method, when the disk is full. What was written before stays good.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._path = folder / uuid.uuid4().hex
        self.layout = layout
        self._rows = 0
        self._files: tuple[IO[bytes], IO[bytes]] | None = None

    def add_images(self, images: Sequence[str], fields: Mapping[str, Tensor], broken: Mapping[str, str]) -> None:
        """Add images by their digests: good ones with the fields of their rows, broken ones and why."""
        if not images and not broken:
            return
        data, _ = self._open()
        rows = np.empty(len(images), self.layout.row)
        for name, values in fields.items():
            rows[name] = values.cpu().numpy()
        data.write(rows.tobytes())
        data.flush()
        os.fsync(data.fileno())  # a line must not reach the disk before its row
        numbered = enumerate(images, self._rows)
        self._rows += len(images)
        self._write_lines(
            [{"image": image, "row": row} for row, image in numbered]
            + [{"image": image, "why": why} for image, why in broken.items()]
        )

    def add_file(self, image: str, path: str, found: os.stat_result) -> None:
        """Note what image a file holds; `found` was asked for before the file was read."""
        absolute = str(Path(path).absolute())
        self._write_lines([{"image": image, "file": absolute, "size": found.st_size, "mtime_ns": found.st_mtime_ns}])

    def _write_lines(self, lines: Sequence[dict[str, Any]]) -> None:
        _, index = self._open()
        index.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        index.flush()

    def _open(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._files is None:
            self._files = (
                self._path.with_suffix(".bin").open("xb"),
                self._path.with_suffix(".index.jsonl").open("xb"),
            )
        return self._files

    def close(self) -> None:
        for file in self._files or ():
            file.close()


class About:
    """``about.json``: what a store says of itself, and the error of what it holds."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._path = folder / "about.json"
        self._settings = settings
        self._is_known = self.error is not None
        self._lost = self._all = 0.0

    @property
    def error(self) -> float | None:
        """None where nothing was measured yet."""
        if not self._path.is_file():
            return None
        error = found.get("error") if isinstance(found := read_json(self._path), dict) else None
        if not isinstance(error, int | float):
            raise InputError(f"{self._path} is damaged (it has no error): delete it, and it is measured again")
        return error

    def measured(self, lost: float, all_: float) -> None:
        """Take down sums of squares: of what another batch lost by being kept, and of its features."""
        self._lost, self._all = self._lost + lost, self._all + all_
        if self._is_known or not all_ or process_index() != 0:
            return
        about = {**self._settings, "error": math.sqrt(self._lost / self._all)}
        write_json(self._path, about)


# -- reading -------------------------------------------------------------------------------------------------------


def file_key(path: str, size: int, mtime_ns: int) -> str:
    """Names a file as it is now, and otherwise after it was changed."""
    return digest(f"{Path(path).absolute()}\0{size}\0{mtime_ns}".encode(errors="surrogateescape"))


@dataclass(frozen=True)
class Index:
    """All that is known in a store, as sorted arrays: dictionaries of millions of images would fill the memory."""

    parts: tuple[str, ...] = ()
    images: np.ndarray = field(default_factory=lambda: np.empty(0, DIGEST))
    """Digests of the images whose features are there, sorted."""
    places: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))
    """(part, row) of each of them."""
    files: np.ndarray = field(default_factory=lambda: np.empty(0, DIGEST))
    """:func:`file_key` of the files that were read, sorted."""
    held: np.ndarray = field(default_factory=lambda: np.empty(0, DIGEST))
    """Digest of the image that each of them holds."""
    broken: dict[str, str] = field(default_factory=dict)
    """Why images cannot be decoded, by their digests."""


def read_index(folder: Path, layout: Layout) -> Index:
    """What is in a store at this moment; an empty one where there is none yet."""
    parts = sorted(path.name.removesuffix(".index.jsonl") for path in folder.glob("*.index.jsonl"))
    images, places, files, held = [], [], [], []
    broken: dict[str, str] = {}
    for number, part in enumerate(parts):
        rows = (folder / f"{part}.bin").stat().st_size // layout.row.itemsize
        found: list[tuple[str, int]] = []
        known: list[tuple[str, str]] = []
        for line in _whole_lines(folder / f"{part}.index.jsonl"):
            if "file" in line:
                known.append((file_key(line["file"], line["size"], line["mtime_ns"]), line["image"]))
            elif "why" in line:
                broken[line["image"]] = line["why"]
            elif line["row"] < rows:
                found.append((line["image"], line["row"]))
        images.append(np.array([image for image, _ in found], DIGEST))
        places.append(np.array([(number, row) for _, row in found], np.int64).reshape(-1, 2))
        files.append(np.array([key for key, _ in known], DIGEST))
        held.append(np.array([image for _, image in known], DIGEST))
    if not parts:
        return Index()
    all_images, first = np.unique(np.concatenate(images), return_index=True)
    all_files, first_file = np.unique(np.concatenate(files), return_index=True)
    return Index(
        tuple(parts), all_images, np.concatenate(places)[first], all_files, np.concatenate(held)[first_file], broken
    )


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of an index. One that is not whole, because its process was killed or is writing it, does not count."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                with contextlib.suppress(ValueError):
                    yield parse_json(line)


def find(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each of `wanted` is in `known`, which is sorted; -1 where it is not."""
    if not len(known):
        return np.full(len(wanted), -1)
    at = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    return np.where(known[at] == wanted, at, -1)


class Rows:
    """The rows of a store, memory-mapped: processes on one machine share them."""

    def __init__(self, folder: Path, layout: Layout, parts: Sequence[str]) -> None:
        self.folder, self.layout, self.parts = folder, layout, tuple(parts)
        self._mapped: dict[int, np.memmap[Any, np.dtype[np.void]]] = {}

    def __reduce__(self) -> tuple[type[Rows], tuple[Path, Layout, tuple[str, ...]]]:
        return Rows, (self.folder, self.layout, self.parts)  # worker processes map the files themselves

    def read(self, part: int, row: int, view: int) -> BFloat16[Tensor, "P E"]:
        if part not in self._mapped:
            path = self.folder / f"{self.parts[part]}.bin"
            rows = path.stat().st_size // self.layout.row.itemsize  # behind them a torn one may lie
            self._mapped[part] = np.memmap(path, self.layout.row, mode="r", shape=(rows,))
        mapped = self._mapped[part]
        names = mapped.dtype.names or ()
        return self.layout.unpack({name: torch.from_numpy(mapped[name][row, view].copy()) for name in names})

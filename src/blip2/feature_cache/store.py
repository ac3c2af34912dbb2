"""A store of image features: a folder that several processes can write and read at the same time.

A store contains features of any number of images, computed with the same settings. It consists of parts. A part is
written by one process, is only appended to, and has two files:

- ``NAME.bin``: one row of fixed size per image: its features [V, P, E], and for int8 their scales [V, P];
- ``NAME.index.jsonl``: lines of three kinds:

  - ``{"image": DIGEST, "row": 3}``: row 3 of this part has the features of the image;
  - ``{"image": DIGEST, "why": "it is damaged"}``: the image cannot be decoded;
  - ``{"image": DIGEST, "file": "/a.png", "size": 812, "mtime_ns": 17}``: the file contains the image, and need not be
    read again while its size and time are the same.

A line is written after its row is on the disk, and is valid only if both are complete. A process can therefore be
killed at any time without damage to what it has written. Readers combine all parts.

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

from blip2.distributed import rank
from blip2.errors import InputError
from blip2.io import parse_json, read_json, write_json

StoredDtype = Literal["bf16", "int8"]
DIGEST = np.dtype("S32")
"""NumPy type of a digest: 32 hexadecimal digits."""


def digest(data: bytes) -> str:
    """Return the 128-bit BLAKE2b digest of the bytes of an image, as 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


# -- rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowFormat:
    """The format of a row, which contains the features of one image."""

    num_views: int
    """V"""
    num_tokens: int
    """P"""
    hidden_size: int
    """E"""
    dtype: StoredDtype

    @property
    def numpy_dtype(self) -> np.dtype[np.void]:
        # NumPy has no bfloat16: its bits are stored as int16.
        shape = (self.num_views, self.num_tokens, self.hidden_size)
        if self.dtype == "bf16":
            return np.dtype([("values", "<i2", shape)])
        return np.dtype([("values", "<i1", shape), ("scales", "<f4", shape[:2])])

    def pack(self, features: Float[Tensor, "N V P E"]) -> dict[str, Tensor]:
        """Quantize features; return the fields of the rows.

        int8 is symmetric, with one scale per token, which maps the largest absolute value to 127.
        """
        if self.dtype == "bf16":
            return {"values": features.bfloat16().view(torch.int16)}
        scales = features.abs().amax(dim=-1) / 127
        scaled = features / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        return {"values": scaled.round().to(torch.int8), "scales": scales}

    def unpack(self, fields: Mapping[str, Tensor]) -> BFloat16[Tensor, "*rows P E"]:
        """Dequantize to bfloat16, whose error is several times smaller than that of int8."""
        if self.dtype == "bf16":
            return fields["values"].view(torch.bfloat16)
        return (fields["values"].float() * fields["scales"][..., None]).bfloat16()


# -- writing -------------------------------------------------------------------------------------------------------


class StoreWriter:
    """Writes a part of a store. Its files are created when there is something to write.

    Raises:
        OSError: from every method, if the disk is full. What was written before stays valid.
    """

    def __init__(self, folder: Path, row_format: RowFormat) -> None:
        self._path = folder / uuid.uuid4().hex
        self.row_format = row_format
        self._num_rows = 0
        self._files: tuple[IO[bytes], IO[bytes]] | None = None

    def add_images(self, images: Sequence[str], fields: Mapping[str, Tensor], errors: Mapping[str, str]) -> None:
        """Add images.

        Args:
            images: digests of the images that have features.
            fields: fields of their rows, from :meth:`RowFormat.pack`.
            errors: messages for the images that cannot be decoded, by digest.
        """
        if not images and not errors:
            return
        data, _ = self._open()
        rows = np.empty(len(images), self.row_format.numpy_dtype)
        for name, values in fields.items():
            rows[name] = values.cpu().numpy()
        data.write(rows.tobytes())
        data.flush()
        os.fsync(data.fileno())  # a line must not reach the disk before its row
        numbered = enumerate(images, self._num_rows)
        self._num_rows += len(images)
        self._write_lines(
            [{"image": image, "row": row} for row, image in numbered]
            + [{"image": image, "why": why} for image, why in errors.items()]
        )

    def add_file(self, image: str, path: str, stat: os.stat_result) -> None:
        """Add the digest of the image in a file; `stat` must be older than the reading of the file."""
        absolute = str(Path(path).absolute())
        self._write_lines([{"image": image, "file": absolute, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}])

    def _write_lines(self, lines: Sequence[dict[str, Any]]) -> None:
        _, index = self._open()
        index.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        index.flush()

    def _open(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._files is None:
            self._files = (self._path.with_suffix(".bin").open("xb"), self._path.with_suffix(".index.jsonl").open("xb"))
        return self._files

    def close(self) -> None:
        for file in self._files or ():
            file.close()


class StoreMetadata:
    """The file ``about.json`` of a store: its settings, and the relative error of its features."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._path = folder / "about.json"
        self._settings = settings
        self._is_known = self.rms_error is not None
        self._lost = self._total = 0.0

    @property
    def rms_error(self) -> float | None:
        """Root mean square error of the stored features, relative to the features; ``None`` if not measured yet."""
        if not self._path.is_file():
            return None
        error = found.get("error") if isinstance(found := read_json(self._path), dict) else None
        if not isinstance(error, int | float):
            raise InputError(f"{self._path} is damaged (it has no error): delete it, and it is measured again")
        return error

    def add_squares(self, lost: float, total: float) -> None:
        """Add the sums of squares of the errors and of the features of a batch, and write the file."""
        self._lost, self._total = self._lost + lost, self._total + total
        if not self._is_known and total and rank() == 0:
            write_json(self._path, {**self._settings, "error": math.sqrt(self._lost / self._total)})


# -- reading -------------------------------------------------------------------------------------------------------


def file_key(path: str, size: int, mtime_ns: int) -> str:
    """Return a digest that identifies a version of a file."""
    return digest(f"{Path(path).absolute()}\0{size}\0{mtime_ns}".encode(errors="surrogateescape"))


@dataclass(frozen=True)
class StoreIndex:
    """The combined index of a store, as sorted arrays: dictionaries of millions of images would fill the memory."""

    parts: tuple[str, ...] = ()
    images: np.ndarray = field(default_factory=lambda: np.empty(0, DIGEST))
    """Digests of the images that have features, sorted."""
    locations: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))
    """(part, row) of each image."""
    files: np.ndarray = field(default_factory=lambda: np.empty(0, DIGEST))
    """:func:`file_key` of the known files, sorted."""
    file_images: np.ndarray = field(default_factory=lambda: np.empty(0, DIGEST))
    """Digest of the image in each file."""
    errors: dict[str, str] = field(default_factory=dict)
    """Error messages of the images that cannot be decoded, by digest."""


def read_index(folder: Path, row_format: RowFormat) -> StoreIndex:
    """Read the current content of a store, which may be empty."""
    parts = sorted(path.name.removesuffix(".index.jsonl") for path in folder.glob("*.index.jsonl"))
    images, locations, files, file_images = [], [], [], []
    errors: dict[str, str] = {}
    for number, part in enumerate(parts):
        num_rows = (folder / f"{part}.bin").stat().st_size // row_format.numpy_dtype.itemsize
        image_rows: list[tuple[str, int]] = []
        known: list[tuple[str, str]] = []
        for line in _whole_lines(folder / f"{part}.index.jsonl"):
            if "file" in line:
                known.append((file_key(line["file"], line["size"], line["mtime_ns"]), line["image"]))
            elif "why" in line:
                errors[line["image"]] = line["why"]
            elif line["row"] < num_rows:
                image_rows.append((line["image"], line["row"]))
        images.append(np.array([image for image, _ in image_rows], DIGEST))
        locations.append(np.array([(number, row) for _, row in image_rows], np.int64).reshape(-1, 2))
        files.append(np.array([key for key, _ in known], DIGEST))
        file_images.append(np.array([image for _, image in known], DIGEST))
    if not parts:
        return StoreIndex()
    all_images, first = np.unique(np.concatenate(images), return_index=True)
    all_files, first_file = np.unique(np.concatenate(files), return_index=True)
    return StoreIndex(
        tuple(parts),
        all_images,
        np.concatenate(locations)[first],
        all_files,
        np.concatenate(file_images)[first_file],
        errors,
    )


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete lines of an index. The last may be incomplete if its process was killed or is writing it."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                with contextlib.suppress(ValueError):
                    yield parse_json(line)


def lookup(sorted_values: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the index of each of `values` in `sorted_values`, or -1 if it is absent."""
    if not len(sorted_values):
        return np.full(len(values), -1)
    indices = np.searchsorted(sorted_values, values).clip(max=len(sorted_values) - 1)
    return np.where(sorted_values[indices] == values, indices, -1)


class StoreReader:
    """Reads rows of a store through memory maps, which the processes of a machine share."""

    def __init__(self, folder: Path, row_format: RowFormat, parts: Sequence[str]) -> None:
        self.folder, self.row_format, self.parts = folder, row_format, tuple(parts)
        self._mapped: dict[int, np.memmap[Any, np.dtype[np.void]]] = {}

    def __reduce__(self) -> tuple[type[StoreReader], tuple[Path, RowFormat, tuple[str, ...]]]:
        return StoreReader, (self.folder, self.row_format, self.parts)  # worker processes map the files themselves

    def read(self, part: int, row: int, view: int) -> BFloat16[Tensor, "P E"]:
        if part not in self._mapped:
            path = self.folder / f"{self.parts[part]}.bin"
            dtype = self.row_format.numpy_dtype
            num_rows = path.stat().st_size // dtype.itemsize  # an incomplete row may follow
            self._mapped[part] = np.memmap(path, dtype, mode="r", shape=(num_rows,))
        mapped = self._mapped[part]
        names = mapped.dtype.names or ()
        return self.row_format.unpack({name: torch.from_numpy(mapped[name][row, view].copy()) for name in names})

"""A store of image features: a folder that several processes can write and read at the same time.

A store contains features of any number of images, computed with the same settings. It consists of parts. Each part
is written by one process, which only appends to it, and has two files:

- ``NAME.bin``: one row of fixed size per image: the features [V, P, E], and for int8 the scales [V, P];
- ``NAME.index.jsonl``: lines of three kinds:

  - ``{"image": DIGEST, "row": 3}``: row 3 of this part has the features of the image;
  - ``{"image": DIGEST, "error": "it is damaged"}``: the image cannot be decoded;
  - ``{"image": DIGEST, "file": "/a.png", "size": 812, "mtime_ns": 17}``: the file contains the image. The file is not
    read again while its size and modification time are the same.

A line is written after its row is on the disk, and is valid only if the line and the row are complete. A process can
therefore be killed at any time without damage to finished rows. Readers combine all parts.

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
    """Return the 128-bit BLAKE2b digest of some bytes, such as an image file, as 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


# -- rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowFormat:
    """The format of a row, which contains the features of one image."""

    num_views: int
    """Number of views V."""
    num_tokens: int
    """Number of image tokens P."""
    hidden_size: int
    """Width E of the image encoder."""
    dtype: StoredDtype

    @property
    def numpy_dtype(self) -> np.dtype[np.void]:
        """NumPy type of a row, with the fields ``values`` and, for int8, ``scales``."""
        # NumPy has no bfloat16: its bits are stored as int16.
        shape = (self.num_views, self.num_tokens, self.hidden_size)
        if self.dtype == "bf16":
            return np.dtype([("values", "<i2", shape)])
        return np.dtype([("values", "<i1", shape), ("scales", "<f4", shape[:2])])

    def pack(self, features: Float[Tensor, "N V P E"]) -> dict[str, Tensor]:
        """Convert features to the fields of rows.

        int8 quantization is symmetric, with one scale per token, which maps the largest absolute value to 127.

        Returns:
            ``values`` [N, V, P, E], int8 or the bits of bfloat16 as int16, and for int8 ``scales`` [N, V, P].
        """
        if self.dtype == "bf16":
            return {"values": features.bfloat16().view(torch.int16)}
        scales = features.abs().amax(dim=-1) / 127
        scaled = features / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        return {"values": scaled.round().to(torch.int8), "scales": scales}

    def unpack(self, fields: Mapping[str, Tensor]) -> BFloat16[Tensor, "*rows P E"]:
        """Convert the fields of rows to bfloat16, whose rounding error is several times smaller than the int8 error."""
        if self.dtype == "bf16":
            return fields["values"].view(torch.bfloat16)
        return (fields["values"].float() * fields["scales"][..., None]).bfloat16()


# -- writing -------------------------------------------------------------------------------------------------------


class StoreWriter:
    """Writes a new part of a store. The files of the part are created when the first row or line is added.

    Args:
        folder: the folder of the store.
        row_format: the format of the rows.

    Raises:
        OSError: every method raises it if the disk is full. Rows and lines that were complete stay valid.
    """

    def __init__(self, folder: Path, row_format: RowFormat) -> None:
        self._path = folder / uuid.uuid4().hex
        self.row_format = row_format
        self._num_rows = 0
        self._files: tuple[IO[bytes], IO[bytes]] | None = None

    def add_images(self, images: Sequence[str], fields: Mapping[str, Tensor], errors: Mapping[str, str]) -> None:
        """Add the features of images, and messages about images that cannot be decoded.

        Args:
            images: digests of the images that have features.
            fields: the result of :meth:`RowFormat.pack` for these images.
            errors: messages about images that cannot be decoded, by digest.
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
            + [{"image": image, "error": error} for image, error in errors.items()]
        )

    def add_file(self, image: str, path: str, stat: os.stat_result) -> None:
        """Add the digest of the image in a file.

        Args:
            image: the digest.
            path: path of the file.
            stat: status of the file, which must be taken before the file is read.
        """
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
        """Close the files."""
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
        """Root mean square error of the stored features, divided by the root mean square of the features. ``None``: not
        measured yet.

        Raises:
            InputError: ``about.json`` is damaged.
        """
        if not self._path.is_file():
            return None
        error = found.get("error") if isinstance(found := read_json(self._path), dict) else None
        if not isinstance(error, int | float):
            raise InputError(
                f"{self._path} is damaged: its key error is missing or is not a number; delete the file, which is only"
                " informative"
            )
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
    """The combined index of all parts of a store.

    It consists of sorted arrays, because dictionaries of millions of images would take too much memory.
    """

    parts: tuple[str, ...] = ()
    """Names of the parts."""
    images: np.ndarray = field(default_factory=lambda: np.empty(0, DIGEST))
    """Digests of the images that have features, in ascending order."""
    locations: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))
    """(part, row) of each of `images`, where part is an index in `parts`."""
    files: np.ndarray = field(default_factory=lambda: np.empty(0, DIGEST))
    """:func:`file_key` of each known file, in ascending order."""
    file_images: np.ndarray = field(default_factory=lambda: np.empty(0, DIGEST))
    """Digest of the image in each of `files`."""
    errors: dict[str, str] = field(default_factory=dict)
    """Messages about images that cannot be decoded, by digest."""


def read_index(folder: Path, row_format: RowFormat) -> StoreIndex:
    """Read the current content of a store, which may be empty."""
    found = (path.with_name(path.name.removesuffix(".index.jsonl")) for path in folder.glob("*.index.jsonl"))
    parts = sorted(path.name for path in found if path.with_suffix(".bin").is_file())  # rows may have been deleted
    images, locations, files, file_images = [], [], [], []
    errors: dict[str, str] = {}
    for number, part in enumerate(parts):
        num_rows = (folder / f"{part}.bin").stat().st_size // row_format.numpy_dtype.itemsize
        image_rows: list[tuple[str, int]] = []
        known: list[tuple[str, str]] = []
        for line in _whole_lines(folder / f"{part}.index.jsonl"):
            if "file" in line:
                known.append((file_key(line["file"], line["size"], line["mtime_ns"]), line["image"]))
            elif "error" in line:
                errors[line["image"]] = line["error"]
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
    """Yield the complete lines of an index. The last may be incomplete if a process was killed or is still writing."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                with contextlib.suppress(ValueError):
                    if isinstance(parsed := parse_json(line), dict):
                        yield parsed


def lookup(sorted_values: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the index of each of `values` in `sorted_values`, or -1 for a value that is not in `sorted_values`."""
    if not len(sorted_values):
        return np.full(len(values), -1)
    indices = np.searchsorted(sorted_values, values).clip(max=len(sorted_values) - 1)
    return np.where(sorted_values[indices] == values, indices, -1)


class StoreReader:
    """Reads rows of a store through memory maps, which the processes of a machine share.

    Args:
        folder: the folder of the store.
        row_format: the format of the rows.
        parts: names of the parts, from :class:`StoreIndex`.
    """

    def __init__(self, folder: Path, row_format: RowFormat, parts: Sequence[str]) -> None:
        self.folder, self.row_format, self.parts = folder, row_format, tuple(parts)
        self._mapped: dict[int, np.memmap[Any, np.dtype[np.void]]] = {}

    def __reduce__(self) -> tuple[type[StoreReader], tuple[Path, RowFormat, tuple[str, ...]]]:
        return StoreReader, (self.folder, self.row_format, self.parts)  # each worker process maps the files itself

    def read(self, part: int, row: int, view: int) -> BFloat16[Tensor, "P E"]:
        """Return the features of one view of the image in a row.

        Args:
            part: index of the part.
            row: index of the row in this part.
            view: number of the view; 0 is the whole image.
        """
        if part not in self._mapped:
            path = self.folder / f"{self.parts[part]}.bin"
            dtype = self.row_format.numpy_dtype
            num_rows = path.stat().st_size // dtype.itemsize  # an incomplete row may follow
            self._mapped[part] = np.memmap(path, dtype, mode="r", shape=(num_rows,))
        mapped = self._mapped[part]
        names = mapped.dtype.names or ()
        return self.row_format.unpack({name: torch.from_numpy(mapped[name][row, view].copy()) for name in names})

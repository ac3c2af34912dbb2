"""Images from anywhere, decoded safely, augmented (paper §3.4) and normalized.

Everything becomes 8-bit RGB: rotated as its EXIF says, transparency over white, 16-bit and float scaled, CMYK and
palettes converted, the first frame of an animation.
"""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from blip2.backbones.vision import Preprocessing
from blip2.errors import InputError
from blip2.io import read_regular

ImageLike = str | os.PathLike[str] | bytes | bytearray | io.BufferedIOBase | Image.Image | np.ndarray | Tensor
"""A path, the bytes of a file, a binary file, a PIL image, or an array [H, W], [H, W, 3 or 4].

Arrays of floats are in [0, 1], those of uint8 in [0, 255] and those of uint16 in [0, 65535]. Other integers count to
the first of 255 and 65535 that holds their largest value.
"""

USUAL_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def _find_suffixes() -> tuple[str, ...]:
    def is_stub(kind: str) -> bool:  # which Pillow identifies and does not decode
        opener: Any = Image.OPEN[kind][0]
        return isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)

    Image.init()
    read = {
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN
        and kind not in ("EPS", "MPEG")  # a program, which is never run, and a video
        and not is_stub(kind)
    }
    return (*USUAL_SUFFIXES, *sorted(read - set(USUAL_SUFFIXES)))


IMAGE_SUFFIXES = _find_suffixes()
"""How the names of image files end: all that Pillow reads, the usual ones first."""

OVERSHOOT = 0.05
"""So far beyond 0 and 1 resampling may take the floats of an array."""
MAX_PIXELS = 120_000_000
"""Larger images are refused before they are decoded: a small file can unpack to gigabytes."""
MAX_BYTES = 4 * MAX_PIXELS
"""Of an image file: that of the largest image without any compression."""
MAX_SCANNED = 20 * MAX_PIXELS
"""Pixels of a JPEG times its scans. A progressive one is decoded in ten or so scans of all its pixels; a small file can
have thousands, each of which takes as long."""


START_OF_SCAN = b"\xff\xda"
"""Begins each scan of a JPEG; what it compresses never holds it."""


class ImageError(InputError):
    """An image that cannot be decoded; the message names it and says why."""


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageError: it cannot be read, is no regular file (a pipe or a device may never end), or has more than
            :data:`MAX_BYTES`.
    """
    try:
        return read_regular(path, MAX_BYTES)
    except InputError as error:
        raise ImageError(f"image {error}") from error
    except (OSError, ValueError) as error:  # ValueError: the path holds what no path can
        raise unreadable(path, error) from error


def unreadable(path: str | os.PathLike[str], error: OSError | ValueError) -> ImageError:
    """What to say of a file that cannot be read."""
    why = getattr(error, "strerror", None) or error
    return ImageError(f"image {os.fspath(path)} cannot be read ({why}): check its path")


def describe_name(name: str) -> str | None:
    """What a text given as the path of an image is, where it is no path; None where it may be one."""
    if ":" not in name and not name.startswith("~/"):  # nearly all
        return None
    if name.startswith("file://"):
        return f"the URL {name[:80]!r}, expected the path of a file: write the path alone"
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name):
        return f"the URL {name[:80]!r}, expected the path of a file: download the image first"
    if name.startswith("data:"):
        return f"the data URL {name[:30]!r}, expected the path of a file: decode its base64 to bytes"
    if name.startswith("~/"):
        return f"{name[:80]!r}, whose ~ only a shell expands, expected the path of a file: write it from / on"
    return None


def read_image(image: ImageLike | Any, name: str | None = None) -> Image.Image:
    """Decode to 8-bit RGB.

    Args:
        image: an :data:`ImageLike`.
        name: of a file or its bytes, for messages; None: its path or its length.

    Raises:
        ImageError: no such file, empty, not an image, damaged, more than :data:`MAX_PIXELS`, or another object than an
            image.
    """
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()  # numpy has no bfloat16
    if isinstance(image, np.ndarray):
        return _from_array(_check_range(image), "the array given as an image")
    if isinstance(image, Image.Image):
        return _given(image, f"image {getattr(image, 'filename', '') or 'given by PIL'}")
    image = _path_or_bytes(image)
    if name is None:
        name = f"image of {len(image)} bytes" if isinstance(image, bytes) else f"image {os.fspath(image)}"
    data = image if isinstance(image, bytes) else read_bytes(image)
    if not data:
        raise ImageError(f"{name} is empty (0 bytes): copy or download it again")
    with open_image(data, name, shows=isinstance(image, bytes)) as opened:
        return _to_rgb(opened, name)


@contextmanager
def open_image(data: bytes, name: str, shows: bool = True) -> Iterator[Image.Image]:
    """The image in the bytes of a file, not decoded yet; the one place where such bytes reach Pillow.

    Args:
        name: of the image, for messages.
        shows: whether a message may show how the bytes begin. Not of a file that a table names: it can be any file.

    Raises:
        ImageError: not an image, damaged, or too large; also while it is decoded, within the context.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata, and of bombs below its own limit
            with Image.open(io.BytesIO(data)) as opened:
                _check(opened, name, data.count(START_OF_SCAN) if opened.format in ("JPEG", "MPO") else 1)
                yield opened
    except UnidentifiedImageError as error:
        begins = f"begins with {data[:12]!r}" if shows else "begins as no image does"
        begins = "begins with <, as a page of the web does" if data[:1] == b"<" else begins
        raise ImageError(f"{name} is not an image (it {begins}): save it as PNG or JPEG") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has more than the {MAX_PIXELS:,} pixels allowed: make it smaller") from error
    except ImageError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files
        raise ImageError(_damaged(name, error)) from error


def _path_or_bytes(image: Any) -> str | os.PathLike[str] | bytes:
    """An image that is no array and not PIL's."""
    if isinstance(image, io.IOBase) and not isinstance(image, io.TextIOBase):
        file, start = image, image.tell() if image.seekable() else None
        image = file.read()
        if start is not None:  # or the file would be empty when it is read once more
            file.seek(start)
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if not isinstance(image, str | os.PathLike):
        what = (
            f"a {type(image).__name__} of {len(image)}" if isinstance(image, list | tuple | dict) else repr(image)[:80]
        )
        raise ImageError(
            f"an image is {what}, expected a path, the bytes of a file, a PIL image, or an array [H, W, 3]: give these,"
            " several in one list"
        )
    if isinstance(image, str) and (problem := describe_name(image)):
        raise ImageError(f"an image is {problem}")
    return image


def _check(image: Image.Image, name: str, scans: int = 1) -> None:
    """Look at what an image says of itself before it is decoded."""
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ImageError(
            f"{name} has {image.width} x {image.height} pixels, more than the {MAX_PIXELS:,} allowed: make it smaller"
        )
    if scans * pixels > MAX_SCANNED:
        raise ImageError(
            f"{name} has {scans} scans of {image.width} x {image.height} pixels, more than the"
            f" {MAX_SCANNED // pixels} allowed at this size: save it again as a plain JPEG"
        )
    if image.format == "EPS":
        raise ImageError(f"{name} is PostScript, a program, which is never run: save it as PNG or JPEG")


def _given(image: Image.Image, name: str) -> Image.Image:
    try:
        _check(image, name)
        return _to_rgb(image, name)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ImageError(_damaged(name, error)) from error


def _damaged(name: str, error: Exception) -> str:
    return f"{name} is damaged ({' '.join(str(error).split())}): copy or download it again"


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    clear = _transparent_value(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        array = np.asarray(image)
        drawn = _from_array(array, name)
        if isinstance(clear, int):
            drawn.paste((255, 255, 255), mask=Image.fromarray(np.where(array == clear, 255, 0).astype(np.uint8)))
        return drawn
    if clear is not None:
        image.info["transparency"] = clear
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _transparent_value(image: Image.Image) -> Any:
    """The value whose pixels are transparent, in the range of the decoded pixels; None where there is none.

    Pillow gives it in the range of the file, and scales the pixels of gray PNGs with 2 or 4 bits and of color PNGs with
    16 bits to 8 bits.
    """
    clear = image.info.get("transparency")
    tiles = getattr(image, "tile", None)  # there until the image is decoded
    raw = tiles[0][3] if tiles else None
    if isinstance(clear, int) and raw in ("L;2", "L;4"):
        return clear * (85 if raw == "L;2" else 17)
    if isinstance(clear, tuple) and raw == "RGB;16B":
        return tuple(value >> 8 for value in clear)
    return clear


def _check_range(array: np.ndarray) -> np.ndarray:
    """The array, unless its numbers are those of a normalized image: nearly all black, it would pass for a dark one."""
    if array.dtype.kind not in "if" or array.size == 0 or not np.isfinite(array).all():
        return array
    low, high = float(array.min()), float(array.max())
    slack = OVERSHOOT if array.dtype.kind == "f" else 0
    if low < -slack or (array.dtype.kind == "f" and high > 1 + slack):
        raise ImageError(
            f"the array given as an image holds {array.dtype} from {low:g} to {high:g}, expected floats in [0, 1] or"
            " integers in [0, 255]: undo its normalization, or convert it"
        )
    return array


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    given = array.shape
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise ImageError(f"{name} has the shape {list(given)}, expected [H, W], [H, W, 3] or [H, W, 4]: rearrange it")
    if array.dtype.kind not in "buif":
        raise ImageError(f"{name} holds {array.dtype}, expected integers or floats: convert it")
    if array.dtype != np.uint8:
        # Row by row, as it were: all of a large image in float64 would take gigabytes.
        rows = max((1 << 20) // (array.shape[1] * array.shape[2]), 1)
        parts = [slice(start, start + rows) for start in range(0, len(array), rows)]
        if array.dtype.kind == "f" and not all(np.isfinite(array[part]).all() for part in parts):
            raise ImageError(f"{name} holds values that are not finite (NaN or infinite): replace them")
        values, white, array = array, _white(array), np.empty(array.shape, np.uint8)
        for part in parts:
            array[part] = ((values[part].astype(np.float64) / white).clip(0, 1) * 255).round()
    if array.shape[2] == 1:
        array = array.repeat(3, axis=2)
    mode = "RGBA" if array.shape[2] == 4 else "RGB"
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array), mode), name)


def _white(array: np.ndarray) -> float:
    """The value that stands for white; what a file or array means by its numbers is nowhere written down."""
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return 65535.0
    highest = float(array.max())
    if array.dtype.kind in "bf" and highest < 2:  # resampling overshoots 1 a little
        return 1.0
    return next((white for white in (255.0, 65535.0) if highest <= white), highest)


def to_pixels(image: Image.Image, preprocessing: Preprocessing) -> Float[Tensor, "3 H W"]:
    """Resize (bicubic, to a square, nothing cut off) and normalize, for evaluation."""
    size = preprocessing.image_size
    return _normalize(image.resize((size, size), Image.Resampling.BICUBIC), preprocessing)


def augment_to_pixels(
    image: Image.Image,
    preprocessing: Preprocessing,
    random: np.random.Generator,
    smallest_crop: float = 0.5,
    flip: bool = True,
) -> Float[Tensor, "3 H W"]:
    """Random resized crop and horizontal flip (§3.4), then normalize, for training.

    Args:
        random: where all randomness comes from.
        smallest_crop: the crop covers between this share and all of the image, at an aspect ratio of 3:4 to 4:3.
        flip: mirror half of the images.
    """
    size = preprocessing.image_size
    box = _random_box(image.width, image.height, random, smallest_crop)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if flip and random.random() < 0.5:
        image = ImageOps.mirror(image)
    return _normalize(image, preprocessing)


def _random_box(
    width: int, height: int, random: np.random.Generator, smallest: float
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a random crop inside an image; the whole image when no draw fits."""
    for _ in range(10):
        area = width * height * random.uniform(smallest, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = random.uniform(0, width - w), random.uniform(0, height - h)
            return left, top, left + w, top + h
    return 0.0, 0.0, float(width), float(height)


def _normalize(image: Image.Image, preprocessing: Preprocessing) -> Float[Tensor, "3 H W"]:
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
    if preprocessing.bgr:
        pixels = pixels.flip(0)
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    return (pixels - mean[:, None, None]) / std[:, None, None]

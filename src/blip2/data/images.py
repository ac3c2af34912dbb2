"""Decode images safely, augment them (paper §3.4) and normalize them.

Every image is converted to 8-bit RGB: EXIF orientation is applied, transparent images are placed on white, 16-bit and
float values are scaled, CMYK and palettes are converted, and only the first frame of an animation is read.
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
from blip2.io import read_regular_file

ImageLike = str | os.PathLike[str] | bytes | bytearray | io.BufferedIOBase | Image.Image | np.ndarray | Tensor
"""A path, the bytes of a file, an open binary file, a PIL image, or an array or tensor of pixels.

Arrays and tensors have the shape [H, W], [H, W, 1], [H, W, 3] (RGB) or [H, W, 4] (RGB and alpha). The range of floats
is [0, 1], that of uint8 [0, 255] and that of uint16 [0, 65535]. For other integers, white is 255, or 65535 if a value
is larger than 255.
"""

COMMON_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def _find_suffixes() -> tuple[str, ...]:
    def is_stub(kind: str) -> bool:  # identified by Pillow, but not decoded
        opener: Any = Image.OPEN[kind][0]
        return isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)

    Image.init()
    readable = {
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN
        and kind not in ("EPS", "MPEG")  # a program, which is never run, and a video
        and not is_stub(kind)
    }
    return (*COMMON_SUFFIXES, *sorted(readable - set(COMMON_SUFFIXES)))


IMAGE_SUFFIXES = _find_suffixes()
"""Suffixes of all image files that Pillow reads; the suffixes in :data:`COMMON_SUFFIXES` come first."""

FLOAT_TOLERANCE = 0.05
"""Maximum distance of the floats of an array from [0, 1]. Resampling can produce values slightly outside."""
MAX_PIXELS = 120_000_000
"""Maximum number of pixels of an image. Larger images are refused before they are decoded, because a small file can
decode to gigabytes."""
MAX_FILE_BYTES = 4 * MAX_PIXELS
"""Maximum size of an image file in bytes: four uncompressed bytes for each of :data:`MAX_PIXELS`."""
MAX_SCANNED_PIXELS = 20 * MAX_PIXELS
"""Maximum product of the number of pixels and the number of scans of a JPEG. A progressive JPEG usually has about ten
scans, but a small file can have thousands, and decoding takes time for every scan."""
PHOTOMETRIC_INTERPRETATION, WHITE_IS_ZERO = 262, 0
"""The tag of a TIFF that says what its values mean, and the value of a negative."""
MAX_PATH_CHARACTERS = 4096
"""Maximum length of a path. A longer text is usually an image in base64."""
START_OF_SCAN = b"\xff\xda"
"""The marker at the start of each scan of a JPEG. These two bytes never occur in compressed data."""


class ImageError(InputError):
    """An image that cannot be decoded. The message names the image and the reason."""


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read an image file.

    Raises:
        ImageError: the file cannot be read, is not a regular file (reading a pipe or a device may never end), or is
            larger than :data:`MAX_FILE_BYTES`.
    """
    try:
        return read_regular_file(path, MAX_FILE_BYTES)
    except InputError as error:
        raise ImageError(f"image {error}") from error
    except OSError as error:
        raise unreadable_image(path, error) from error


def unreadable_image(path: str | os.PathLike[str], error: OSError | ValueError) -> ImageError:
    """Return the error for an image file that cannot be read."""
    reason = getattr(error, "strerror", None) or error
    return ImageError(f"image {os.fspath(path)} cannot be read ({reason}): check its path and permissions")


def describe_invalid_path(name: str) -> str | None:
    """Describe a text that cannot be the path of an image; return None if the text may be a path.

    The description follows "is" or "holds" in an error message.
    """
    if len(name) > MAX_PATH_CHARACTERS:
        return (
            f"a text of {len(name):,} characters that begins with {name[:30]!r}, expected the path of a file: decode"
            " base64 to bytes"
        )
    if ":" not in name and not name.startswith("~/"):  # true of nearly every path
        return None
    if name.startswith("file://"):
        return f"the URL {name[:80]!r}, expected the path of a file: leave out file://"
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name):
        return f"the URL {name[:80]!r}, expected the path of a file: download the image first"
    if name.startswith("data:"):
        return f"the data URL {name[:30]!r}, expected the path of a file: decode its base64 to bytes"
    if name.startswith("~/"):
        return f"{name[:80]!r}, whose ~ only a shell expands, expected the path of a file: write the absolute path"
    return None


def read_image(image: ImageLike | Any, name: str | None = None) -> Image.Image:
    """Decode an image to 8-bit RGB.

    Args:
        image: an :data:`ImageLike`.
        name: the name of an image given as a path or as bytes, for error messages. None: the path or the number of
            bytes.

    Returns:
        A PIL image in mode RGB.

    Raises:
        ImageError: the file does not exist, is empty, is not an image, is damaged or has more than :data:`MAX_PIXELS`;
            or `image` is not an :data:`ImageLike`, or is an array of another shape or range.
    """
    if isinstance(image, Tensor):
        image = _to_numpy(image)
    if isinstance(image, np.ndarray):
        return _from_array(_check_range(image), "the array given as an image")
    if isinstance(image, Image.Image):
        name = f"image {getattr(image, 'filename', '') or 'given by PIL'}"
        try:
            _check(image, name)
            return _to_rgb(image, name)
        except ImageError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            raise _damaged(name, error) from error
    image = _path_or_bytes(image)
    if name is None:
        name = f"image of {len(image)} bytes" if isinstance(image, bytes) else f"image {os.fspath(image)}"
    data = image if isinstance(image, bytes) else read_bytes(image)
    if not data:
        raise ImageError(f"{name} is empty (0 bytes): copy or download it again")
    with open_image(data, name, show_bytes=isinstance(image, bytes)) as opened:
        return _to_rgb(opened, name)


def _to_numpy(image: Tensor) -> np.ndarray:
    try:
        image = image.detach().cpu()
        return (image.float() if image.is_floating_point() else image).numpy(force=True)  # numpy has no bfloat16
    except (RuntimeError, TypeError, NotImplementedError) as error:  # sparse, or without data
        raise ImageError(
            f"the tensor given as an image has no array of values ({' '.join(str(error).split())[:120]}): give a dense"
            " tensor on a device"
        ) from error


@contextmanager
def open_image(data: bytes, name: str, show_bytes: bool = True) -> Iterator[Image.Image]:
    """Context manager: open the bytes of an image file as a PIL image, without decoding the pixels.

    All bytes of image files that reach Pillow go through this function.

    Args:
        data: the bytes of the file.
        name: the name of the image in error messages.
        show_bytes: whether an error message may show the first bytes of the file. False for files that a table names,
            because a table can name any file.

    Raises:
        ImageError: the bytes are not an image, are damaged, or have more than :data:`MAX_PIXELS`. Errors that Pillow
            raises within the context, while the image is decoded, are converted to ImageError as well.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata and of decompression bombs below its limit
            with Image.open(io.BytesIO(data)) as opened:
                _check(opened, name, data.count(START_OF_SCAN) if opened.format in ("JPEG", "MPO") else 1)
                yield opened
    except UnidentifiedImageError as error:
        start = f"begins with {data[:12]!r}" if show_bytes else "does not begin like an image"
        start = "begins with <, like a web page" if data[:1] == b"<" else start
        raise ImageError(f"{name} is not an image (it {start}): replace it by a PNG or JPEG file") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has more than the {MAX_PIXELS:,} pixels allowed: make it smaller") from error
    except ImageError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files
        raise _damaged(name, error) from error


def _path_or_bytes(image: Any) -> str | os.PathLike[str] | bytes:
    """Return the path or the bytes of an image that is neither an array nor a PIL image."""
    if isinstance(image, io.IOBase) and not isinstance(image, io.TextIOBase):
        file, start = image, image.tell() if image.seekable() else None
        image = file.read()
        if start is not None:  # so that the file can be read again
            file.seek(start)
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if not isinstance(image, str | os.PathLike):
        found = (
            f"a {type(image).__name__} of {len(image)}" if isinstance(image, list | tuple | dict) else repr(image)[:80]
        )
        raise ImageError(
            f"an image is {found}, expected a path, the bytes of a file, a PIL image, or an array [H, W, 3]: give one"
            " of these, or a list of these"
        )
    if isinstance(image, str) and (problem := describe_invalid_path(image)):
        raise ImageError(f"an image is {problem}")
    return image


def _check(image: Image.Image, name: str, scans: int = 1) -> None:
    """Check the size and the format in the header of an image before it is decoded."""
    pixels = image.width * image.height
    if not pixels:
        raise ImageError(f"{name} has {image.width} x {image.height} pixels, expected at least one: replace it")
    if pixels > MAX_PIXELS:
        raise ImageError(
            f"{name} has {image.width} x {image.height} pixels, more than the {MAX_PIXELS:,} allowed: make it smaller"
        )
    if scans * pixels > MAX_SCANNED_PIXELS:
        raise ImageError(
            f"{name} has {scans} scans of {image.width} x {image.height} pixels, more than the"
            f" {MAX_SCANNED_PIXELS // pixels} allowed at this size: save it as a JPEG that is not progressive"
        )
    if image.format == "EPS":
        raise ImageError(f"{name} is a PostScript program, which is not run: save it as PNG or JPEG")


def _damaged(name: str, error: Exception) -> ImageError:
    return ImageError(f"{name} is damaged ({' '.join(str(error).split())}): copy or download it again")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    transparent = _transparent_value(image)
    is_negative = getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        array = np.asarray(image)
        low, high = float(array.min()), float(array.max())
        if low < -FLOAT_TOLERANCE * max(high, 1.0):
            raise ImageError(f"{name} holds values from {low:g}, expected none below 0: scale or shift them")
        rgb = _from_array(array, name)
        if is_negative:  # Pillow inverts TIFFs with 8 bits only
            rgb = ImageOps.invert(rgb)
        if isinstance(transparent, int):
            rgb.paste((255, 255, 255), mask=Image.fromarray(np.where(array == transparent, 255, 0).astype(np.uint8)))
        return rgb
    if transparent is not None:
        image.info["transparency"] = transparent
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _transparent_value(image: Image.Image) -> Any:
    """Return the value that marks transparent pixels, in the range of the decoded pixels; None if no value does.

    Pillow reports the value in the range of the file, but scales the pixels of gray PNGs with 2 or 4 bits and of color
    PNGs with 16 bits to 8 bits.
    """
    value = image.info.get("transparency")
    tiles = getattr(image, "tile", None)  # present until the image is decoded
    raw = tiles[0][3] if tiles else None
    if isinstance(value, int) and raw in ("L;2", "L;4"):
        return value * (85 if raw == "L;2" else 17)
    if isinstance(value, tuple) and raw == "RGB;16B":
        return tuple(channel >> 8 for channel in value)
    return value


def _check_range(array: np.ndarray) -> np.ndarray:
    """Return the array, or raise ImageError if its values are out of range.

    A normalized image, for example, has such values, and would be read as a nearly black image.
    """
    if array.dtype.kind not in "if" or array.size == 0 or not np.isfinite(array).all():
        return array
    low, high = float(array.min()), float(array.max())
    tolerance = FLOAT_TOLERANCE if array.dtype.kind == "f" else 0
    if low < -tolerance or (array.dtype.kind == "f" and high > 1 + tolerance):
        raise ImageError(
            f"the array given as an image holds {array.dtype} from {low:g} to {high:g}, expected floats in [0, 1] or"
            " integers in [0, 255]: undo the normalization of the array, or convert it"
        )
    return array


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise ImageError(f"{name} has the shape {list(shape)}, expected [H, W], [H, W, 3] or [H, W, 4]: rearrange it")
    if array.dtype.kind not in "buif":
        raise ImageError(f"{name} holds {array.dtype}, expected integers or floats: convert it")
    if array.dtype != np.uint8:
        # Blocks of rows are converted one by one, because a large image in float64 would take gigabytes.
        num_rows = max((1 << 20) // (array.shape[1] * array.shape[2]), 1)
        blocks = [slice(start, start + num_rows) for start in range(0, len(array), num_rows)]
        if array.dtype.kind == "f" and not all(np.isfinite(array[block]).all() for block in blocks):
            raise ImageError(f"{name} holds values that are not finite (NaN or infinite): replace them")
        values, white, array = array, _white_value(array), np.empty(array.shape, np.uint8)
        for block in blocks:
            array[block] = ((values[block].astype(np.float64) / white).clip(0, 1) * 255).round()
    if array.shape[2] == 1:
        array = array.repeat(3, axis=2)
    mode = "RGBA" if array.shape[2] == 4 else "RGB"
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array), mode), name)


def _white_value(array: np.ndarray) -> float:
    """Infer the value of white, which neither files nor arrays state, from the dtype and the largest value."""
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return 65535.0
    highest = float(array.max())
    if array.dtype.kind in "bf" and highest < 2:  # resampling overshoots 1 slightly
        return 1.0
    return next((white for white in (255.0, 65535.0) if highest <= white), highest)


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> Float[Tensor, "3 H W"]:
    """Preprocess an image for evaluation: resize the whole image to a square (bicubic), and normalize it."""
    size = preprocessing.image_size
    return _normalize(image.resize((size, size), Image.Resampling.BICUBIC), preprocessing)


def train_transform(
    image: Image.Image,
    preprocessing: Preprocessing,
    rng: np.random.Generator,
    min_crop_scale: float = 0.5,
    flip: bool = True,
) -> Float[Tensor, "3 H W"]:
    """Preprocess an image for training: crop it at random, resize it, flip it at random (§3.4), and normalize it.

    Args:
        preprocessing: the size (H = W = ``image_size``) and the normalization.
        rng: the random number generator for the crop and the flip.
        min_crop_scale: the minimum area of the crop as a fraction of the image, in (0, 1]. The aspect ratio of the crop
            is in [3/4, 4/3].
        flip: whether to mirror the crop horizontally with probability 1/2.
    """
    size = preprocessing.image_size
    box = _sample_crop(image.width, image.height, rng, min_crop_scale)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return _normalize(image, preprocessing)


def _sample_crop(
    width: int, height: int, rng: np.random.Generator, min_scale: float
) -> tuple[float, float, float, float]:
    """Draw a crop as (left, top, right, bottom). If none of ten crops fits into the image, return the whole image."""
    for _ in range(10):
        area = width * height * rng.uniform(min_scale, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    return 0.0, 0.0, float(width), float(height)


def _normalize(image: Image.Image, preprocessing: Preprocessing) -> Float[Tensor, "3 H W"]:
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
    if preprocessing.bgr:
        pixels = pixels.flip(0)
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    return (pixels - mean[:, None, None]) / std[:, None, None]

"""Draw the images of scenes: cut-outs that do not overlap, on a background in shades of one color."""

from __future__ import annotations

import io
import logging
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from blip2.data.images import ImageError, open_image, read_bytes
from blip2.data.scene_kinds import COLORS
from blip2.errors import InputError

log = logging.getLogger("blip2")

IMAGE_SIZE = 224
"""Height and width of a scene in pixels."""
MARGIN = 6
"""Width of the empty border of a scene in pixels."""
JPEG_QUALITY = 92
"""Quality of the JPEG files."""
TEXTURE_CONTRAST = {"white": 0.05, "yellow": 0.06}
"""Relative contrast of textures in the colors that need less than the default: a dark yellow would be orange."""
TEXTURES = ("stripes", "checks", "dots", "noise")
MIN_ALPHA = 24
"""Minimum alpha, in [0, 255], of a pixel that belongs to an object."""
OBJECT_SIZES = {
    "pair": (88.0, 100.0),
    "count": (60.0, 72.0),
    "triple": (54.0, 63.0),
    "small": (50.0, 60.0),
    "large": (98.0, 112.0),
}
"""Minimum and maximum length in pixels of the longer side of an object, by the size or else the type of the scene."""
MAX_CUTOUT_SIZE = 168
"""Maximum height and width of a loaded cut-out in pixels."""
JITTER = 2.0
"""Maximum random shift in pixels, and maximum random change of scale in percent, of each object in each image."""

CUTOUTS = "cutouts"
"""Name of the folder of cut-outs in the folder of an asset. The folder of cut-outs has a subfolder for each kind."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Cutout:
    """An object without its background."""

    name: str
    """``KIND/FILE`` below the folder of cut-outs, without the suffix."""
    image: Image.Image
    """The object in mode RGBA, cropped to the visible part."""


def trim(image: Image.Image) -> Image.Image:
    """Crop an image with an alpha channel to the visible part, whose alpha is at least :data:`MIN_ALPHA`.

    Returns:
        The cropped image in mode RGBA.

    Raises:
        ImageError: the image has no visible part, or no transparent background.
    """
    image = image.convert("RGBA")
    alpha = image.getchannel("A").point([255 * (value >= MIN_ALPHA) for value in range(256)])
    box = alpha.getbbox()
    if box is None or alpha.getextrema()[0]:
        raise ImageError("it has no transparent background" if box else "it has no visible part")
    return image.crop(box)


def save_cutouts(source: Path, kinds: Mapping[str, Sequence[str]], folder: Path, draw: Callable[[Path], bytes]) -> None:
    """Save cut-outs for scenes as ``cutouts/KIND/NUMBER-NAME.png`` in `folder`.

    Args:
        source: the folder of the original images, PNG or SVG.
        kinds: for each kind, the paths of its images below `source`, without suffix. Files that are missing or cannot
            be used are skipped.
        folder: the folder to write to. If it contains a file LICENSE or LICENCE, a copy is saved as
            ``cutouts/LICENSE``.
        draw: renders an SVG file, and returns the PNG file.
    """
    for kind, names in kinds.items():
        for number, name in enumerate(names):
            path = next((p for s in (".png", ".svg") if (p := source / f"{name}{s}").is_file()), None)
            if path is None:
                continue
            try:
                data = draw(path) if path.suffix == ".svg" else read_bytes(path)
                with open_image(data, str(path)) as opened:
                    image = trim(opened)
            except ImageError as error:
                log.info("left out a cut-out of kind %s: %s: %s", kind, path.name, error)
                continue
            (folder / CUTOUTS / kind).mkdir(parents=True, exist_ok=True)
            image.save(folder / CUTOUTS / kind / f"{number:02}-{path.stem}.png")
    for license in folder.glob("LICEN[CS]E"):
        if (folder / CUTOUTS).is_dir():
            shutil.copyfile(license, folder / CUTOUTS / "LICENSE")


def read_cutouts(folder: Path, kinds: Collection[str] | None = None) -> dict[str, tuple[Cutout, ...]]:
    """Read the cut-outs of each kind, ``KIND/*.png`` below a folder, in sorted order.

    Args:
        folder: the folder with one subfolder for each kind.
        kinds: the kinds to read; None: all.

    Returns:
        The cut-outs by kind, at most :data:`MAX_CUTOUT_SIZE` pixels high and wide.

    Raises:
        InputError: there are no cut-outs, one of `kinds` has no folder, the name of a subfolder is not a lower-case
            noun, or a file cannot be read or has no transparent background.
    """
    cutouts: dict[str, tuple[Cutout, ...]] = {}
    missing = sorted(kind for kind in kinds or () if not (folder / kind).is_dir())
    if missing:
        raise InputError(
            f"{folder} has no cut-outs of {', '.join(missing)}: choose kinds that have a subfolder in this folder"
        )
    for path in sorted(folder.glob("*/*.png")):
        if kinds is not None and path.parent.name not in kinds:
            continue
        if not re.fullmatch("[a-z]{2,}", path.parent.name):
            raise InputError(
                f"the folder {path.parent} is not named after a kind, expected one noun in lower-case letters (a to z):"
                " rename the folder"
            )
        try:
            with open_image(read_bytes(path), "it") as opened:
                image = trim(opened)
        except ImageError as error:
            raise InputError(f"cut-out {path} cannot be used ({error}): replace or remove it") from error
        image.thumbnail((MAX_CUTOUT_SIZE, MAX_CUTOUT_SIZE), Image.Resampling.LANCZOS)
        cutouts[path.parent.name] = (
            *cutouts.get(path.parent.name, ()),
            Cutout(f"{path.parent.name}/{path.stem}", image),
        )
    if not cutouts:
        raise InputError(
            f"{folder} holds no cut-outs, expected a subfolder of PNG files with a transparent background for each"
            " kind: add subfolders, or give another folder"
        )
    return cutouts


# -- places --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placement:
    """Random numbers that determine the places of objects. Near twins (scenes that differ in one fact) share them."""

    numbers: tuple[float, ...]
    """Eight random numbers, uniform in [0, 1)."""
    centers: tuple[tuple[float, float], ...]
    """Centers (x, y) in pixels at which three objects of one kind do not overlap."""

    @staticmethod
    def draw(rng: np.random.Generator) -> Placement:
        apart = OBJECT_SIZES["count"][1] * (1 + JITTER / 100) + 2 * JITTER + 2
        low, high = MARGIN + apart / 2, IMAGE_SIZE - MARGIN - apart / 2
        while True:
            centers = rng.uniform(low, high, (3, 2))
            distances = [np.abs(centers[i] - centers[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))]
            if min(distances) >= apart:
                return Placement(tuple(rng.random(8).tolist()), tuple((float(x), float(y)) for x, y in centers))


def place_objects(
    sizes: Sequence[tuple[int, int]],
    scales: Sequence[float],
    type: str,
    relation: str,
    size: str,
    placement: Placement,
    rng: np.random.Generator,
) -> list[Box]:
    """Return the box of each object, in the order of `sizes`. Boxes do not overlap.

    Args:
        sizes: (width, height) of each cut-out in pixels; from left to right or from top to bottom if there is a
            relation.
        scales: size of each object in [0, 1], from the minimum to the maximum of :data:`OBJECT_SIZES`.
        type, relation, size: as in :class:`~blip2.data.scene_texts.Truth`.
        placement: the random numbers that near twins share.
        rng: the random number generator for the small differences between near twins.

    Returns:
        (left, top, right, bottom) of each object in pixels; right and bottom are exclusive.
    """
    numbers, n = placement.numbers, len(sizes)
    low, high = OBJECT_SIZES[size or type]
    boxes: list[Box] = []
    for i, ((width, height), larger) in enumerate(zip(sizes, scales, strict=True)):
        scale = (low + (high - low) * larger) * (1 + rng.uniform(-JITTER, JITTER) / 100) / max(width, height)
        extent = np.maximum(1, np.rint(np.array([width, height]) * scale)).astype(int)
        if relation:
            axis = 0 if relation == "left" else 1
            edges = np.linspace(MARGIN, IMAGE_SIZE - MARGIN, n + 1)
            edges[1:-1] += 8 * (numbers[3] - 0.5) if n == 2 else 0
            start, end = edges[i] + 2 * (i > 0), edges[i + 1] - 2 * (i < n - 1)
            corner = np.zeros(2)
            corner[axis] = start + (end - start - extent[axis]) * numbers[i]
            middle = IMAGE_SIZE / 2 + 80 * (numbers[4] - 0.5) + 24 * (numbers[5 + i] - 0.5)
            corner[1 - axis] = middle - extent[1 - axis] / 2
            limits = np.array([[MARGIN, IMAGE_SIZE - MARGIN]] * 2, dtype=float)
            limits[axis] = start, end
        else:
            limits = np.array([[MARGIN, IMAGE_SIZE - MARGIN]] * 2, dtype=float)
            if type == "count":
                corner = np.array(placement.centers[i]) - extent / 2
            else:
                corner = MARGIN + (IMAGE_SIZE - 2 * MARGIN - extent) * np.array(numbers[:2])
        corner += rng.uniform(-JITTER, JITTER, 2)
        corner = np.clip(corner, np.ceil(limits[:, 0]), np.floor(limits[:, 1]) - extent)
        left, top = (int(value) for value in np.rint(corner))
        boxes.append((left, top, left + int(extent[0]), top + int(extent[1])))
    return boxes


# -- drawing -------------------------------------------------------------------------------------------------------

GRID_Y, GRID_X = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE].astype(np.float32)


def draw_background(color: str, texture: str, rng: np.random.Generator) -> np.ndarray:
    """Return a background in shades of one color.

    Args:
        color: a key of :data:`~blip2.data.scene_kinds.COLORS`.
        texture: ``plain`` or one of :data:`TEXTURES`.

    Returns:
        RGB pixels of dtype uint8 and shape [H, W, 3], where H = W = :data:`IMAGE_SIZE`.
    """
    middle = np.array(COLORS[color], dtype=np.float32)
    shade = middle * rng.uniform(0.95, 1.04) + rng.uniform(-7, 7, 3) * (color not in ("gray", "white"))
    if texture == "plain":
        return np.broadcast_to(np.clip(shade, 0, 255), (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8)
    contrast = TEXTURE_CONTRAST.get(color, 0.13)
    pattern = (_pattern(texture, rng) * 2 - 1)[..., None]
    return np.clip(shade * (1 + contrast * rng.uniform(0.7, 1.0) * pattern), 0, 255).astype(np.uint8)


def _pattern(texture: str, rng: np.random.Generator) -> np.ndarray:
    """Return a texture of shape [H, W] with values in [0, 1]."""
    period, angle = rng.uniform(14, 34), rng.uniform(0, np.pi)
    x_at, y_at = rng.uniform(0, period, 2)
    x, y = GRID_X + x_at, GRID_Y + y_at
    if texture == "stripes":
        return np.clip(0.5 + 2 * np.sin((x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period)), 0, 1)
    if texture == "checks":
        return ((x // period + y // period) % 2).astype(np.float32)
    if texture == "dots":
        distance = np.hypot(x % period - period / 2, y % period - period / 2)
        return np.clip(0.5 + (period * 0.3 - distance) / 2, 0, 1)
    cells = int(rng.integers(6, 16))
    small = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    return np.asarray(small.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC), dtype=np.float32) / 255


def draw_scene(
    background: np.ndarray, cutouts: Sequence[Image.Image], flips: Sequence[bool], boxes: Sequence[Box]
) -> Image.Image:
    """Draw cut-outs on a background, with soft dark rims that make them visible on any color.

    Args:
        background: RGB pixels of dtype uint8 and shape [H, W, 3].
        cutouts: images in mode RGBA.
        flips: whether each cut-out is mirrored horizontally.
        boxes: (left, top, right, bottom) of each cut-out in pixels.
    """
    image = Image.fromarray(background)
    rim = Image.new("L", image.size)
    objects = []
    for cutout, flip, (left, top, right, bottom) in zip(cutouts, flips, boxes, strict=True):
        cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else cutout
        cutout = cutout.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        rim.paste(255, (left, top), cutout.getchannel("A"))
        objects.append((cutout, (left, top)))
    rim = rim.filter(ImageFilter.GaussianBlur(2)).point([value * 3 // 5 for value in range(256)])
    image.paste((30, 30, 30), (0, 0), rim)
    for cutout, corner in objects:
        image.paste(cutout, corner, cutout)
    return image


def encode_jpeg(image: Image.Image) -> bytes:
    """Encode an image as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()

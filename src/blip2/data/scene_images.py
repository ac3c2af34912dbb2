"""Draws scenes: cut-outs at places of their own on a background of one color."""

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

SIDE = 224
"""Height and width of a scene in pixels."""
MARGIN = 6
"""So many pixels at the border stay empty."""
QUALITY = 92
"""Quality of the JPEG files."""
DEPTHS = {"white": 0.05, "yellow": 0.06}
"""How much darker and lighter a texture becomes, where it is less than of other colors: a dark yellow is orange."""
TEXTURES = ("stripes", "checks", "dots", "noise")
OPAQUE = 24
"""A pixel belongs to an object from this alpha on."""
LONGEST = {
    "pair": (68.0, 90.0),
    "count": (60.0, 72.0),
    "triple": (54.0, 63.0),
    "small": (50.0, 60.0),
    "large": (98.0, 112.0),
}
"""Range of the longer side of an object, by the type of the scene or by the size that is named."""
LARGEST = 168
"""Cut-outs are kept no larger than this."""
JITTER = 2.0
"""Near twins differ by so many pixels in place, and by as many percent in scale."""

CUTOUTS = "cutouts"
"""Folder within a package's folder that holds objects without their background, a folder for each kind."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Cutout:
    """An object without its background."""

    name: str
    """``KIND/FILE`` below the folder of cut-outs, without the suffix."""
    image: Image.Image
    """RGBA, trimmed to what is to be seen."""


def trim(image: Image.Image) -> Image.Image:
    """The part of an image with alpha that is to be seen.

    Raises:
        ImageError: nothing is to be seen, or nothing is cut out.
    """
    image = image.convert("RGBA")
    alpha = image.getchannel("A").point([255 * (value >= OPAQUE) for value in range(256)])
    box = alpha.getbbox()
    if box is None or alpha.getextrema()[0]:
        raise ImageError("it has no transparent background" if box else "nothing of it is to be seen")
    return image.crop(box)


def save_cutouts(source: Path, kinds: Mapping[str, Sequence[str]], folder: Path, draw: Callable[[Path], bytes]) -> None:
    """Collect the objects that scenes are made of, as ``cutouts/KIND/NUMBER-NAME.png``, with the folder's license.

    Args:
        kinds: files of each kind below ``source``, without suffix; what is missing or cannot be used is left out.
        draw: makes a PNG file of an SVG file.
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
            shutil.copyfile(license, folder / CUTOUTS / "LICENCE")


def read_cutouts(folder: Path, wanted: Collection[str] | None = None) -> dict[str, tuple[Cutout, ...]]:
    """The cut-outs of each kind: the PNG files of a folder's folders, which are named after the kinds, both sorted.

    Args:
        wanted: kinds to read; None: all.

    Raises:
        InputError: there are none, a folder is not named as a kind may be, or a file cannot be read or has no
            transparent background.
    """
    kinds: dict[str, tuple[Cutout, ...]] = {}
    missing = sorted(kind for kind in wanted or () if not (folder / kind).is_dir())
    if missing:
        raise InputError(f"{folder} has no cut-outs of {', '.join(missing)}: name kinds that have a folder there")
    for path in sorted(folder.glob("*/*.png")):
        if wanted is not None and path.parent.name not in wanted:
            continue
        if not re.fullmatch("[a-z]{2,}", path.parent.name):
            raise InputError(f"{path.parent} is no name of a kind: expected one noun in lower-case letters, rename it")
        try:
            with open_image(read_bytes(path), "it") as opened:
                image = trim(opened)
        except ImageError as error:
            raise InputError(f"cut-out {path} cannot be used ({error}): replace or remove it") from error
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        kinds[path.parent.name] = (*kinds.get(path.parent.name, ()), Cutout(f"{path.parent.name}/{path.stem}", image))
    if not kinds:
        raise InputError(f"{folder} holds no cut-outs: each kind needs a folder of PNG files with alpha")
    return kinds


# -- places --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Places as near twins share them: numbers between 0 and 1 from which they follow."""

    numbers: tuple[float, ...]
    centers: tuple[tuple[float, float], ...]
    """Middles of three objects of one kind, which are far enough from each other."""

    @staticmethod
    def draw(rng: np.random.Generator) -> Layout:
        apart = LONGEST["count"][1] * (1 + JITTER / 100) + 2 * JITTER + 2
        low, high = MARGIN + apart / 2, SIDE - MARGIN - apart / 2
        while True:
            centers = rng.uniform(low, high, (3, 2))
            distances = [np.abs(centers[i] - centers[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))]
            if min(distances) >= apart:
                return Layout(tuple(rng.random(8).tolist()), tuple((float(x), float(y)) for x, y in centers))


def place(
    sizes: Sequence[tuple[int, int]],
    scales: Sequence[float],
    type: str,
    relation: str,
    size: str,
    layout: Layout,
    rng: np.random.Generator,
) -> list[Box]:
    """The box of each object, in their order from left to right or from top to bottom.

    Args:
        sizes: width and height of each cut-out.
        scales: how large each object is for its type, between 0 and 1.
        type, relation, size: of the scene, as its truth names them.
        rng: by which near twins differ a little.
    """
    numbers, n = layout.numbers, len(sizes)
    low, high = LONGEST[size or type]
    boxes: list[Box] = []
    for i, ((width, height), larger) in enumerate(zip(sizes, scales, strict=True)):
        scale = (low + (high - low) * larger) * (1 + rng.uniform(-JITTER, JITTER) / 100) / max(width, height)
        extent = np.maximum(1, np.rint(np.array([width, height]) * scale)).astype(int)
        if relation:
            axis = 0 if relation == "left" else 1
            edges = np.linspace(MARGIN, SIDE - MARGIN, n + 1)
            edges[1:-1] += 8 * (numbers[3] - 0.5) if n == 2 else 0
            start, end = edges[i] + 2 * (i > 0), edges[i + 1] - 2 * (i < n - 1)
            corner = np.zeros(2)
            corner[axis] = start + (end - start - extent[axis]) * numbers[i]
            middle = SIDE / 2 + 80 * (numbers[4] - 0.5) + 24 * (numbers[5 + i] - 0.5)
            corner[1 - axis] = middle - extent[1 - axis] / 2
            limits = np.array([[MARGIN, SIDE - MARGIN]] * 2, dtype=float)
            limits[axis] = start, end
        else:
            limits = np.array([[MARGIN, SIDE - MARGIN]] * 2, dtype=float)
            if type == "count":
                corner = np.array(layout.centers[i]) - extent / 2
            else:
                corner = MARGIN + (SIDE - 2 * MARGIN - extent) * np.array(numbers[:2])
        corner += rng.uniform(-JITTER, JITTER, 2)
        corner = np.clip(corner, np.ceil(limits[:, 0]), np.floor(limits[:, 1]) - extent)
        left, top = (int(value) for value in np.rint(corner))
        boxes.append((left, top, left + int(extent[0]), top + int(extent[1])))
    return boxes


# -- drawing -------------------------------------------------------------------------------------------------------

GRID_Y, GRID_X = np.mgrid[:SIDE, :SIDE].astype(np.float32)


def draw_background(color: str, texture: str, rng: np.random.Generator) -> np.ndarray:
    """Pixels [side, side, 3] in shades of one color."""
    middle = np.array(COLORS[color], dtype=np.float32)
    shade = middle * rng.uniform(0.95, 1.04) + rng.uniform(-7, 7, 3) * (color not in ("gray", "white"))
    if texture == "plain":
        return np.broadcast_to(np.clip(shade, 0, 255), (SIDE, SIDE, 3)).astype(np.uint8)
    depth = DEPTHS.get(color, 0.13)
    pattern = (_pattern(texture, rng) * 2 - 1)[..., None]
    return np.clip(shade * (1 + depth * rng.uniform(0.7, 1.0) * pattern), 0, 255).astype(np.uint8)


def _pattern(texture: str, rng: np.random.Generator) -> np.ndarray:
    """Numbers [side, side] between 0 and 1."""
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
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32) / 255


def draw_scene(
    background: np.ndarray, cutouts: Sequence[Image.Image], flips: Sequence[bool], boxes: Sequence[Box]
) -> Image.Image:
    """Cut-outs on a background, each with a soft dark rim, so that it is seen whatever the color behind it."""
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


def encode(image: Image.Image) -> bytes:
    """The image as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()

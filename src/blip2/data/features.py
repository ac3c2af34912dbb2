"""A cache of frozen features: the image encoder runs once over a data set, training then reads its output.

The frozen encoder gives the same features for the same pixels at every epoch. With a few augmented views of each image
made beforehand, training costs only the Q-Former. Features are kept in bfloat16, memory-mapped, in a folder named by
a digest of everything they depend on: the encoder's weights, preprocessing, augmentation and the images themselves.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from blip2.data.images import ImageError, augment_to_pixels, read_image, to_pixels
from blip2.data.records import Record, Records
from blip2.errors import InputError
from blip2.model.vision import ImageEncoder


class FeatureCache:
    """Features on disk: view 0 of each image is the whole image, the others are augmented.

    Args:
        folder: made by :func:`cache_features`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.shape: tuple[int, int, int, int] = tuple(about["shape"])
        """(images, views, P, E)"""
        self.broken: dict[int, str] = {int(index): why for index, why in about["broken"].items()}
        """Images that could not be decoded, and why."""
        # bfloat16 has no numpy type: its bits are kept as int16.
        self._bits = np.memmap(folder / "features.bin", dtype=np.int16, mode="r", shape=self.shape)

    def __reduce__(self) -> tuple[type[FeatureCache], tuple[Path]]:
        return FeatureCache, (self.folder,)  # worker processes map the file, they do not get a copy of it

    def read(self, index: int, random: np.random.Generator | None) -> Float[Tensor, "P E"]:
        """Features of an image, in bfloat16: of a view drawn with `random`, or of the whole image when None.

        Raises:
            ImageError: the image could not be decoded when the cache was made.
        """
        if index in self.broken:
            raise ImageError(self.broken[index])
        view = 0 if random is None else int(random.integers(self.shape[1]))
        return torch.from_numpy(self._bits[index, view].copy()).view(torch.bfloat16)


@torch.no_grad()
def cache_features(
    root: Path,
    records: Records,
    encoder: ImageEncoder,
    views: int,
    smallest_crop: float,
    flip: bool,
    device: torch.device,
    report: Callable[[int, int], None] = lambda done, total: None,
    batch_size: int = 32,
) -> FeatureCache:
    """Make, or find, the features of all images under `root`.

    Args:
        views: how many features to keep of each image: one of the whole image, the others augmented.
        report: called with (images done, images in all).

    Raises:
        InputError: the disk has too little room.
    """
    shape = (len(records), views, encoder.tokens, encoder.width)
    # The shape tells the layers of a network apart, whose weights are the same.
    settings = {"shape": shape, "smallest_crop": smallest_crop, "flip": flip, **vars(encoder.preprocessing)}
    folder = root / _digest(encoder, settings, records)
    if (folder / "about.json").is_file():
        return FeatureCache(folder)

    root.mkdir(parents=True, exist_ok=True)
    needed, free = int(np.prod(shape)) * 2, shutil.disk_usage(root).free
    if needed > free:
        raise InputError(
            f"the features take {needed / 1e9:.1f} GB, but {root} has {free / 1e9:.1f} GB free: lower"
            " data.cached_views, set it to 0, or make room"
        )
    building = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    building.mkdir()
    try:
        bits = np.memmap(building / "features.bin", dtype=np.int16, mode="w+", shape=shape)
        broken: dict[int, str] = {}
        for start in range(0, len(records), batch_size):
            pixels, places = [], []
            for i in range(start, min(start + batch_size, len(records))):
                try:
                    image = read_image(_image_of(records[i]))
                except ImageError as error:
                    broken[i] = str(error)
                    continue
                pixels.append(to_pixels(image, encoder.preprocessing))
                places.append((i, 0))
                for view in range(1, views):
                    random = np.random.default_rng([view, i])
                    pixels.append(augment_to_pixels(image, encoder.preprocessing, random, smallest_crop, flip))
                    places.append((i, view))
            for at in range(0, len(pixels), batch_size):
                part = slice(at, at + batch_size)
                features = encoder.features(torch.stack(pixels[part]).to(device))
                for place, row in zip(places[part], features.bfloat16().cpu().view(torch.int16).numpy(), strict=True):
                    bits[place] = row
            report(min(start + batch_size, len(records)), len(records))
        bits.flush()
        about = {"broken": broken, **settings}
        (building / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        try:
            building.rename(folder)
        except OSError:
            if not (folder / "about.json").is_file():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return FeatureCache(folder)


def _image_of(record: Record) -> str | bytes:
    if record.image is None:
        raise ImageError("it has no image")
    return record.image


def _digest(encoder: ImageEncoder, settings: dict[str, object], records: Records) -> str:
    """Of everything that the features depend on."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    for i in range(len(records)):
        try:
            image = records[i].image
            data = image if isinstance(image, bytes) else Path(image or "").read_bytes()
        except OSError:
            data = b""
        digest.update(hashlib.blake2b(data, digest_size=16).digest())
    return digest.hexdigest()

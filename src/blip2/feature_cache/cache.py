"""Frozen features, cached: the image encoder runs once over a data set, training and evaluation then read its output.

The frozen encoder gives the same features for the same pixels at every epoch. With a few augmented views of each image
made beforehand, training costs only the Q-Former. Features are found again by digests of everything they depend on:
one of the encoder's weights, preprocessing, augmentation and how features are kept names the store
(:mod:`blip2.feature_cache.store`), one of an image's bytes names its row. So data sets that share images share
features, and only what is new is encoded.

Legend: N images, V views, P image tokens, E width of the image encoder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import BFloat16, Float
from torch import Tensor
from torch.utils.data import Dataset

from blip2.backbones.vision import ImageEncoder, Preprocessing
from blip2.data.images import ImageError, augment_to_pixels, read_bytes, read_image, to_pixels
from blip2.data.records import Records
from blip2.data.workers import load
from blip2.distributed import gather_objects, process_count, process_index
from blip2.errors import InputError
from blip2.feature_cache.digests import add_weights, identify
from blip2.feature_cache.store import About, Index, Layout, Part, Rows, StoredDtype, digest, find, read_index

UNIMPORTANT = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
"""What a configuration says that changes no feature."""
MEASURED = 8
"""The error is measured over so many batches of each process."""


@dataclass(frozen=True)
class Augmentation:
    """How the views of an image are made: the first is the whole image, the others are augmented (§3.4).

    A view is a function of its number and of the image's bytes, so it is the same in every data set.
    """

    views: int
    smallest_crop: float
    flip: bool

    def pixels(self, data: bytes, image: str, preprocessing: Preprocessing) -> Float[Tensor, "V 3 H W"]:
        """All views of an encoded image.

        Raises:
            ImageError: it cannot be decoded.
        """
        picture = read_image(data, name="it")
        views = [to_pixels(picture, preprocessing)]
        for view in range(1, self.views):
            random = np.random.default_rng([view, int(image, 16)])
            views.append(augment_to_pixels(picture, preprocessing, random, self.smallest_crop, self.flip))
        return torch.stack(views)


class CachedFeatures:
    """The features of a data set's images, by the index of the record. Made by :func:`cache_features`.

    Args:
        places: (part, row) in the store for each record; whatever for those in `broken`.
    """

    def __init__(
        self, rows: Rows, places: np.ndarray, broken: Mapping[int, str], encoded: int, error: float | None
    ) -> None:
        self._rows, self._places = rows, places
        self.folder, self.layout = rows.folder, rows.layout
        self.broken = dict(broken)
        """Why images cannot be used, by the index of their record."""
        self.encoded = encoded
        """How many images were encoded when this was made; the others were there already."""
        self.error = error
        """Root mean square of what is lost by keeping features in fewer bits, as a share of theirs."""

    def __len__(self) -> int:
        return len(self._places)

    @property
    def images(self) -> int:
        """How many different images there are, without the broken ones."""
        good = np.delete(self._places, list(self.broken), axis=0)
        return len(np.unique(good, axis=0))

    @property
    def bytes(self) -> int:
        """What the features of these images take on the disk."""
        return self.images * self.layout.row.itemsize

    def read(self, index: int, random: np.random.Generator | None) -> BFloat16[Tensor, "P E"]:
        """Features of a record's image: of a view drawn with `random`, or of the whole image when None.

        Raises:
            ImageError: the image cannot be used.
        """
        if index in self.broken:
            raise ImageError(self.broken[index])
        view = 0 if random is None else int(random.integers(self.layout.views))
        part, row = self._places[index]
        return self._rows.read(int(part), int(row), view)

    def read_all(self) -> Float[Tensor, "I P E"]:
        """Features of all whole images, in float32, for evaluation.

        Raises:
            ImageError: one of the images cannot be used.
        """
        return torch.stack([self.read(i, None) for i in range(len(self))]).float()


@torch.no_grad()
def cache_features(
    root: Path,
    records: Records,
    encoder: ImageEncoder,
    augmentation: Augmentation,
    dtype: StoredDtype,
    device: torch.device,
    workers: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
    batch_size: int = 32,
) -> CachedFeatures:
    """Find the features of all images under `root`, and make those that are missing.

    Where there are several processes, all of them call this, and each encodes its share. It can be killed at any moment
    and called again: what was done stays.

    Args:
        root: where stores lie; one folder for all data sets, encoders and settings.
        workers: processes that decode images beside this one.
        report: called with (images encoded, images to encode) of all processes, if there is anything to encode.
        batch_size: views that are encoded at once.

    Raises:
        InputError: `root` is no folder, the disk has too little room, or processes on several machines do not share
            `root`.
        OSError: the disk is full nevertheless. What was done stays.
    """
    layout = Layout(augmentation.views, encoder.tokens, encoder.width, dtype)
    settings = _settings(encoder, augmentation, layout)
    folder = root / f"{dtype}-{augmentation.views}-{digest(json.dumps(settings, sort_keys=True).encode())}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{root} cannot hold features ({error.strerror}): set data.features to a folder") from error
    about = About(folder, settings)
    index = read_index(folder, layout)
    broken: dict[str, str] = {}
    with contextlib.closing(Part(folder, layout)) as part:
        images, unusable = identify(records, index, part)
        missing = _missing(images, index)
        # Another run may have added something between two looks, but all processes have to do the same here.
        is_new = any(gather_objects(bool(missing)))
        if is_new:
            _check_room(root, len(missing) * layout.row.itemsize)

            def encode(pixels: Float[Tensor, "N V 3 H W"]) -> Float[Tensor, "N V P E"]:
                parts = pixels.flatten(0, 1).split(batch_size)
                features = torch.cat([encoder.features(part.to(device)) for part in parts])
                return features.unflatten(0, (-1, layout.views))

            decoding = _Decoding(records, images, augmentation, encoder.preprocessing)
            images_at_once = max(1, batch_size // layout.views)
            broken = _fill(part, about, missing, decoding, encode, images_at_once, workers, report)
    if is_new:
        for lost in gather_objects(broken):  # what the others wrote is on the disk when they come here
            broken = broken | lost
        index = read_index(folder, layout)

    at = find(index.images, images)
    broken = index.broken | broken
    for i in np.flatnonzero(at < 0).tolist():
        if image := images[i].decode():
            if image not in broken:
                raise InputError(
                    f"the features of {records[i].key} were made by another process but are not in {folder}: set"
                    " data.features to a folder that all machines share"
                )
            unusable[i] = broken[image]
    encoded = int((at[missing] >= 0).sum())
    places = index.places[at] if len(index.images) else np.zeros((len(records), 2), np.int64)
    return CachedFeatures(Rows(folder, layout, index.parts), places, unusable, encoded, about.error)


def _settings(encoder: ImageEncoder, augmentation: Augmentation, layout: Layout) -> dict[str, Any]:
    """All that features depend on beside the image."""
    weights = hashlib.blake2b(digest_size=16)
    # A pooler comes behind the features; where a checkpoint has none it is random.
    state = encoder.state_dict().items()
    add_weights(weights, ((name, tensor) for name, tensor in state if "pooler" not in name.split(".")))
    # Two encoders of the same weights may differ in activation, epsilon or layer.
    config = getattr(encoder.network, "config", None)
    known = {} if config is None else {key: v for key, v in config.to_dict().items() if key not in UNIMPORTANT}
    weights.update(json.dumps([encoder.layer, known], sort_keys=True, default=str).encode())
    settings = {"format": 1, "encoder": weights.hexdigest(), **asdict(layout), **asdict(encoder.preprocessing)}
    if not encoder.preprocessing.bgr:
        settings.pop("bgr")  # as in features that were made before there was such a thing
    if augmentation.views > 1:
        settings |= {"min_crop_scale": augmentation.smallest_crop, "flip": augmentation.flip}
    return settings


# -- what is missing -----------------------------------------------------------------------------------------------


def _missing(images: np.ndarray, index: Index) -> list[int]:
    """For each image that is not in the store the first record that has it, in the order of the records."""
    firsts = np.sort(np.unique(images, return_index=True)[1])
    firsts = firsts[find(index.images, images[firsts]) < 0]
    names = np.char.decode(images[firsts], "ascii").tolist()
    return [i for i, name in zip(firsts.tolist(), names, strict=True) if name and name not in index.broken]


def _check_room(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if any(gather_objects(needed > free)):
        raise InputError(
            f"the features that are missing take {needed / 1e9:.1f} GB, but {root} has {free / 1e9:.1f} GB free: lower"
            " data.cached_views, set data.cached_dtype to int8, name another disk with data.features, or make room"
        )


# -- encoding ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decoded:
    """Some images ready for the encoder."""

    images: list[str] = field(default_factory=list)
    """Digests."""
    pixels: Tensor | None = None
    """[N, V, 3, H, W]; None without images."""
    broken: dict[str, str] = field(default_factory=dict)
    """Why images cannot be decoded, by digest."""
    lost: dict[str, str] = field(default_factory=dict)
    """Why their files cannot be read, or are not what they were: only this time."""

    @property
    def count(self) -> int:
        return len(self.images) + len(self.broken) + len(self.lost)


class _Decoding(Dataset[_Decoded]):
    """Reads the images of some records, in worker processes."""

    def __init__(
        self, records: Records, images: np.ndarray, augmentation: Augmentation, preprocessing: Preprocessing
    ) -> None:
        self.records, self.images = records, images
        self.augmentation, self.preprocessing = augmentation, preprocessing

    def __getitem__(self, indices: list[int]) -> _Decoded:
        images, pixels = [], []
        broken, lost = {}, {}
        for i in indices:
            name, image = self.images[i].decode(), self.records[i].image
            assert image is not None
            try:
                data = image if isinstance(image, bytes) else read_bytes(image)
            except ImageError as error:
                lost[name] = str(error)
                continue
            if digest(data) != name:
                lost[name] = f"image {image} changed while features were made: run this again"
                continue
            try:
                pixels.append(self.augmentation.pixels(data, name, self.preprocessing))
                images.append(name)
            except ImageError as error:
                broken[name] = str(error)
        return _Decoded(images, torch.stack(pixels) if pixels else None, broken, lost)


def _fill(
    part: Part,
    about: About,
    missing: list[int],
    decoding: _Decoding,
    encode: Callable[[Float[Tensor, "N V 3 H W"]], Float[Tensor, "N V P E"]],
    images_at_once: int,
    workers: int,
    report: Callable[[int, int], None],
) -> dict[str, str]:
    """Encode this process's share of what is missing; returns why some of its images could not be read.

    Processes go on in step, batch by batch, so that none waits for long: collective operations have time limits. While
    a batch is encoded the next ones are decoded, and the one before is written.
    """
    # By digest, not by place: another run may have added something between two processes' looks at the store.
    share = [i for i in missing if int(decoding.images[i][:8], 16) % process_count() == process_index()]
    chunks = [share[start : start + images_at_once] for start in range(0, len(share), images_at_once)]
    loaded = load(iter(chunks), decoding, workers)
    lost: dict[str, str] = {}
    done = 0
    report(0, len(missing))
    with ThreadPoolExecutor(1) as disk:
        writing: Future[Any] = disk.submit(int)
        for number in range(max(gather_objects(len(chunks)))):
            decoded = next(loaded, _Decoded())
            fields, squares = {}, (0.0, 0.0)
            if decoded.pixels is not None:
                features = encode(decoded.pixels)
                fields = part.layout.pack(features)
                if number < MEASURED:
                    difference = part.layout.unpack(fields).float() - features
                    squares = (float(difference.square().sum()), float(features.square().sum()))
            lost |= decoded.lost
            counts, lost_squares, all_squares = zip(*gather_objects((decoded.count, *squares)), strict=True)
            about.measured(sum(lost_squares), sum(all_squares))
            writing.result()
            writing = disk.submit(part.add_images, decoded.images, fields, decoded.broken)
            if done:
                report(done, len(missing))
            done += sum(counts)
        writing.result()
    report(done, len(missing))
    return lost

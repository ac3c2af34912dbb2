"""The feature cache: the frozen image encoder runs once per image, and training and evaluation read its output.

A frozen encoder computes the same features for the same pixels in every epoch. With a few augmented views of each image
computed in advance, a training step only runs the Q-Former. A digest of the weights of the encoder, the preprocessing,
the augmentation and the row format is the name of a store (:mod:`blip2.feature_cache.store`), and a digest of the bytes
of an image identifies its row there. Data sets that share images therefore share features, and only new images are
encoded.

Legend: N images, I records, V views, H and W image size, P image tokens, E width of the image encoder.
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
from blip2.data.images import ImageError, preprocess, read_bytes, read_image, train_transform
from blip2.data.records import Records
from blip2.data.workers import prefetch
from blip2.distributed import all_gather_objects, rank, world_size
from blip2.errors import InputError
from blip2.feature_cache.digests import digest_images, hash_weights
from blip2.feature_cache.store import (
    RowFormat,
    StoredDtype,
    StoreIndex,
    StoreMetadata,
    StoreReader,
    StoreWriter,
    digest,
    lookup,
    read_index,
)

IGNORED_CONFIG_KEYS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
"""Keys of a model configuration that do not affect features."""
ERROR_BATCHES = 8
"""Number of batches per process over which the quantization error is measured."""


@dataclass(frozen=True)
class Augmentation:
    """The views of an image: the first is the whole image, the others are augmented (§3.4).

    A view depends only on its number and the bytes of the image, so that it is the same in every data set.
    """

    num_views: int
    """Number of views per image, at least 1."""
    min_crop_scale: float
    """Minimum area of a random crop as a fraction of the image."""
    horizontal_flip: bool
    """Whether half of the augmented views are mirrored."""

    def make_views(self, data: bytes, image: str, preprocessing: Preprocessing) -> Float[Tensor, "V 3 H W"]:
        """Decode an image and return its views: first the whole image, then V - 1 views that are augmented at random.

        Args:
            data: the encoded image.
            image: the digest of `data` in hexadecimal. It seeds the augmentation, so that equal images have the same
                views.
            preprocessing: size and normalization of the views.

        Raises:
            ImageError: the image cannot be decoded.
        """
        decoded = read_image(data, name="it")
        views = [preprocess(decoded, preprocessing)]
        for view in range(1, self.num_views):
            rng = np.random.default_rng([view, int(image, 16)])
            views.append(train_transform(decoded, preprocessing, rng, self.min_crop_scale, self.horizontal_flip))
        return torch.stack(views)


class CachedFeatures:
    """The features of the images of a data set, by the index of the record. :func:`cache_features` creates it.

    Args:
        reader: reads rows of the store.
        locations: [I, 2]: (part, row) in the store for each record; arbitrary for records in `errors`.
        errors: messages about images that cannot be used, by the index of the record.
        num_encoded: number of images that were encoded by this call; the features of other images were in the store.
        rms_error: the relative error of the stored features, see :attr:`rms_error`.
    """

    def __init__(
        self,
        reader: StoreReader,
        locations: np.ndarray,
        errors: Mapping[int, str],
        num_encoded: int,
        rms_error: float | None,
    ) -> None:
        self._reader, self._locations = reader, locations
        self.folder, self.row_format = reader.folder, reader.row_format
        self.errors = dict(errors)
        """Messages about images that cannot be used, by the index of the record."""
        self.num_encoded = num_encoded
        """Number of images that were encoded now; the features of other images were in the store."""
        self.rms_error = rms_error
        """Root mean square error of the stored features, divided by the root mean square of the features. ``None``: the
        store has no features."""

    def __len__(self) -> int:
        return len(self._locations)

    @property
    def num_images(self) -> int:
        """Number of different images that can be used."""
        usable = np.delete(self._locations, list(self.errors), axis=0)
        return len(np.unique(usable, axis=0))

    @property
    def num_bytes(self) -> int:
        """Size of the features of the different images that can be used, on the disk, in bytes."""
        return self.num_images * self.row_format.numpy_dtype.itemsize

    def read(self, index: int, rng: np.random.Generator | None) -> BFloat16[Tensor, "P E"]:
        """Return the features of one view of the image of a record.

        Args:
            index: the index of the record.
            rng: draws the view. ``None``: the whole image.

        Raises:
            ImageError: the image cannot be used.
        """
        if index in self.errors:
            raise ImageError(self.errors[index])
        view = 0 if rng is None else int(rng.integers(self.row_format.num_views))
        part, row = self._locations[index]
        return self._reader.read(int(part), int(row), view)

    def read_all(self) -> Float[Tensor, "I P E"]:
        """Return the features of the whole image of every record in float32, for evaluation.

        Raises:
            ImageError: an image cannot be used.
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
    num_workers: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
    batch_size: int = 32,
) -> CachedFeatures:
    """Find the features of all images under `root`, and compute the features that are missing.

    All processes of a run must call it, and each encodes its share. If the processes are killed, the features that were
    written are found by the next call.

    Args:
        root: folder of all stores, shared by data sets, encoders and settings.
        records: the data set.
        encoder: the frozen image encoder.
        augmentation: the views of each image.
        dtype: data type of the stored features.
        device: device of the encoder.
        num_workers: number of worker processes that decode images.
        report: called with (images encoded, images to encode) over all processes, if any image must be encoded.
        batch_size: number of views per forward pass of the encoder.

    Raises:
        InputError: `root` cannot be created, the disk has too little space, or processes on several machines do not
            share `root`.
        OSError: features cannot be written, for example because the disk is full. Finished features are kept.
    """
    row_format = RowFormat(augmentation.num_views, encoder.num_tokens, encoder.hidden_size, dtype)
    settings = _settings(encoder, augmentation, row_format)
    folder = root / f"{dtype}-{augmentation.num_views}-{digest(json.dumps(settings, sort_keys=True).encode())}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot create a folder for features in {root} ({error.strerror}): set data.features to another folder"
        ) from error
    metadata = StoreMetadata(folder, settings)
    index = read_index(folder, row_format)
    lost: dict[str, str] = {}
    with contextlib.closing(StoreWriter(folder, row_format)) as writer:
        images, errors = digest_images(records, index, writer)
        missing = _missing(images, index)
        # Another run may have written features in between, but all processes must take the same branch here.
        has_new = any(all_gather_objects(bool(missing)))
        if has_new:
            _check_disk_space(root, len(missing) * row_format.numpy_dtype.itemsize)

            def encode(pixels: Float[Tensor, "N V 3 H W"]) -> Float[Tensor, "N V P E"]:
                batches = pixels.flatten(0, 1).split(batch_size)
                features = torch.cat([encoder.encode(batch.to(device)) for batch in batches])
                return features.unflatten(0, (-1, row_format.num_views))

            dataset = _ImageDataset(records, images, augmentation, encoder.preprocessing)
            images_per_batch = max(1, batch_size // row_format.num_views)
            lost = _fill(writer, metadata, missing, dataset, encode, images_per_batch, num_workers, report)
    if has_new:
        for others in all_gather_objects(lost):  # also a barrier: the features of the other processes are on the disk
            lost = lost | others
        index = read_index(folder, row_format)

    found = lookup(index.images, images)
    image_errors = index.errors | lost
    for i in np.flatnonzero(found < 0).tolist():
        if image := images[i].decode():
            if image not in image_errors:
                raise InputError(
                    f"the features of {records[i].key} were computed by another process, but are not in {folder}: set"
                    " data.features to a folder that all machines share"
                )
            errors[i] = image_errors[image]
    num_encoded = int((found[missing] >= 0).sum())
    locations = index.locations[found] if len(index.images) else np.zeros((len(records), 2), np.int64)
    reader = StoreReader(folder, row_format, index.parts)
    return CachedFeatures(reader, locations, errors, num_encoded, metadata.rms_error)


def _settings(encoder: ImageEncoder, augmentation: Augmentation, row_format: RowFormat) -> dict[str, Any]:
    """Return everything that features depend on, except the image. Keys must not change: the digest names the store."""
    weights = hashlib.blake2b(digest_size=16)
    # A pooler does not affect the features, and has random weights if the checkpoint has no pooler.
    state = encoder.state_dict().items()
    hash_weights(weights, ((name, tensor) for name, tensor in state if "pooler" not in name.split(".")))
    # Two encoders with the same weights may differ in activation, epsilon or output layer.
    config = getattr(encoder.network, "config", None)
    known = {} if config is None else {key: v for key, v in config.to_dict().items() if key not in IGNORED_CONFIG_KEYS}
    weights.update(json.dumps([encoder.layer, known], sort_keys=True, default=str).encode())
    settings = {
        "format": 1,
        "encoder": weights.hexdigest(),
        "views": row_format.num_views,
        "tokens": row_format.num_tokens,
        "width": row_format.hidden_size,
        "dtype": row_format.dtype,
        **asdict(encoder.preprocessing),
    }
    if not encoder.preprocessing.bgr:
        settings.pop("bgr")  # stores that are older than this option do not have the key
    if augmentation.num_views > 1:
        settings |= {"min_crop_scale": augmentation.min_crop_scale, "flip": augmentation.horizontal_flip}
    return settings


def _missing(images: np.ndarray, index: StoreIndex) -> list[int]:
    """Return the first record of each image that is not in the store, in the order of the records."""
    firsts = np.sort(np.unique(images, return_index=True)[1])
    firsts = firsts[lookup(index.images, images[firsts]) < 0]
    names = np.char.decode(images[firsts], "ascii").tolist()
    return [i for i, name in zip(firsts.tolist(), names, strict=True) if name and name not in index.errors]


def _check_disk_space(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if any(all_gather_objects(needed > free)):
        raise InputError(
            f"the missing features take {needed / 1e9:.1f} GB, but {root} has {free / 1e9:.1f} GB free: lower"
            " data.cached_views, set data.cached_dtype to int8, set data.features to another disk, or free disk space"
        )


# -- encoding ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _DecodedBatch:
    """Decoded images for the encoder."""

    images: list[str] = field(default_factory=list)
    """Digests of the decoded images."""
    pixels: Tensor | None = None
    """[N, V, 3, H, W]; ``None`` if there are no decoded images."""
    errors: dict[str, str] = field(default_factory=dict)
    """Messages about images that cannot be decoded, by digest. The store keeps them."""
    lost: dict[str, str] = field(default_factory=dict)
    """Messages about images whose files cannot be read or have changed, by digest. The store does not keep them."""

    @property
    def count(self) -> int:
        return len(self.images) + len(self.errors) + len(self.lost)


class _ImageDataset(Dataset[_DecodedBatch]):
    """Reads and decodes the images of records, in worker processes."""

    def __init__(
        self, records: Records, images: np.ndarray, augmentation: Augmentation, preprocessing: Preprocessing
    ) -> None:
        self.records, self.images = records, images
        self.augmentation, self.preprocessing = augmentation, preprocessing

    def __getitem__(self, indices: list[int]) -> _DecodedBatch:
        images, pixels = [], []
        errors, lost = {}, {}
        for i in indices:
            name, image = self.images[i].decode(), self.records[i].image
            assert image is not None
            try:
                data = image if isinstance(image, bytes) else read_bytes(image)
            except ImageError as error:
                lost[name] = str(error)
                continue
            if digest(data) != name:
                lost[name] = f"image {image} changed while its features were computed: run the command again"
                continue
            try:
                pixels.append(self.augmentation.make_views(data, name, self.preprocessing))
                images.append(name)
            except ImageError as error:
                errors[name] = str(error)
        return _DecodedBatch(images, torch.stack(pixels) if pixels else None, errors, lost)


def _fill(
    writer: StoreWriter,
    metadata: StoreMetadata,
    missing: list[int],
    dataset: _ImageDataset,
    encode: Callable[[Float[Tensor, "N V 3 H W"]], Float[Tensor, "N V P E"]],
    images_per_batch: int,
    num_workers: int,
    report: Callable[[int, int], None],
) -> dict[str, str]:
    """Encode this process's share of the missing images.

    Processes advance together, batch by batch, because collective operations have time limits. While a batch is
    encoded, the next batches are decoded and the previous batch is written.

    Returns:
        Messages about images whose files could not be read or have changed, by digest.
    """
    # Shares depend on digests, not on positions: another run may have written between the reads of two processes.
    share = [i for i in missing if int(dataset.images[i][:8], 16) % world_size() == rank()]
    batches = [share[start : start + images_per_batch] for start in range(0, len(share), images_per_batch)]
    loaded = prefetch(iter(batches), dataset, num_workers)
    lost: dict[str, str] = {}
    done = 0
    report(0, len(missing))
    with ThreadPoolExecutor(1) as disk:
        writing: Future[Any] = disk.submit(int)
        for number in range(max(all_gather_objects(len(batches)))):
            decoded = next(loaded, _DecodedBatch())
            fields, squares = {}, (0.0, 0.0)
            if decoded.pixels is not None:
                features = encode(decoded.pixels)
                fields = writer.row_format.pack(features)
                if number < ERROR_BATCHES:
                    difference = writer.row_format.unpack(fields).float() - features
                    squares = (float(difference.square().sum()), float(features.square().sum()))
            lost |= decoded.lost
            counts, lost_squares, all_squares = zip(*all_gather_objects((decoded.count, *squares)), strict=True)
            metadata.add_squares(sum(lost_squares), sum(all_squares))
            writing.result()
            writing = disk.submit(writer.add_images, decoded.images, fields, decoded.errors)
            if done:
                report(done, len(missing))
            done += sum(counts)
        writing.result()
    report(done, len(missing))
    return lost

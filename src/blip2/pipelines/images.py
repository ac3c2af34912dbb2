"""Read any number of images for a pipeline, in bounded memory.

Worker threads decode images a few batches ahead of the model, so that images are decoded while the device computes, and
only the images and features of a few batches are in memory at a time.

Legend: I images, B batch, P image tokens, E width of the image encoder, H and W height and width in pixels.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from io import IOBase
from itertools import chain, islice
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from blip2.console import Display
from blip2.data.arrays import stack_inputs
from blip2.data.images import ImageError, ImageLike
from blip2.errors import InputError

Images = ImageLike | Iterable[ImageLike | Mapping[str, Any]] | Dataset[Any]
"""One image, or any iterable of images: a list, a generator, a data set or one of its columns."""
OnError = Literal["raise", "skip", "return"]
"""The treatment of an image that cannot be decoded: raise its error; leave the image out, with a warning; or return the
error in place of the result."""
T = TypeVar("T")

BATCHES_AHEAD = 2
"""Number of batches of images that are decoded before the model needs them."""
MAX_THREADS = 8
"""Maximum number of threads that decode images."""
SECONDS_BEFORE_PROGRESS = 5.0
"""Time after which a progress bar is shown."""

log = logging.getLogger("blip2")


class FeatureBatch(NamedTuple):
    """The features of some images."""

    positions: list[int]
    """The position of each image among all images, counted from 0."""
    features: Float[Tensor, "B P E"]


class ImageStream:
    """Iterates over images as batches of features.

    Args:
        images: images.
        load: decodes and preprocesses an image; it is called in several threads.
        encode: maps a batch of preprocessed images to features.
        batch_size: number of images per batch.
        on_error: what to do with images that cannot be decoded.
        label: text before the progress bar, which is shown on a terminal when the images take long.

    Raises:
        InputError: `on_error` is not one of the three values. While iterating: there are no images; with ``raise``, an
            image cannot be decoded; with ``skip``, no image can be decoded.
    """

    def __init__(
        self,
        images: Images,
        load: Callable[[Any], Tensor],
        encode: Callable[[Tensor], Tensor],
        batch_size: int,
        on_error: OnError,
        label: str,
    ) -> None:
        check_on_error(on_error)
        self._items, self.total = iterate(images)
        self._load, self._encode, self._batch_size, self._label = load, encode, batch_size, label
        self.on_error = on_error
        self.num_read = 0
        """Number of images that were read so far, including those that cannot be decoded."""
        self.errors: dict[int, ImageError] = {}
        """The error of each image that could not be decoded, by the position of the image."""

    _features: Tensor | None = None

    @classmethod
    def from_features(
        cls, features: Float[Tensor, "I P E"], device: torch.device, batch_size: int, on_error: OnError
    ) -> ImageStream:
        """Return a stream of features that were computed before. A batch is moved to `device` when it is used."""
        stream = cls([], lambda _: features, lambda part: part.to(device), batch_size, on_error, "")
        stream._features, stream.total = features, len(features)
        return stream

    def __iter__(self) -> Iterator[FeatureBatch]:
        if self._features is not None:
            yield from self._split_features(self._features)
        else:
            yield from self._show_progress(self._encode_images())
        if not self.num_read:
            raise InputError("no image was given: give at least one")
        if self.on_error == "skip" and self.errors:
            if len(self.errors) == self.num_read:
                raise InputError(
                    f"none of the {self.num_read} images can be decoded: {next(iter(self.errors.values()))}"
                )
            log.warning("%d of %d images were left out because they cannot be decoded", len(self.errors), self.num_read)

    def arrange(self, results: Mapping[int, T]) -> list[T | ImageError]:
        """Return results, given by the position of their image, in the order of the images.

        If ``on_error`` is ``return``, the errors are in the places of the missing results.
        """
        by_position = {**results, **self.errors} if self.on_error == "return" else results
        return [by_position[position] for position in sorted(by_position)]

    def flatten(
        self, results: Mapping[int, Sequence[T]], texts_of_image: Callable[[int], Sequence[object]] = lambda _: ("",)
    ) -> list[T | ImageError]:
        """Return the results of all texts of all images in one list; an error is repeated for each text of its image.

        Args:
            results: for each image, by its position, one result per text.
            texts_of_image: maps the position of an image to its texts. By default, an image has one.
        """
        errors = {position: [error] * len(texts_of_image(position)) for position, error in self.errors.items()}
        by_position = {**results, **errors} if self.on_error == "return" else results
        return [result for position in sorted(by_position) for result in by_position[position]]

    def stack(
        self,
        results: Mapping[int, Float[Tensor, "_ ..."]],
        texts_of_image: Callable[[int], Sequence[object]] = lambda _: ("",),
        padding: float = 0.0,
    ) -> Any:
        """Return the results of all texts of all images as one tensor; or, with ``return``, as a list with errors.

        `padding` fills up results that are smaller than others.
        """
        if self.on_error == "return":
            return self.flatten({position: list(rows) for position, rows in results.items()}, texts_of_image)
        return cat_padded([results[position] for position in sorted(results)], padding)

    def _split_features(self, features: Float[Tensor, "I P E"]) -> Iterator[FeatureBatch]:
        for part in features.split(self._batch_size):
            start = self.num_read
            self.num_read += len(part)
            if len(part):
                yield FeatureBatch(list(range(start, self.num_read)), self._encode(part))

    def _encode_images(self) -> Iterator[FeatureBatch]:
        positions: list[int] = []
        decoded: list[Tensor] = []
        for result in self._decode_ahead():
            position = self.num_read
            self.num_read += 1
            if isinstance(result, ImageError):
                if self.on_error == "raise":
                    raise result
                if self.on_error == "skip":
                    log.warning("image %d is left out: %s", position + 1, result)
                self.errors[position] = result
                continue
            positions.append(position)
            decoded.append(result)
            if len(decoded) == self._batch_size:
                batch = stack_inputs(decoded)
                decoded = []
                yield FeatureBatch(positions, self._encode(batch))
                positions = []
        if decoded:
            yield FeatureBatch(positions, self._encode(stack_inputs(decoded)))

    def _decode_ahead(self) -> Iterator[Tensor | ImageError]:
        """Yield each image, decoded and preprocessed in a thread, or its error, in order."""

        def load(item: Any) -> Tensor | ImageError:
            try:
                return self._load(item)
            except ImageError as error:
                return error

        waiting: deque[tuple[Any, Future[Tensor | ImageError]]] = deque()
        pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), "blip2-images")
        try:
            for item in self._items:
                # An object that is given several times must not be decoded by two threads at the same time.
                same = next((future for other, future in waiting if other is item), None)
                waiting.append((item, same or pool.submit(load, item)))
                del item  # so that an image is not kept longer than it is needed
                if len(waiting) == BATCHES_AHEAD * self._batch_size:
                    yield waiting.popleft()[1].result()
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _show_progress(self, batches: Iterator[FeatureBatch]) -> Iterator[FeatureBatch]:
        """Yield the batches, and show a progress bar on a terminal if they take long."""
        started, display = time.monotonic(), None
        try:
            for batch in batches:
                if display is not None:
                    display.update(batch.positions[0])
                elif time.monotonic() - started > SECONDS_BEFORE_PROGRESS and self.total and sys.stderr.isatty():
                    display = Display(self._label)
                    display.start(self.total, batch.positions[0])
                yield batch
        finally:
            if display is not None:
                display.close()


def check_on_error(on_error: str) -> None:
    """Raise an InputError if `on_error` is not one of the values of :data:`OnError`."""
    if on_error not in get_args(OnError):
        raise InputError(f"on_error is {on_error!r}, expected one of {', '.join(get_args(OnError))}: use one of them")


def cat_padded(parts: Sequence[Float[Tensor, "_ ..."]], padding: float = 0.0) -> Float[Tensor, "N ..."]:
    """Concatenate tensors, each padded at the end of its other dimensions to the largest.

    Args:
        parts: the tensors.
        padding: the value of the padding. Zero suits attention weights: there is no attention to padding.
    """
    sizes = [max(each) for each in zip(*(part.shape[1:] for part in parts), strict=True)]

    def pad(part: Float[Tensor, "_ ..."]) -> Float[Tensor, "_ ..."]:
        missing = [size - own for size, own in zip(sizes, part.shape[1:], strict=True)]
        return F.pad(part, [n for each in reversed(missing) for n in (0, each)], value=padding)

    return torch.cat([pad(part) for part in parts])


def iterate(images: Any) -> tuple[Iterator[Any], int | None]:
    """Return an iterator over one image or several images, and their number; None if it is not known in advance.

    A row of a data set, which is a mapping, stands for its column ``image``, and ``{"bytes": ..., "path": ...}``, an
    image of the datasets library that is not decoded, for its bytes or its path.
    """
    if hasattr(images, "ndim"):  # an array: pixels, or a column of objects
        is_column = images.ndim == 1 and getattr(images.dtype, "kind", "") in ("O", "S", "U", "T")
        several = images.ndim == 4 or is_column
    else:
        indexed = hasattr(images, "__getitem__") and hasattr(images, "__len__")  # a data set of PyTorch
        one = isinstance(images, str | bytes | bytearray | memoryview | IOBase | Mapping)
        several = not one and (isinstance(images, Iterable) or indexed)
    if not several:
        return iter([find_image(images)]), 1
    total = len(images) if isinstance(images, Sized) else None
    if not isinstance(images, Iterable):
        items: Iterator[Any] = map(images.__getitem__, range(total or 0))  # pyright: ignore[reportAttributeAccessIssue]
    else:
        items = iter(images)
    if total is None:  # whether there is a single image has to be known in advance
        first = list(islice(items, 2))
        total = len(first) if len(first) < 2 else None
        items = chain(iter(first), items)
    return map(find_image, items), total


def find_image(item: Any) -> Any:
    """Return the image in a row of a data set; return anything but a mapping unchanged."""
    if not isinstance(item, Mapping):
        return item
    if "image" in item:
        return find_image(item["image"])
    return item.get("bytes") or item.get("path") or item

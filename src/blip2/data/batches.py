"""From records to batches of tensors: drawing, grouping by length, decoding.

All randomness is a function of (seed, epoch, number of the record), so the same batches come out whatever the number of
worker processes, and training can go on from any batch as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import Dataset

from blip2.config import QUESTION_PLACE
from blip2.data.features import CachedFeatures
from blip2.data.images import ImageError, augment_to_pixels, read_image, to_pixels
from blip2.data.records import Record, Records, RecordStream
from blip2.data.texts import StageBatch, TextPreparation
from blip2.errors import InputError
from blip2.model.vision import Preprocessing

WINDOW = 50
"""Batches that are drawn together and sorted by length among themselves."""


# -- drawing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """One example of a batch to be."""

    record: Record | int
    """The record of a stream, or the index of one in a table."""
    caption: int
    """Which of its captions; -1 when it has none."""
    seed: tuple[int, int, int]
    """(seed, epoch, number of the record): where the randomness of its augmentation comes from."""


@dataclass(frozen=True)
class Plan:
    """A batch to be, and the position in the data after it."""

    draws: tuple[Draw, ...]
    position: dict[str, Any]


def plan_batches(
    records: Records | RecordStream,
    batch_size: int,
    seed: int,
    group_by_length: bool = True,
    process: int = 0,
    processes: int = 1,
    position: dict[str, Any] | None = None,
) -> Iterator[Plan]:
    """Batches without end, epoch after epoch.

    Records are taken in windows of many batches: a window is sorted by the length of the captions drawn, cut into
    batches, and these are shuffled. A table is shuffled as a whole before; a stream only within its windows. What
    does not fill a batch at the end of an epoch is left out of that epoch, unless it is all there is.

    Args:
        batch_size: of this process.
        process, processes: a table is dealt out to the processes here; a stream was dealt out when it was opened.
        position: of a :class:`Plan`; batches go on behind it.
    """
    size = batch_size * WINDOW
    at = position or {"epoch": 0, "window": 0, "batch": 0, "stream": None}
    epoch, first, done, start = at["epoch"], at["window"], at["batch"], at["stream"]
    while True:
        for window, stream, items in _windows(records, size, epoch, first, start, seed, process, processes):
            random = np.random.default_rng([seed, epoch, window, process])
            draws, lengths = _draw_captions(records, items, (seed, epoch))
            # By length, answers would lie in batches of one answer, which teach its frequency and nothing of pictures.
            grouped = group_by_length and not records.asks
            order = np.argsort(lengths, kind="stable") if grouped else np.arange(len(draws))
            # A first window that does not fill a batch is all there is, and a batch of its own.
            count = max(len(draws) // batch_size, 1 if window == 0 else 0)
            # Which records are left over is drawn too, or the longest would never be seen.
            kept = np.sort(random.permutation(len(draws))[: count * batch_size])
            order = order[np.isin(order, kept)]
            batches = [order[i * batch_size : (i + 1) * batch_size] for i in range(count)]
            for number, batch in enumerate(random.permutation(count)):
                if number < done:
                    continue
                after = {"epoch": epoch, "window": window, "batch": number + 1, "stream": stream}
                yield Plan(tuple(draws[i] for i in batches[batch]), after)
            done = 0
        epoch, first, start = epoch + 1, 0, None


def _windows(
    records: Records | RecordStream,
    size: int,
    epoch: int,
    first: int,
    start: dict[str, Any] | None,
    seed: int,
    process: int,
    processes: int,
) -> Iterator[tuple[int, dict[str, Any] | None, list[tuple[Record | int, int]]]]:
    """(number, position of the stream before it, (record, its number) of each) of an epoch's windows."""
    if isinstance(records, Records):
        share = len(records) // processes
        if share == 0:
            raise InputError(f"{len(records)} records are too few for {processes} processes")
        order = np.random.default_rng([seed, epoch]).permutation(len(records))[process::processes][:share]
        for number in range(first, -(-share // size)):
            yield number, None, [(int(i), int(i)) for i in order[number * size : (number + 1) * size]]
        return
    reader, window = records.read(start), first
    while True:
        before = records.position()
        numbered = enumerate(islice(reader, size), before["number"])
        items: list[tuple[Record | int, int]] = [(record, number) for number, record in numbered]
        if not items:
            if window == 0:
                raise InputError("the data gave this process no records: it is empty or has too few for the processes")
            return
        yield window, before, items
        window += 1


def _draw_captions(
    records: Records | RecordStream, items: Sequence[tuple[Record | int, int]], seed: tuple[int, int]
) -> tuple[list[Draw], list[int]]:
    if isinstance(records, Records):
        captions = records.captions([number for _, number in items])
    else:
        captions = [record.captions for record, _ in items if isinstance(record, Record)]
    draws, lengths = [], []
    for (record, number), choices in zip(items, captions, strict=True):
        key = (*seed, number)
        drawn = int(np.random.default_rng(key).integers(len(choices))) if choices else -1
        draws.append(Draw(record, drawn, key))
        lengths.append(len(choices[drawn]) if choices else 0)
    return draws, lengths


# -- loading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A batch ready for the model, and what happened while it was made."""

    batch: StageBatch | None
    """None when not one of its images could be decoded."""
    keys: tuple[str, ...]
    """Names of its records."""
    skipped: tuple[str, ...]
    """A message for each record that was left out."""
    cut: int
    """Captions that were cut."""
    position: dict[str, Any]
    """Position in the data after it."""


class Preparation(Dataset[Loaded]):
    """Makes batches of plans, in worker processes.

    A record whose image cannot be decoded or that has no caption is replaced by another of its batch, so that all
    processes keep batches of one size; pairs of one image are not each other's negatives.

    Args:
        train: augment images; otherwise resize them.
        features: read these instead of images.
    """

    def __init__(
        self,
        records: Records | RecordStream,
        texts: TextPreparation,
        preprocessing: Preprocessing,
        train: bool,
        smallest_crop: float = 0.5,
        flip: bool = True,
        features: CachedFeatures | None = None,
    ) -> None:
        self.records = records if isinstance(records, Records) else None
        self.texts = texts
        self.preprocessing = preprocessing
        self.train = train
        self.smallest_crop = smallest_crop
        self.flip = flip
        self.features = features

    def __getitem__(self, plan: Plan) -> Loaded:
        good, skipped = [], []
        for draw in plan.draws:
            record = self._record(draw)
            try:
                good.append((record, self._image(record, draw), self._caption(record, draw), self._question(record)))
            except ImageError as error:
                skipped.append(f"{record.key}: {error}")
        keys = tuple(record.key for record, *_ in good)
        if not good:
            return Loaded(None, keys, tuple(skipped), 0, plan.position)
        if self.train:
            good = [good[i % len(good)] for i in range(len(plan.draws))]
        records, images, captions, questions = zip(*good, strict=True)
        batch, cut = self.texts(
            torch.stack(images),
            captions,
            questions,
            torch.tensor([record.image_id for record in records]),
            np.random.default_rng((*plan.draws[0].seed, 2)),
        )
        return Loaded(batch, keys, tuple(skipped), cut, plan.position)

    def _record(self, draw: Draw) -> Record:
        if isinstance(draw.record, Record):
            return draw.record
        assert self.records is not None
        return self.records[draw.record]

    def _caption(self, record: Record, draw: Draw) -> str:
        if draw.caption < 0:
            raise ImageError("it has no caption or answer: every image needs a text that is not blank")
        return record.captions[draw.caption]

    def _question(self, record: Record) -> str:
        if self.texts.asks and record.question is None:
            raise ImageError(f"it has no question, and language.prompt has {QUESTION_PLACE} where one goes")
        return record.question or ""

    def _image(self, record: Record, draw: Draw) -> Tensor:
        random = np.random.default_rng((*draw.seed, 1))
        if self.features is not None:
            assert isinstance(draw.record, int)
            return self.features.read(draw.record, random if self.train else None)
        if record.image is None:
            raise ImageError("it has no image")
        image = read_image(record.image)
        if not self.train:
            return to_pixels(image, self.preprocessing)
        return augment_to_pixels(image, self.preprocessing, random, self.smallest_crop, self.flip)


def plan_evaluation(records: Records, batch_size: int, process: int = 0, processes: int = 1) -> Iterator[Plan]:
    """Every record once, in order, with its first caption; dealt out to the processes."""
    mine = range(process, len(records), processes)
    for start in range(0, len(mine), batch_size):
        chunk = mine[start : start + batch_size]
        captions = records.captions(chunk)
        draws = tuple(Draw(i, 0 if c else -1, (0, 0, i)) for i, c in zip(chunk, captions, strict=True))
        yield Plan(draws, {})


Batch = TypeVar("Batch", bound=StageBatch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch with all its tensors on a device."""
    named = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **send_to_device(named, device, non_blocking=True))

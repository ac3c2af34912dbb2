"""From records to batches of tensors: drawing, grouping by length, decoding.

All randomness is a function of (seed, epoch, number of the record), so the same batches come out whatever the number of
worker processes, and training can go on from any batch as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from accelerate.utils import send_to_device
from jaxtyping import BFloat16
from torch import Tensor
from torch.utils.data import Dataset

from blip2.backbones.vision import Preprocessing
from blip2.config import QUESTION_PLACE
from blip2.data.collate import GenerationTexts, StageBatch, TextPreparation
from blip2.data.images import ImageError, augment_to_pixels, read_image, to_pixels
from blip2.data.records import Record, Records, RecordStream
from blip2.data.sampler import START, Item, Windows, read_chunks, to_hex

WINDOW = 50
"""Batches that are drawn together and sorted by length among themselves."""
CAUSES = ("image", "caption", "question", "shard")
"""Why a record is left out: its image is missing or cannot be decoded, it has no caption or answer, no question where
one is asked, or it stands for the rest of a shard that breaks off."""


@runtime_checkable
class FeatureSource(Protocol):
    """Image features that were computed beforehand, by the index of the record."""

    def read(self, index: int, random: np.random.Generator | None) -> BFloat16[Tensor, "P E"]:
        """Return the features of a view drawn with `random`, or of the whole image if it is None.

        Raises:
            ImageError: the image cannot be used.
        """
        ...


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
    source: int = 0
    """Which of several it is drawn from."""


def plan_batches(
    records: Records | RecordStream,
    batch_size: int,
    seed: int,
    group_by_length: bool = True,
    process: int = 0,
    processes: int = 1,
    position: dict[str, Any] | None = None,
) -> Iterator[Plan]:
    """Batches without end, epoch after epoch, in which every record comes once (:mod:`blip2.data.sampler`).

    Records are taken in windows of many batches: a window is sorted by the length of the captions drawn, cut into
    batches, and these are shuffled. A table is shuffled as a whole before; a stream by its shards.

    Args:
        batch_size: of this process. Of a table that has fewer records for each process, a batch is all of them.
        process, processes: a table is dealt out to the processes here; a stream was dealt out when it was opened.
        position: of a :class:`Plan`; batches go on behind it.
    """
    at = position or START
    about = {"order": order_of(records, seed), "deal": deal_of(records, batch_size, group_by_length, processes)}
    windows = Windows(read_chunks(records, batch_size, seed, process, processes, at), WINDOW)
    done = at["batch"]
    while True:
        window = windows.take()
        size, start = len(window[0].items), window[0].position
        random = np.random.default_rng([seed, start["since"], start["taken"], process])
        draws, lengths = _draw_captions(records, [item for chunk in window for item in chunk.items], seed)
        order = random.permutation(len(draws))
        grouped = isinstance(records, Records) and records.groups is not None
        if grouped:  # they come in the order of their groups
            order = np.arange(len(draws))
        # By length, answers would lie in batches of one answer, which teach its frequency and nothing of pictures.
        if group_by_length and not records.asks and not grouped:  # captions of one length stay shuffled
            order = order[np.argsort(_spread(lengths, random)[order], kind="stable")]
        batches = order.reshape(-1, size)
        # Groups that are spread over processes must meet in the same step of all.
        turns = np.arange(len(batches)) if grouped else random.permutation(len(batches))
        seen = np.zeros(len(draws), bool)
        for number, batch in enumerate(turns):
            windows.read_ahead()
            seen[batches[batch]] = True
            if number < done:
                continue
            after = {**start, "epoch": window[-1].epochs[1], "batch": number + 1, "seen": to_hex(seen), **about}
            yield Plan(tuple(draws[i] for i in batches[batch]), after)
        done = 0


def order_of(records: Records | RecordStream, seed: int) -> dict[str, Any]:
    """Return what decides the order of records. A position no longer holds when it changes."""
    return {"seed": seed, **records.layout}


def deal_of(records: Records | RecordStream, batch_size: int, group_by_length: bool, processes: int) -> dict[str, Any]:
    """Return what decides how that order becomes batches of several processes."""
    return {
        "batch_size": batch_size, "processes": processes, "group_by_length": group_by_length, "window": WINDOW,
        "caption_column": records.caption_column,
    }  # fmt: skip


def _draw_captions(records: Records | RecordStream, items: Sequence[Item], seed: int) -> tuple[list[Draw], list[int]]:
    if isinstance(records, Records):
        captions = records.captions([item.number for item in items])
    else:
        captions = [item.record.captions for item in items if isinstance(item.record, Record)]
    draws, lengths = [], []
    for item, choices in zip(items, captions, strict=True):
        key = (seed, item.epoch, item.number)
        drawn = int(np.random.default_rng(key).integers(len(choices))) if choices else -1
        draws.append(Draw(item.record, drawn, key))
        lengths.append(len(choices[drawn]) if choices else 0)
    return draws, lengths


def _spread(lengths: Sequence[int], random: np.random.Generator) -> np.ndarray:
    """Lengths in which those without a caption have one that others have: side by side they would spoil a batch."""
    given = np.array(lengths)
    without = given == 0
    if not without.all():
        given[without] = random.choice(given[~without], without.sum())
    return given


# -- loading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Skipped:
    """A record that was left out."""

    cause: str
    """One of :data:`CAUSES`."""
    key: str
    """Names the record."""
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {self.why}"


@dataclass(frozen=True)
class Loaded:
    """A batch ready for the model, and what happened while it was made."""

    batch: StageBatch | None
    """None when not one of its images could be decoded."""
    keys: tuple[str, ...]
    """Names of its records."""
    skipped: tuple[Skipped, ...]
    """The records that were left out."""
    cut: int
    """Captions that were cut."""
    position: dict[str, Any]
    """Position in the data after it."""
    source: int = 0
    """Which of several it was drawn from."""
    drawn: int = 0
    """Records that it was made of, the skipped ones included."""
    begun: int = 0
    """Shards that begin in it."""


class _Unusable(Exception):  # noqa: N818
    """A record that cannot be used for another reason than its image."""

    def __init__(self, cause: str, why: str) -> None:
        super().__init__(why)
        self.cause = cause


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
        features: FeatureSource | None = None,
    ) -> None:
        self.records = records if isinstance(records, Records) else None
        self.texts = texts
        self.preprocessing = preprocessing
        self.train = train
        self.smallest_crop = smallest_crop
        self.flip = flip
        self.features = features

    def __getitem__(self, plan: Plan) -> Loaded:
        good, skipped, begun = [], [], 0
        for draw in plan.draws:
            record = self._record(draw)
            begun += record.begins
            try:
                good.append((record, *self._texts(record, draw), self._image(record, draw)))
            except ImageError as error:
                skipped.append(Skipped("image", record.key, str(error)))
            except _Unusable as error:
                skipped.append(Skipped(error.cause, record.key, str(error)))
        keys = tuple(record.key for record, *_ in good)
        loaded = Loaded(None, keys, tuple(skipped), 0, plan.position, plan.source, len(plan.draws), begun)
        if not good:
            return loaded
        if self.train:
            good = [good[i % len(good)] for i in range(len(plan.draws))]
        records, captions, questions, images = zip(*good, strict=True)
        batch, cut = self.texts(
            torch.stack(images),
            captions,
            questions,
            torch.tensor([record.image_id for record in records]),
            np.random.default_rng((*plan.draws[0].seed, 2)),
        )
        return replace(loaded, batch=batch, cut=cut)

    def _record(self, draw: Draw) -> Record:
        if isinstance(draw.record, Record):
            return draw.record
        assert self.records is not None
        return self.records[draw.record]

    def _texts(self, record: Record, draw: Draw) -> tuple[str, str]:
        """Caption and question."""
        if record.broken is not None:
            raise _Unusable("shard", f"the rest of it cannot be read: {record.broken}")
        if record.unusable is not None:
            raise _Unusable(*record.unusable)
        if draw.caption < 0:
            raise _Unusable("caption", "it has no caption or answer: every image needs a text that is not blank")
        if self.texts.asks and record.question is None:
            raise _Unusable("question", f"it has no question, and language.prompt has {QUESTION_PLACE} where one goes")
        if isinstance(self.texts, GenerationTexts) and record.question and self.texts.room is not None:
            length = self.texts.prompt_length(self.texts.prompt_of(record.question))
            if length > self.texts.room:
                raise _Unusable(
                    "question", f"with its prompt it has {length} tokens, the LLM has room for {self.texts.room}"
                )
        return record.captions[draw.caption], record.question or ""

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

"""Load batches: turn a :class:`~blip2.data.sampler.BatchSpec` into the tensors of a training step.

Legend: H and W height and width of an image in pixels, P image tokens, E width of the image encoder.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from accelerate.utils import send_to_device
from jaxtyping import BFloat16
from torch import Tensor
from torch.utils.data import Dataset

from blip2.backbones.features import FeatureFormat
from blip2.backbones.vision import Preprocessing
from blip2.config import QUESTION_PLACEHOLDER
from blip2.data.arrays import read_input, stack_inputs
from blip2.data.collate import CausalLMCollator, Collator, StageBatch, normalize_captions
from blip2.data.images import ImageError, read_image, train_transform
from blip2.data.positions import MixturePosition, SourcePosition
from blip2.data.records import Record, Records, RecordStream
from blip2.data.sampler import BatchSpec, SampleSpec

SKIP_REASONS = ("image", "caption", "question", "shard")
"""Reasons for skipping a record.

- ``image``: the image, or the array of features, is missing or cannot be read;
- ``caption``: the record has no caption or answer, or a text of the record cannot be read;
- ``question``: the prompt needs a question and the record has none, or the question is too long or cannot be read;
- ``shard``: the rest of the shard cannot be read. The skipped record is a placeholder for this rest.
"""


@runtime_checkable
class FeatureSource(Protocol):
    """Precomputed image features of the records of a table."""

    def read(self, index: int, rng: np.random.Generator | None) -> BFloat16[Tensor, "P E"]:
        """Return the features of the image of one record.

        Args:
            index: index of the record.
            rng: selects one of the stored random views of the image; ``None``: the features of the whole image.

        Raises:
            ImageError: the image cannot be used.
        """
        ...


@dataclass(frozen=True)
class SkippedRecord:
    """A record that was left out of a batch."""

    reason: str
    """One of :data:`SKIP_REASONS`."""
    key: str
    """Name of the record in messages."""
    message: str
    """Description of the problem, written to follow the name of the record and a colon."""

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


@dataclass(frozen=True)
class LoadedBatch:
    """A batch for the model, and statistics about its records."""

    batch: StageBatch | None
    """``None`` if no record of the batch is usable; the trainer then takes the next batch."""
    keys: tuple[str, ...]
    """Names of the usable records."""
    skipped: tuple[SkippedRecord, ...]
    """The records that cannot be used."""
    position: SourcePosition | MixturePosition | None
    """``position`` of the :class:`~blip2.data.sampler.BatchSpec`: the position in the data after this batch."""
    source_index: int
    """Index of the source in a mixture."""
    num_samples: int
    """Number of records that were drawn for this batch, including skipped ones."""
    num_truncated: int
    """Number of captions that were truncated."""
    shards_started: int
    """Number of shards whose first record is in this batch."""


class _SkipRecord(Exception):  # noqa: N818
    """Raised if the row, the texts or the shard of a record cannot be used.

    An image that is missing or cannot be decoded raises an :class:`ImageError` instead.

    Args:
        reason: why the record is skipped, one of :data:`SKIP_REASONS`.
        message: the explanation for the user.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class BatchDataset(Dataset[LoadedBatch]):
    """Loads batches of one source. Worker processes index the data set with a :class:`~blip2.data.sampler.BatchSpec`.

    Records that cannot be used are skipped. In training, the other records of the batch are repeated to replace them,
    so that all ranks have batches of equal size.

    Args:
        records: the source.
        collator: makes the batch of the model from images and texts.
        input_format: image size and normalization of the image encoder, or the shape of the arrays that it reads.
        train: if True, crop and flip images at random; otherwise only resize them. Features are never changed.
        min_crop_scale: smallest area of a random crop, as a fraction of the image in (0, 1].
        horizontal_flip: flip images with probability 0.5 in training.
        features: features that are read instead of the images; ``None``: read the images.
    """

    def __init__(
        self,
        records: Records | RecordStream,
        collator: Collator,
        input_format: Preprocessing | FeatureFormat,
        train: bool,
        min_crop_scale: float = 0.5,
        horizontal_flip: bool = True,
        features: FeatureSource | None = None,
    ) -> None:
        self.records = records if isinstance(records, Records) else None
        self.collator = collator
        self.input_format = input_format
        self.train = train
        self.min_crop_scale = min_crop_scale
        self.horizontal_flip = horizontal_flip
        self.features = features

    def __getitem__(self, spec: BatchSpec[Any]) -> LoadedBatch:
        usable, skipped, shards_started = [], [], 0
        for sample in spec.samples:
            record = self._record(sample)
            shards_started += record.starts_shard
            try:
                usable.append((record, *self._texts(record, sample), self._image(record, sample)))
            except ImageError as error:
                skipped.append(SkippedRecord("image", record.key, str(error)))
            except _SkipRecord as error:
                skipped.append(SkippedRecord(error.reason, record.key, str(error)))
        keys = tuple(record.key for record, *_ in usable)
        batch, num_truncated = None, 0
        if usable:
            if self.train:
                usable = [usable[i % len(usable)] for i in range(len(spec.samples))]
            records, captions, questions, images = zip(*usable, strict=True)
            batch, num_truncated = self.collator(
                stack_inputs(images),
                captions,
                questions,
                torch.tensor([record.image_id for record in records]),
                np.random.default_rng((*spec.samples[0].seed, 2)),
            )
        return LoadedBatch(
            batch, keys, tuple(skipped), spec.position, spec.source_index, len(spec.samples), num_truncated,
            shards_started,
        )  # fmt: skip

    def _record(self, sample: SampleSpec) -> Record:
        if isinstance(sample.record, Record):
            return sample.record
        assert self.records is not None
        return self.records[sample.record]

    def _texts(self, record: Record, sample: SampleSpec) -> tuple[str, str]:
        """Return the caption and the question of a record; the question is empty if the record has none.

        Raises:
            _SkipRecord: the record cannot be used.
        """
        if record.error is not None:
            raise _SkipRecord("shard", f"the rest of the shard cannot be read: {record.error}")
        if record.skip_reason is not None:
            raise _SkipRecord(*record.skip_reason)
        if sample.caption_index < 0:
            raise _SkipRecord("caption", "it has no caption or answer, expected a text that is not blank")
        collator = self.collator
        if collator.requires_question and record.question is None:
            raise _SkipRecord(
                "question", f"it has no question, expected one because language.prompt contains {QUESTION_PLACEHOLDER}"
            )
        if isinstance(collator, CausalLMCollator) and record.question and collator.max_prompt_tokens is not None:
            length = collator.num_prompt_tokens(collator.format_prompt(record.question))
            if length > collator.max_prompt_tokens:
                raise _SkipRecord(
                    "question",
                    f"the prompt with its question has {length} tokens, but the LLM has positions for at most"
                    f" {collator.max_prompt_tokens}: shorten the question",
                )
        caption, question = record.captions[sample.caption_index], record.question or ""
        is_answer = question and isinstance(collator, CausalLMCollator)  # answers are not normalized
        if not is_answer and not normalize_captions([caption], collator.normalization)[0]:
            raise _SkipRecord(
                "caption", f"data.text_normalization leaves nothing of the caption {caption!r}, expected words"
            )
        return caption, question

    def _image(self, record: Record, sample: SampleSpec) -> Tensor:
        """Return the pixels [3, H, W] of the image of a record, its cached features [P, E], or an array [1, P, E].

        Raises:
            ImageError: the image cannot be used.
        """
        rng = np.random.default_rng((*sample.seed, 1))
        if self.features is not None:
            assert isinstance(sample.record, int)
            return self.features.read(sample.record, rng if self.train else None)
        if record.image is None:
            kind = "features" if isinstance(self.input_format, FeatureFormat) else "image"
            raise ImageError(f"it has no {kind}")
        if isinstance(self.input_format, FeatureFormat) or not self.train:
            return read_input(record.image, self.input_format)
        image = read_image(record.image)
        return train_transform(image, self.input_format, rng, self.min_crop_scale, self.horizontal_flip)


Batch = TypeVar("Batch", bound=StageBatch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a copy of a batch whose tensors are on `device`."""
    named = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **send_to_device(named, device, non_blocking=True))

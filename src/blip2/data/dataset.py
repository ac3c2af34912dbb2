"""Loading: from the specification of a batch to the tensors that a training step takes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from accelerate.utils import send_to_device
from jaxtyping import BFloat16
from torch import Tensor
from torch.utils.data import Dataset

from blip2.backbones.vision import Preprocessing
from blip2.config import QUESTION_PLACEHOLDER
from blip2.data.collate import CausalLMCollator, Collator, StageBatch
from blip2.data.images import ImageError, preprocess, read_image, train_transform
from blip2.data.records import Record, Records, RecordStream
from blip2.data.sampler import BatchSpec, SampleSpec

SKIP_REASONS = ("image", "caption", "question", "shard")
"""Reasons for skipping a record: its image is missing or cannot be decoded, it has no caption or answer, it has no
usable question although the prompt needs one, or the rest of its shard cannot be read."""


@runtime_checkable
class FeatureSource(Protocol):
    """Precomputed image features, by the index of the record."""

    def read(self, index: int, rng: np.random.Generator | None) -> BFloat16[Tensor, "P E"]:
        """Return the features of a random view, or those of the whole image if `rng` is ``None``.

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
    """Name of the record."""
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


@dataclass(frozen=True)
class LoadedBatch:
    """A batch for the model, and statistics of loading it."""

    batch: StageBatch | None
    """``None`` if no record of the batch is usable."""
    keys: tuple[str, ...]
    """Names of the usable records."""
    skipped: tuple[SkippedRecord, ...]
    position: dict[str, Any]
    """Position in the data after this batch."""
    source_index: int
    """Index of the source in a mixture."""
    num_samples: int
    """Number of records that were drawn, including skipped ones."""
    num_truncated: int
    """Number of captions that were truncated."""
    shards_started: int
    """Number of shards whose first record is in this batch."""


class _SkipRecord(Exception):  # noqa: N818
    """Raised for a record that is unusable for another reason than its image."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class BatchDataset(Dataset[LoadedBatch]):
    """Loads batches, in worker processes.

    In training, a record that is skipped is replaced by another record of its batch, so that all ranks have batches of
    equal size. Samples of the same image are not negatives of each other (``image_ids``).

    Args:
        train: augment images; otherwise only resize them.
        features: read these features instead of images.
    """

    def __init__(
        self,
        records: Records | RecordStream,
        collator: Collator,
        preprocessing: Preprocessing,
        train: bool,
        min_crop_scale: float = 0.5,
        horizontal_flip: bool = True,
        features: FeatureSource | None = None,
    ) -> None:
        self.records = records if isinstance(records, Records) else None
        self.collator = collator
        self.preprocessing = preprocessing
        self.train = train
        self.min_crop_scale = min_crop_scale
        self.horizontal_flip = horizontal_flip
        self.features = features

    def __getitem__(self, spec: BatchSpec) -> LoadedBatch:
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
                torch.stack(images),
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
        """Return the caption and the question; the question is empty if there is none."""
        if record.error is not None:
            raise _SkipRecord("shard", f"the rest of it cannot be read: {record.error}")
        if record.skip_reason is not None:
            raise _SkipRecord(*record.skip_reason)
        if sample.caption_index < 0:
            raise _SkipRecord("caption", "it has no caption or answer: every image needs a text that is not blank")
        collator = self.collator
        if collator.requires_question and record.question is None:
            raise _SkipRecord(
                "question", f"it has no question, and language.prompt has {QUESTION_PLACEHOLDER} where one goes"
            )
        if isinstance(collator, CausalLMCollator) and record.question and collator.max_prompt_tokens is not None:
            length = collator.num_prompt_tokens(collator.format_prompt(record.question))
            if length > collator.max_prompt_tokens:
                raise _SkipRecord(
                    "question",
                    f"with its prompt it has {length} tokens, the LLM has room for {collator.max_prompt_tokens}",
                )
        return record.captions[sample.caption_index], record.question or ""

    def _image(self, record: Record, sample: SampleSpec) -> Tensor:
        """Return the pixels [3, H, W] or the features [P, E] of the image."""
        rng = np.random.default_rng((*sample.seed, 1))
        if self.features is not None:
            assert isinstance(sample.record, int)
            return self.features.read(sample.record, rng if self.train else None)
        if record.image is None:
            raise ImageError("it has no image")
        image = read_image(record.image)
        if not self.train:
            return preprocess(image, self.preprocessing)
        return train_transform(image, self.preprocessing, rng, self.min_crop_scale, self.horizontal_flip)


Batch = TypeVar("Batch", bound=StageBatch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a copy of a batch with all tensors on a device."""
    named = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **send_to_device(named, device, non_blocking=True))

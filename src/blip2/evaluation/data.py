"""Records to evaluate on: texts and metadata are kept in memory, images are read on demand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from blip2.config import DataConfig
from blip2.data.assets import resolve
from blip2.data.records import Record, Records
from blip2.data.sources import open_records
from blip2.errors import InputError


class EvalData:
    """The records of one source, without their images.

    Args:
        config: the config of the data. Its field ``train`` names the source to evaluate on, and its column names have
            the same meaning as in training.
        limit: use only the first `limit` records. None: all records.
        reads_features: whether the records have arrays of features in place of images.

    Raises:
        InputError: the source cannot be read, is a stream, or has a row that cannot be used; or `config` names several
            sources.
    """

    def __init__(self, config: DataConfig, limit: int | None = None, reads_features: bool = False) -> None:
        self.source, *others = config.sources
        if others:
            raise InputError(
                f"an evaluation takes one data set, but data names {1 + len(others)}: evaluate each data set separately"
            )
        config = replace(config, streaming=False)
        dataset = open_records(resolve(self.source), config, reads_features=reads_features)
        if not isinstance(dataset, Records):
            raise InputError(f"{self.source} is a stream, expected a table or a folder: give a table or a folder")
        self.dataset = dataset
        self.records: list[Record] = []
        """The records without their images."""
        self.image_ids: list[int] = []
        """One id per record; equal ids mean equal images."""
        for i in range(len(dataset) if limit is None else min(limit, len(dataset))):
            record = dataset[i]
            self.image_ids.append(record.image_id)
            self.records.append(replace(record, image=None))
        unusable = [record for record in self.records if record.skip_reason is not None]
        if unusable and unusable[0].skip_reason is not None:
            others = f", nor can {len(unusable) - 1} other records" if len(unusable) > 1 else ""
            raise InputError(
                f"{unusable[0].key} cannot be used{others}: {unusable[0].skip_reason[1]}; every record is scored, so"
                " correct or remove unusable records"
            )

    def __len__(self) -> int:
        return len(self.records)

    def image(self, index: int) -> str | bytes | None:
        """Return the path or the encoded bytes of the image of a record; None if the record has no image."""
        return self.dataset[index].image

    def group_by_image(self) -> list[list[int]]:
        """Return the indices of the records of each image, in the order in which the images first occur."""
        groups: dict[Any, list[int]] = {}
        for i, record in enumerate(self.records):
            groups.setdefault(record.metadata.get("image_id", self.image_ids[i]), []).append(i)
        return list(groups.values())

    def question_ids(self) -> list[Any]:
        """Return the ``question_id`` of each record, or the index of the record if there is no ``question_id``.

        Raises:
            InputError: a record has no question, or two records have the same id.
        """
        without = next((record.key for record in self.records if record.question is None), None)
        if without is not None:
            raise InputError(
                f"{without} has no question, which the task vqa needs: add a column of questions, or choose another"
                " task"
            )
        ids = [record.metadata.get("question_id", i) for i, record in enumerate(self.records)]
        repeated = [key for key, count in Counter(ids).items() if count > 1]
        if repeated:
            raise InputError(
                f"{len(repeated)} question ids occur more than once in the data, the first is {repeated[0]!r}: give"
                " each question its own question_id"
            )
        return ids

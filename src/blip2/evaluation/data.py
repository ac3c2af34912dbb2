"""Records to be evaluated on: what they say is held, their images are read when somebody looks at them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from blip2.config import DataConfig
from blip2.data.assets import resolve
from blip2.data.records import Record, Records, open_records
from blip2.errors import InputError


class Table:
    """The first records of a source.

    Args:
        config: ``train`` is the source, the columns are named as for training.
        limit: how many; None: all.

    Raises:
        InputError: the source cannot be read, is a stream, or has a row that cannot be used.
    """

    def __init__(self, config: DataConfig, limit: int | None = None) -> None:
        self.source, *others = config.sources
        if others:
            raise InputError(f"an evaluation is of one data set, and data names {1 + len(others)}: evaluate each alone")
        records = open_records(resolve(self.source), replace(config, streaming=False))
        if not isinstance(records, Records):
            raise InputError(f"{self.source} is a stream, expected a table or folder to evaluate on")
        self.records = records
        self.said: list[Record] = []
        """The records without their images."""
        self.image_ids: list[int] = []
        """Equal where images are equal."""
        for i in range(len(records) if limit is None else min(limit, len(records))):
            record = records[i]
            self.image_ids.append(record.image_id)
            self.said.append(replace(record, image=None))
        unusable = [record for record in self.said if record.unusable is not None]
        if unusable and unusable[0].unusable is not None:
            others = f" (and {len(unusable) - 1} others like it)" if len(unusable) > 1 else ""
            raise InputError(
                f"{unusable[0].key} cannot be used{others}: {unusable[0].unusable[1]}; scores are of all records, so"
                " correct it, or take it out"
            )

    def __len__(self) -> int:
        return len(self.said)

    def image(self, index: int) -> str | bytes | None:
        """Path or encoded bytes of a record's image, if it has one."""
        return self.records[index].image

    def by_image(self) -> list[list[int]]:
        """The records of each image, in the order in which images come."""
        owners: dict[Any, list[int]] = {}
        for number, record in enumerate(self.said):
            owners.setdefault(record.about.get("image_id", self.image_ids[number]), []).append(number)
        return list(owners.values())

    def question_ids(self) -> list[Any]:
        """What each question is called: its question_id, or its number.

        Raises:
            InputError: a record has no question, or two have one id.
        """
        unasked = next((record.key for record in self.said if record.question is None), None)
        if unasked is not None:
            raise InputError(f"{unasked} has no question, which the task vqa needs: choose another task")
        ids = [record.about.get("question_id", i) for i, record in enumerate(self.said)]
        doubled = [key for key, times in Counter(ids).items() if times > 1]
        if doubled:
            raise InputError(
                f"question_id {doubled[0]!r} and {len(doubled) - 1} others stand more than once in the data, expected"
                " one a question"
            )
        return ids

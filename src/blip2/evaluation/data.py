"""Records to evaluate on: texts and metadata are kept in memory, images are read on demand."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from typing import Any

from blip2.config import DataConfig
from blip2.data.assets import resolve
from blip2.data.cells import CHOICE_COLUMNS, CellError, read_texts
from blip2.data.records import Record, Records
from blip2.data.sources import open_records
from blip2.errors import InputError
from blip2.io import expand_home, parse_json, read_regular_file

MAX_ANSWER_LIST = 1 << 26
"""Maximum number of bytes of a list of answers."""


def read_answer_list(path: str) -> tuple[str, ...]:
    """Read the candidate answers to all questions from a file: one answer per line, or a JSON list of texts.

    Args:
        path: the file. A JSON list must be in a file whose name ends in .json. Blank lines of other files are ignored.

    Raises:
        InputError: the file cannot be read, or does not contain at least two texts that differ and are not blank.
    """
    file = expand_home(path)
    try:
        text = read_regular_file(file, MAX_ANSWER_LIST).decode("utf-8-sig")
        listed: Any = (
            parse_json(text) if file.suffix.lower() == ".json" else [line for line in text.splitlines() if line.strip()]
        )
    except (OSError, ValueError, InputError) as error:
        raise InputError(
            f"the answer list {path} cannot be read ({getattr(error, 'strerror', None) or error}), expected a text file"
            " with one answer per line, or a JSON list of texts in a .json file: correct the path or the file"
        ) from error
    entries = listed if isinstance(listed, list) else []
    answers = [" ".join(each.split()) if isinstance(each, str) else "" for each in entries]
    num_blank, num_repeated = answers.count(""), len(answers) - len(set(answers))
    if len(answers) < 2 or num_blank or num_repeated:
        raise InputError(
            f"the answer list {path} has {len(answers)} entries, {num_blank} of them blank or not text and"
            f" {num_repeated} repeated, expected at least two texts that differ: correct the file"
        )
    return tuple(answers)


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

    def digest(self) -> str:
        """Return a digest of the records: of their texts and metadata, and of the paths or bytes of their images."""
        hasher = hashlib.blake2b(digest_size=8)
        for record, image in zip(self.records, self.image_ids, strict=True):
            texts = (record.captions, record.num_blank, record.question, dict(record.metadata))
            hasher.update(json.dumps([*texts, dict(record.other_columns), image], default=str).encode())
        return hasher.hexdigest()

    def group_by_image(self) -> list[list[int]]:
        """Return the indices of the records of each image, in the order in which the images first occur.

        Raises:
            InputError: records of different images have the same ``image_id``.
        """
        groups: dict[Any, list[int]] = {}
        for i, record in enumerate(self.records):
            groups.setdefault(record.metadata.get("image_id", self.image_ids[i]), []).append(i)
        for key, group in groups.items():
            other = next((i for i in group if self.image_ids[i] != self.image_ids[group[0]]), None)
            if other is not None:
                raise InputError(
                    f"{self.records[group[0]].key} and {self.records[other].key} have the image_id {key!r}, but"
                    " different images: give each image its own image_id, or leave out the column"
                )
        return list(groups.values())

    def choices(self) -> list[tuple[str, ...]]:
        """Return the candidate answers to the question of each record, from the column of choices.

        Raises:
            InputError: there is no such column, or a record does not have at least two choices that differ.
        """
        return [self._choices(record) for record in self.records]

    @staticmethod
    def _choices(record: Record) -> tuple[str, ...]:
        for name, cell in record.other_columns.items():
            try:
                choices, num_blank = read_texts(cell)
            except CellError as error:
                raise InputError(f"{record.key}: {name} {error}") from error
            if num_blank or len(choices) < 2 or len(set(choices)) < len(choices):
                raise InputError(
                    f"{record.key}: {name} holds {list(choices) + [''] * num_blank}, expected at least two texts that"
                    " differ and are not blank: correct the row"
                )
            return choices
        raise InputError(
            f"{record.key} has no choices, among which to rank answers: add a column {CHOICE_COLUMNS[0]} with a list of"
            " candidate answers, or give a file of answers as answer_list"
        )

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
        repeated = [key for key, count in Counter(map(str, ids)).items() if count > 1]  # 5 and "5" are one id in a file
        if repeated:
            raise InputError(
                f"{len(repeated)} question ids occur more than once in the data, the first is {repeated[0]}: give"
                " each question its own question_id"
            )
        return ids

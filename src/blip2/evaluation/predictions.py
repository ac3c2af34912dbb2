"""Prediction files in the formats of the benchmarks' evaluation servers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from blip2.errors import InputError
from blip2.io import read_json, write_json

Id = int | str
PredictionFormat = Literal["answer", "caption", "gqa", "named"]
KEYS: dict[PredictionFormat, tuple[str, str]] = {
    "answer": ("question_id", "answer"),
    "caption": ("image_id", "caption"),
    "gqa": ("questionId", "prediction"),
    "named": ("image_id", "caption"),
}
"""JSON keys of the id and of the text in each format. ``answer``: VQAv2 and OK-VQA; ``caption``: COCO and NoCaps;
``gqa``: GQA; ``named``: captions of images whose ids are strings."""

STRING_ID_FORMATS = ("gqa", "named")
MAX_PREDICTIONS = 1 << 30
"""Maximum size of a file of predictions in bytes."""


def write_predictions(path: str | Path, format: PredictionFormat, predictions: Mapping[Any, str]) -> None:
    """Atomically write a list such as ``[{"question_id": 1, "answer": "a dog"}]``.

    Args:
        path: the file to write. Missing folders are created.
        format: the format, which determines the JSON keys and the type of the ids.
        predictions: predicted text by id. Ids are strings in :data:`STRING_ID_FORMATS` and integers otherwise.

    Raises:
        InputError: an id has the wrong type, or the file cannot be written.
    """
    id_key, text_key = KEYS[format]
    wrong = [key for key in predictions if not _is_id(format, key)]
    if wrong:
        raise InputError(
            f"{path} cannot be written: {_abbreviate(wrong, id_key)} of the wrong type, expected {_id_type(format)};"
            " convert these ids, or choose another format"
        )
    rows = [{id_key: key, text_key: text} for key, text in predictions.items()]
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, rows, indent=None)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): check the permissions and the disk, or choose another path"
        ) from error


def read_predictions(path: str | Path, format: PredictionFormat, expected: Collection[Id]) -> dict[Any, str]:
    """Read a file of predictions.

    Args:
        path: the file to read.
        format: the format of the file.
        expected: the ids that the file must contain. Each must occur exactly once, and no other ids may occur.

    Returns:
        The predicted texts, by id.

    Raises:
        InputError: the file cannot be read, an entry has another format, or ids are missing, repeated or unknown.
    """
    id_key, text_key = KEYS[format]
    rows = read_json(path, MAX_PREDICTIONS, "write the predictions again")
    schema = f'[{{"{id_key}": {_id_type(format)}, "{text_key}": text}}, ...]'
    if not isinstance(rows, list):
        raise InputError(f"{path} holds one {type(rows).__name__}, expected a list: write the predictions as {schema}")
    wrong = [
        number
        for number, row in enumerate(rows)
        if not (isinstance(row, dict) and _is_id(format, row.get(id_key)) and isinstance(row.get(text_key), str))
    ]
    if wrong:
        first = json.dumps(rows[wrong[0]])
        raise InputError(
            f"{path}: {_abbreviate(wrong, 'entries' if len(wrong) > 1 else 'entry')} in another format, the first is"
            f" {first[:80]}: write the predictions as {schema}"
        )
    check_ids(str(path), id_key, [row[id_key] for row in rows], expected)
    return {row[id_key]: row[text_key] for row in rows}


def check_ids(source: str, name: str, found: Iterable[Id], expected: Collection[Id]) -> None:
    """Check that every expected id occurs exactly once, and that no other id occurs.

    Args:
        source: name of the container of the ids, for the error message.
        name: name of the ids, for the error message.
        found: the ids to check.
        expected: the ids that must occur.

    Raises:
        InputError: ids are repeated, unknown or missing; the message gives their number and the first five.
    """
    counts, known = Counter(list(found)), frozenset(expected)
    repeated = [key for key, count in counts.items() if count > 1]
    if repeated:
        raise InputError(f"{source}: {_abbreviate(repeated, f'repeated {name}')}: keep one entry for each id")
    unknown = [key for key in counts if key not in known]
    if unknown:
        raise InputError(
            f"{source}: {_abbreviate(unknown, f'unknown {name}')}, expected only ids of the data: check that both are"
            " of the same split"
        )
    missing = [key for key in dict.fromkeys(expected) if key not in counts]
    if missing:
        raise InputError(
            f"{source}: {_abbreviate(missing, f'missing {name}')}, expected all {len(known)} ids of the data: add the"
            " missing entries"
        )


def _abbreviate(keys: list[Any], name: str) -> str:
    """Return the number of keys and the first five keys."""
    shown = ", ".join(map(repr, keys[:5])) + (", ..." if len(keys) > 5 else "")
    return f"{len(keys)} {name} ({shown})"


def _is_id(format: PredictionFormat, key: object) -> bool:
    return isinstance(key, str) if format in STRING_ID_FORMATS else isinstance(key, int) and not isinstance(key, bool)


def _id_type(format: PredictionFormat) -> str:
    return "text" if format in STRING_ID_FORMATS else "whole number"

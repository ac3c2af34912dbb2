"""Files of predictions: written as the challenge servers take them, and read back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from blip2.errors import InputError
from blip2.io import read_json, write_json

Id = int | str
Kind = Literal["answer", "caption", "gqa", "named"]
KEYS: dict[Kind, tuple[str, str]] = {
    "answer": ("question_id", "answer"),
    "caption": ("image_id", "caption"),
    "gqa": ("questionId", "prediction"),
    "named": ("image_id", "caption"),
}
"""What the id and the text are called: VQAv2 and OK-VQA, COCO and NoCaps, GQA, and captions of images with names."""

TEXT_IDS = ("gqa", "named")


def write_predictions(path: str | Path, kind: Kind, predictions: Mapping[Any, str]) -> None:
    """Write a list such as ``[{"question_id": 1, "answer": "a dog"}]``, at once or not at all.

    Args:
        predictions: by id: a whole number, but those of GQA and of named images are text.

    Raises:
        InputError: an id is of the wrong kind, or the file cannot be written.
    """
    id_key, text_key = KEYS[kind]
    wrong = [key for key in predictions if not _is_id(kind, key)]
    if wrong:
        raise InputError(f"{_some(wrong, id_key)} cannot be written to {path}, expected {_id_kind(kind)}")
    rows = [{id_key: key, text_key: text} for key, text in predictions.items()]
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, rows, indent=None)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): choose another place") from error


def read_predictions(path: str | Path, kind: Kind, expected: Collection[Id]) -> dict[Any, str]:
    """Predictions by id.

    Args:
        expected: the ids that have to be there, each once, and no others.

    Raises:
        InputError: the file cannot be read, an entry is of another kind, or ids are missing, doubled or unknown.
    """
    id_key, text_key = KEYS[kind]
    rows = read_json(path, 1 << 30, "write the predictions again")
    wanted = f'[{{"{id_key}": {_id_kind(kind)}, "{text_key}": text}}, ...]'
    if not isinstance(rows, list):
        raise InputError(f"{path} holds one {type(rows).__name__}, expected a list {wanted}")
    wrong = [
        number
        for number, row in enumerate(rows)
        if not (isinstance(row, dict) and _is_id(kind, row.get(id_key)) and isinstance(row.get(text_key), str))
    ]
    if wrong:
        first = json.dumps(rows[wrong[0]])
        raise InputError(
            f"{path} has {_some(wrong, 'entry')} of another kind, the first {first[:80]}: expected {wanted}"
        )
    check_ids(str(path), id_key, [row[id_key] for row in rows], expected)
    return {row[id_key]: row[text_key] for row in rows}


def check_ids(source: str, name: str, found: Iterable[Id], expected: Collection[Id]) -> None:
    """Every expected id is there once, and no other.

    Args:
        source, name: what has the ids and what they are called, for the message.

    Raises:
        InputError: the message says how many are doubled, unknown or missing, and the first of them.
    """
    counts, known = Counter(list(found)), frozenset(expected)
    doubled = [key for key, count in counts.items() if count > 1]
    if doubled:
        raise InputError(f"{source} has {_some(doubled, name)} more than once: keep one prediction each")
    unknown = [key for key in counts if key not in known]
    if unknown:
        raise InputError(f"{source} has {_some(unknown, name)} that nobody asked for: is it of another split?")
    missing = [key for key in dict.fromkeys(expected) if key not in counts]
    if missing:
        raise InputError(f"{source} lacks {_some(missing, name)} of {len(known)}: the score needs them all")


def _some(keys: list[Any], name: str) -> str:
    shown = ", ".join(map(repr, keys[:5])) + (", ..." if len(keys) > 5 else "")
    return f"{len(keys)} {name} ({shown})"


def _is_id(kind: Kind, key: object) -> bool:
    return isinstance(key, str) if kind in TEXT_IDS else isinstance(key, int) and not isinstance(key, bool)


def _id_kind(kind: Kind) -> str:
    return "text" if kind in TEXT_IDS else "whole number"

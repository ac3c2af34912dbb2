"""The images that the demo trains on and is tested with."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2.config import DataConfig
from blip2.data.assets import fetch
from blip2.data.records import Records, open_records
from blip2.data.scene_kinds import STAMPS
from blip2.errors import InputError
from blip2.evaluation.scenes import read_rows
from blip2.io import written

log = logging.getLogger("blip2")

HELD_OUT = 0.1
"""Share of a user's own images that are held out."""
QUICK_IMAGES = 48
"""Held-out images of the curves of a quick demo."""
FEWEST_IMAGES = 20
"""A user's own images must be at least this many."""


@dataclass(frozen=True)
class Material:
    """Where the demo finds its images."""

    train: str
    """Captions of stage 1."""
    generation: str
    """Captions of stage 2."""
    questions: str | None
    """Questions with their answers; None where there are none."""
    validation: str
    """Held-out images for the curves of stage 1."""
    generation_validation: str
    """The same for stage 2."""
    questions_validation: str | None
    """The same for training on questions."""
    held_out: Path | None
    """Images with captions for the table of captions and retrieval, as JSONL; None where they cannot be had."""
    scenes: Path | None
    """Folder of the scenes, where the demo is of scenes."""
    credit: str
    """Source and license of the images, for the report."""


def scenes_material(output: Path, quick: bool) -> Material:
    """Scenes, and Tux Paint's held-out stamps to look at: what no training has shown.

    Stamps that scenes are composed of are left out, as training shows some of their cut-outs.

    Args:
        quick: train on few scenes.
    """
    scenes = fetch("scenes-20")
    split, held = ("validation", "test_images") if quick else ("train", "validation")
    descriptions, questions = (str(scenes / f"{split}_{part}.jsonl") for part in ("descriptions", "questions"))
    validation = {part: scenes / f"{held}{part}.jsonl" for part in ("", "_descriptions", "_questions")}
    if quick:
        for part, path in validation.items():
            validation[part] = output / path.name
            _write_rows(validation[part], _read_rows(path)[:QUICK_IMAGES])
    held_out = None
    credit = "OpenMoji, CC BY-SA 4.0"
    try:
        stamps = fetch("tuxpaint-stamps")
    except InputError as error:
        log.info("%s; there is no table of Tux Paint's stamps then", error)
    else:
        shown = {stamp for names in STAMPS.values() for stamp in names}
        held_out = output / "stamps.jsonl"
        _write_rows(held_out, [row for row in _read_rows(stamps / "held_out.jsonl") if row["key"] not in shown])
        credit = "Tux Paint stamps, GPL-2, by Bill Kendrick and contributors"
    return Material(
        str(scenes / f"{split}.jsonl"),
        descriptions,
        questions,
        str(validation[""]),
        str(validation["_descriptions"]),
        str(validation["_questions"]),
        held_out,
        scenes,
        credit,
    )


def own_material(source: str, output: Path) -> Material:
    """A user's own images with captions: nine tenths are trained on, one tenth is held out.

    Which images are held out depends on their names or contents alone.

    Args:
        source: a folder or table, as ``data.train`` of a recipe may say.

    Raises:
        InputError: the source cannot be read, is a stream, or has too few images with a caption.
    """
    records = open_records(source, DataConfig(train=source, streaming=False))
    if not isinstance(records, Records):
        raise InputError(f"--data {source} is a stream, expected a folder or a table of images with captions")
    if records.holds_images:
        raise InputError(
            f"--data {source} holds its images inside the table, expected image files: give a folder of images with a"
            " .txt beside each, or a table with their paths"
        )
    rows: list[dict[str, object]] = []
    for record in records:
        if isinstance(record.image, str) and record.captions:
            rows.append({"image": str(Path(record.image).resolve()), "captions": list(record.captions)})
    if len(rows) < FEWEST_IMAGES:
        raise InputError(f"--data {source} has {len(rows)} images with a caption, expected at least {FEWEST_IMAGES}")
    ranked = sorted(rows, key=lambda row: hashlib.sha256(str(row["image"]).encode()).digest())
    count = max(2, round(HELD_OUT * len(rows)))
    held_out, train = output / "held_out.jsonl", output / "train.jsonl"
    _write_rows(held_out, ranked[:count])
    _write_rows(train, ranked[count:])
    train_on, measure_on = str(train), str(held_out)
    return Material(train_on, train_on, None, measure_on, measure_on, None, held_out, None, f"your images, {source}")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Read rows that are to be written elsewhere: their images get absolute paths."""
    return [row | {"image": str(path.parent / row["image"])} for row in read_rows(path)]


def _write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())

"""The images that the demo trains on and is tested with."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from blip2.config import DataConfig
from blip2.data.assets import fetch
from blip2.data.records import Records, open_records
from blip2.data.scene_kinds import STAMPS
from blip2.errors import InputError
from blip2.files import written

log = logging.getLogger("blip2")

HELD_OUT = 0.1
"""Share of a user's own images that are held out."""
TUXPAINT_SHARE = 0.1
"""Weight of Tux Paint's stamps beside that of the scenes' captions, 1."""
QUESTIONS_SHARE = 0.5
"""Weight of the scenes' questions beside that of their captions, 1, in stage 2."""
FEWEST_IMAGES = 20
"""A user's own images must be at least this many."""


@dataclass(frozen=True)
class Material:
    """Where the demo finds its images."""

    train: dict[str, float | None]
    """Sources of stage 1 with their weights."""
    generation: dict[str, float | None]
    """Sources of stage 2: the same, and questions where there are any."""
    validation: str
    """Held-out images for the curves of stage 1."""
    generation_validation: str
    """The same for stage 2."""
    held_out: Path
    """Images with captions for the table of captions and retrieval, as JSONL."""
    scenes: Path | None
    """Folder of the scenes, where the demo is of scenes."""
    credit: str
    """Source and license of the images, for the report."""

    @property
    def group_column(self) -> str | None:
        return "group" if self.scenes is not None else None


def scenes_material(output: Path, quick: bool) -> Material:
    """Scenes, with a share of Tux Paint's stamps for the second table.

    The stamps that scenes are composed of are left out: they would show the held-out stamps and cut-outs in training.

    Args:
        quick: train on few scenes.
    """
    scenes = fetch("scenes-20")
    split, held = ("validation", "test_images") if quick else ("train", "validation")
    captions, descriptions, questions = (
        scenes / f"{split}{part}.jsonl" for part in ("", "_descriptions", "_questions")
    )
    try:
        stamps = fetch("tuxpaint-stamps")
    except InputError as error:
        log.info("%s; there is no table of Tux Paint's stamps then", error)
        stamps = None
    train: dict[str, float | None] = {str(captions): 1.0}
    generation: dict[str, float | None] = {str(descriptions): 1.0, str(questions): QUESTIONS_SHARE}
    held_out = scenes / "test_images.jsonl"
    credit = "OpenMoji, CC BY-SA 4.0"
    if stamps is not None:
        shown = {stamp for names in STAMPS.values() for stamp in names}
        for part in ("train", "held_out"):
            lines = (stamps / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [row for row in map(json.loads, lines) if row["key"] not in shown]
            _write_rows(output / f"{part}_stamps.jsonl", [row | {"image": str(stamps / row["image"])} for row in rows])
        train_stamps, held_out = (str(output / f"{part}_stamps.jsonl") for part in ("train", "held_out"))
        train[train_stamps] = generation[train_stamps] = TUXPAINT_SHARE
        credit = "Tux Paint stamps, GPL-2, by Bill Kendrick and contributors"
    return Material(
        train,
        generation,
        str(scenes / f"{held}.jsonl"),
        str(scenes / f"{held}_descriptions.jsonl"),
        Path(held_out),
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
    sources: dict[str, float | None] = {str(train): None}
    return Material(sources, sources, str(held_out), str(held_out), held_out, None, f"your images, {source}")


def _write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())

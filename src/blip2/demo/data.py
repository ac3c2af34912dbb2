"""The training and evaluation data of the demo."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from blip2.config import DataConfig
from blip2.data.assets import fetch
from blip2.data.images import ImageError, read_image
from blip2.data.records import Records
from blip2.data.scene_kinds import STAMPS
from blip2.data.sources import open_records
from blip2.errors import InputError
from blip2.evaluation.scenes import read_rows
from blip2.io import atomic_write

log = logging.getLogger("blip2")

HELD_OUT = 0.1
"""Share of a user's images that are held out."""
QUICK_IMAGES = 48
"""Number of validation images, questions and near twins in a quick demo."""
VALIDATION_QUESTIONS = 240
"""Number of validation questions in a full demo: more would take as long as training."""
MIN_IMAGES = 20
"""Minimum number of a user's images."""


@dataclass(frozen=True)
class DemoData:
    """Data sources of the demo: values of ``data.train`` and ``data.validation``, and files for the evaluation."""

    train: str
    """Captions for both stages."""
    twins: str | None
    """Captions of near twins, for the end of stage 1; None for a user's images."""
    questions: str | None
    """Questions with answers, for the fine-tuning; None for a user's images."""
    validation: str
    """Held-out captions for the validation curves of both stages."""
    questions_validation: str | None
    """Held-out questions for the validation curves of the fine-tuning; None for a user's images."""
    held_out: Path | None
    """JSONL file of held-out images with captions, for the evaluation of captions and retrieval; None if Tux Paint's
    stamps cannot be downloaded."""
    scenes: Path | None
    """Folder of the scenes data set; None for a user's images."""
    credit: str
    """Source and license of the images, for the report."""
    digest: str | None = None
    """A digest of a user's images and captions by which a change is noticed; None for the scenes."""


def scenes_data(output: Path, quick: bool) -> DemoData:
    """Return the data of a demo that trains on ``package:scenes-pairs`` and is also evaluated on Tux Paint's stamps.

    Stamps that are cut-outs of scenes are left out of the evaluation, because training shows them. If the stamps
    cannot be downloaded, ``held_out`` is None.

    Args:
        output: folder for the files of the demo.
        quick: train on the validation split, which is smaller than the training split.

    Raises:
        InputError: the cut-outs of the scenes cannot be downloaded.
    """
    scenes = fetch("scenes-pairs")
    split, held = ("validation", "test_images") if quick else ("train", "validation")
    twins = scenes / "train_twins.jsonl"
    validation = {part: scenes / f"{held}{part}.jsonl" for part in ("", "_questions")}
    counts = {"": QUICK_IMAGES, "_questions": QUICK_IMAGES} if quick else {"_questions": VALIDATION_QUESTIONS}
    validation |= {part: _head(validation[part], output, count) for part, count in counts.items()}
    if quick:
        twins = _head(twins, output, QUICK_IMAGES)
    held_out = None
    credit = "OpenMoji, CC BY-SA 4.0"
    try:
        stamps = fetch("tuxpaint-stamps")
    except InputError as error:
        log.info("%s; the evaluation on Tux Paint's stamps is skipped", error)
    else:
        shown = {stamp for names in STAMPS.values() for stamp in names}
        held_out = output / "stamps.jsonl"
        _write_rows(held_out, [row for row in _read_rows(stamps / "held_out.jsonl") if row["key"] not in shown])
        credit = "Tux Paint stamps, GPL-2, by Bill Kendrick and contributors"
    return DemoData(
        str(scenes / f"{split}.jsonl"),
        str(twins),
        str(scenes / f"{split}_questions.jsonl"),
        str(validation[""]),
        str(validation["_questions"]),
        held_out,
        scenes,
        credit,
    )


def user_data(source: str, output: Path) -> DemoData:
    """Split a user's images with captions: nine tenths for training, one tenth held out.

    The split depends only on the paths of the images. All captions of an image are on one side. Images that cannot be
    decoded are not held out, because the evaluation needs every held-out image; training skips and names them.

    Args:
        source: a value of ``data.train``: a folder of images with captions, or a table with paths of images.
        output: folder for the files of the demo.

    Raises:
        InputError: the source cannot be read, is a stream, contains the bytes of the images, or has fewer than
            :data:`MIN_IMAGES` images with a caption, or fewer than two that can be decoded.
    """
    records = open_records(source, DataConfig(train=source, streaming=False))
    if not isinstance(records, Records):
        raise InputError(
            f"--data {source} is a stream, expected images with captions on disk: give a folder of images with a .txt"
            " file for each image, or a table with the paths of the images"
        )
    if records.has_embedded_images:
        raise InputError(
            f"--data {source} contains the bytes of the images, expected image files: give a folder of images with a"
            " .txt file for each image, or a table with the paths of the images"
        )
    captions: dict[str, list[str]] = {}
    for record in records:
        if isinstance(record.image, str) and record.captions and record.skip_reason is None:
            captions.setdefault(os.path.realpath(record.image), []).extend(record.captions)
    if len(captions) < MIN_IMAGES:
        raise InputError(
            f"--data {source} has {len(captions)} images with a caption, expected at least {MIN_IMAGES}: add images or"
            " captions"
        )
    ranked = sorted(captions, key=lambda image: hashlib.sha256(image.encode(errors="surrogatepass")).digest())
    held = list(islice(filter(_can_be_decoded, ranked), max(2, round(HELD_OUT * len(ranked)))))
    if len(held) < 2:
        raise InputError(
            f"--data {source} has {len(held)} images that can be decoded, expected more: correct the files"
        )
    held_out, train = output / "held_out.jsonl", output / "train.jsonl"
    rows: dict[str, dict[str, object]] = {image: {"image": image, "captions": captions[image]} for image in ranked}
    _write_rows(held_out, [rows.pop(image) for image in held])
    _write_rows(train, list(rows.values()))
    content = held_out.read_bytes() + train.read_bytes()
    digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    return DemoData(str(train), None, None, str(held_out), None, held_out, None, f"your images, {source}", digest)


def _can_be_decoded(image: str) -> bool:
    try:
        read_image(image)
    except ImageError as error:
        log.warning("%s; it is not held out", error)
        return False
    return True


def _head(path: Path, output: Path, count: int) -> Path:
    """Write the first `count` rows of a file to the folder `output`, and return the new file."""
    _write_rows(output / path.name, _read_rows(path)[:count])
    return output / path.name


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file, and prepend the folder of the file to the paths of the images."""
    return [row | {"image": str(path.parent / row["image"])} for row in read_rows(path)]


def _write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())

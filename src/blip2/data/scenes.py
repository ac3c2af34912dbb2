"""A synthetic data set of scenes: cut-outs on colored backgrounds with captions, questions and near twins.

The kinds, relations, counts and sizes of the objects in every image are known, and some combinations never occur in
training. :mod:`blip2.data.assets` provides the data set as ``package:scenes``.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from blip2.data.scene_facts import Facts, parse_caption, score_caption
from blip2.data.scene_images import (
    IMAGE_SIZE,
    Cutout,
    Placement,
    draw_background,
    draw_scene,
    encode_jpeg,
    place_objects,
    read_cutouts,
)
from blip2.data.scene_kinds import COLORS
from blip2.data.scene_plans import GROUP_SIZE, TYPE_PROBABILITIES, Planner, Scene
from blip2.data.scene_texts import (
    Question,
    Truth,
    YesNoQuestions,
    describe,
    make_questions,
    write_captions,
    write_twins,
)
from blip2.data.shards import ShardWriter
from blip2.errors import InputError

__all__ = ["Facts", "Truth", "make_scenes", "parse_caption", "score_caption"]

log = logging.getLogger("blip2")

SPLITS = ("train", "validation", "test_images", "test_compositions", "test_cutouts", "twins", "train_twins")
REUSED_GROUPS = 1000
"""Number of groups of training images that determine the combinations of kinds in validation, test_images and
test_cutouts. The number is fixed, so that these splits do not change when the training split grows."""
LOG_EVERY = 1000
"""Number of images between log messages."""
CARD = "README.md"
LICENSE = "LICENSE"

Row = dict[str, Any]


@dataclass(frozen=True)
class _Group:
    """One scene, or several that are near twins."""

    number: int
    scenes: Sequence[Scene]
    twin_type: str = ""


@dataclass
class _SplitRows:
    """Rows of the files of a split."""

    records: list[Row] = field(default_factory=list)
    questions: list[Row] = field(default_factory=list)
    descriptions: list[Row] = field(default_factory=list)


def _rng(seed: int, split: str, *numbers: int) -> np.random.Generator:
    """Return the random number generator for a split and further numbers, such as that of a group and of an image."""
    return np.random.default_rng([seed, SPLITS.index(split), *numbers])


# -- content of the splits -----------------------------------------------------------------------------------------


def _training(planner: Planner, seed: int, images: int, group_size: int, split: str = "train") -> Iterator[_Group]:
    for number in range(-(-images // group_size)):
        rng = _rng(seed, split, number)
        base = planner.draw(rng)
        members = [base, *planner.variants(base, rng)] if group_size > 1 else [base]
        yield _Group(number, members[: min(group_size, images - number * group_size)])


def _groups(planner: Planner, split: str, seed: int, images: int, train: int, group_size: int) -> Iterator[_Group]:
    """Yield the groups of a split; for twins, `images` is the number of pairs."""
    if split in ("train", "train_twins"):
        yield from _training(planner, seed, images, GROUP_SIZE if split == "train_twins" else group_size, split)
        return
    first = _training(planner, seed, min(train, REUSED_GROUPS * group_size), group_size)
    seen = [scene for group in first for scene in group.scenes]
    for number in range(images):
        rng = _rng(seed, split, number)
        if split == "twins":
            twin_type = planner.twin_types[number % len(planner.twin_types)]
            yield _Group(number, planner.twins(twin_type, rng), twin_type)
        elif split == "test_compositions":
            yield _Group(number, [planner.held_out(rng, count=number % 6 == 5 and "count" in planner.types)])
        elif split == "test_cutouts":
            yield _Group(number, [planner.vary(_with_held_cutouts(planner, seen, rng), rng, held_out_cutouts=True)])
        else:
            yield _Group(number, [planner.vary(seen[int(rng.integers(len(seen)))], rng)])


def _with_held_cutouts(planner: Planner, seen: Sequence[Scene], rng: np.random.Generator) -> Scene:
    """Draw one of the scenes in `seen` whose kinds all have a held-out cut-out.

    A type is drawn first. If there are candidates of this type, one of them is drawn, otherwise one of any type.

    Raises:
        InputError: there are no candidates.
    """
    candidates = [scene for scene in seen if all(kind in planner.held_out_cutouts for kind in scene.kinds)]
    type = planner.draw_type(rng)
    candidates = [scene for scene in candidates if scene.type == type] or candidates
    if not candidates:
        raise InputError(
            f"none of the first {len(seen)} training images shows only kinds that have a held-out cut-out, expected at"
            " least one: increase train"
        )
    return candidates[int(rng.integers(len(candidates)))]


# -- writing -------------------------------------------------------------------------------------------------------


def _draw(scene: Scene, placement: Placement, seed: int, split: str, group: int, member: int) -> tuple[Truth, bytes]:
    """Draw the image of a scene; return the truth and the JPEG file."""
    cutouts, flips = scene.cutouts[: scene.num_objects], scene.flips[: scene.num_objects]
    sizes = [cutout.image.size for cutout in cutouts]
    rng = _rng(seed, split, group, 1, member)
    boxes = place_objects(
        sizes, scene.scales[: scene.num_objects], scene.type, scene.relation, scene.size, placement, rng
    )
    background = draw_background(scene.color, scene.texture, _rng(seed, split, group, 2))
    image = draw_scene(background, [cutout.image for cutout in cutouts], flips, boxes)
    truth = Truth(
        scene.type, scene.color, scene.texture, scene.kinds, scene.relation, scene.count, scene.size,
        tuple(cutout.name for cutout in cutouts), tuple(boxes),
    )  # fmt: skip
    return truth, encode_jpeg(image)


def _write_split(
    planner: Planner,
    folder: Path,
    split: str,
    seed: int,
    images: int,
    train: int,
    group_size: int,
    varied_captions: bool,
    done: Counter[str],
) -> _SplitRows:
    (folder / "images" / split).mkdir(parents=True)
    out = _SplitRows()
    yes_no, asked = YesNoQuestions(planner.allowed_counts), list[Question]()
    for group in _groups(planner, split, seed, images, train, group_size):
        placement = Placement.draw(_rng(seed, split, group.number, 0))
        truths = []
        for member, scene in enumerate(group.scenes):
            truth, file = _draw(scene, placement, seed, split, group.number, member)
            truths.append(truth)
            number = len(out.records)
            name = f"images/{split}/{number:05}.jpg"
            (folder / name).write_bytes(file)
            rng = _rng(seed, split, group.number, 3, member)
            row = {
                "image": name,
                "captions": write_captions(truth, rng) if varied_captions else [describe(truth)],
                "key": f"{split}-{number:05}",
                "group": f"{split}-group-{group.number:05}",
                "truth": truth.to_json(),
            }
            out.records.append(row)
            if not group.twin_type:
                out.descriptions.append({"image": name, "caption": describe(truth), "key": row["key"]})
                asked += [*make_questions(truth, number, rng), *yes_no.make(truth, number, rng)]
            done["images"] += 1
            if done["images"] % LOG_EVERY == 0:
                log.info("%d of %d images are drawn", done["images"], done["all"])
        if group.twin_type:
            captions = [describe(truth) for truth in truths]
            if varied_captions:
                rng = _rng(seed, split, group.number, 4)
                captions = write_twins((truths[0], truths[1]), group.twin_type, rng)
            for row, caption in zip(out.records[-2:], captions, strict=True):
                row |= {"captions": [caption], "twin_type": group.twin_type}
    unpaired = yes_no.unpaired()
    for number, question in enumerate(question for question in asked if question not in unpaired):
        out.questions.append(
            {
                "image": out.records[question.image]["image"],
                "question": question.question,
                "answers": [question.answer],
                "question_type": question.type,
                "about": question.fact,
                "key": f"{split}-question-{number:06}",
            }
        )
    return out


def make_scenes(
    output: Path,
    seed: int = 0,
    train: int = 4000,
    validation: int = 200,
    test_images: int = 240,
    test_compositions: int = 240,
    test_cutouts: int = 240,
    twins: int = 200,
    shards: int | None = None,
    cutouts: Path | None = None,
    kinds: Sequence[str] | None = None,
    about: str = "",
    group_size: int = GROUP_SIZE,
    types: Sequence[str] = tuple(TYPE_PROBABILITIES),
    varied_captions: bool = True,
    textured: bool = True,
    cutouts_per_kind: int | None = None,
    train_twins: int = 0,
) -> dict[str, int]:
    """Write a data set of scenes.

    The same cut-outs, seed and versions of Pillow and NumPy give the same files. If a split is made larger, its first
    images stay the same.

    Args:
        output: folder to create.
        seed: random seed; another seed gives another data set.
        train: number of training images.
        validation, test_images, test_compositions, test_cutouts: numbers of images in these splits.
        twins: number of pairs of images in the split twins.
        shards: also write the training images as this number of WebDataset shards. None: no shards.
        cutouts: folder with one subfolder of PNG files with a transparent background for each kind of object. A LICENSE
            file next to the subfolders is copied to the output. None: the cut-outs of package:scenes.
        kinds: names of the kinds of objects to show. None: all that have cut-outs.
        about: a sentence that names the source of the cut-outs, for the data card. Empty: a sentence that names the
            folder of the cut-outs. Unused if `cutouts` is None.
        group_size: number of near twins per group of training images, 1 to 4. With 1, the same number of images shows
            more different scenes.
        types: types of scenes to draw: ``pair`` and optionally ``count``, ``single`` and ``triple``.
        varied_captions: write four captions per image in different sentence patterns. False: write one caption per
            image, in the pattern of the descriptions.
        textured: half of the images have textured backgrounds. False: all backgrounds are plain.
        cutouts_per_kind: maximum number of cut-outs of each kind that all splits but ``test_cutouts`` show. None: all.
        train_twins: number of training images in a further split, ``train_twins``, in groups of four near twins. 0: no
            such split.

    Returns:
        The number of rows in each JSONL file, by the name of the file.

    Raises:
        InputError: `output` exists and is not an empty folder, the cut-outs cannot be used, or a number is out of
            range.
    """
    sizes = (train, validation, test_images, test_compositions, test_cutouts, twins, train_twins)
    numbers = dict(zip(SPLITS, sizes, strict=True))
    if train_twins == 0:
        del numbers["train_twins"]
    if not 1 <= group_size <= GROUP_SIZE:
        raise InputError(f"group_size is {group_size}, expected 1 to {GROUP_SIZE}: choose such a number")
    for name, number in numbers.items():
        if number < (GROUP_SIZE if name == "train" else 1):
            raise InputError(
                f"{name} is {number}, expected {GROUP_SIZE if name == 'train' else 1} or more: increase it"
            )
    groups = -(-train // group_size)
    if shards is not None and not 1 <= shards <= groups:
        raise InputError(
            f"shards is {shards}, expected 1 to {groups}, the number of groups of training images: choose such a number"
        )
    if seed < 0:
        raise InputError(f"seed is {seed}, expected 0 or more: choose such a seed")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists and is not an empty folder: choose another output, or delete this one")
    if cutouts is None:
        from blip2.data.assets import fetch_cutouts  # circular import

        cutouts, about = fetch_cutouts()
    shown = read_cutouts(cutouts, kinds)
    planner = Planner(shown, types, textured, cutouts_per_kind)
    output.mkdir(parents=True, exist_ok=True)
    done = Counter(all=sum(numbers.values()) + twins)
    rows: dict[str, int] = {}
    texts: list[str] = []
    for split, number in numbers.items():
        written = _write_split(planner, output, split, seed, number, train, group_size, varied_captions, done)
        files = {
            split: written.records,
            f"{split}_questions": written.questions,
            f"{split}_descriptions": written.descriptions,
        }
        for name, part in files.items():
            if part:
                rows[f"{name}.jsonl"] = len(part)
                lines = "".join(json.dumps(row) + "\n" for row in part)
                (output / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        texts.append(_split_table(split, written))
        if split == "train" and shards:
            _write_shards(output, written.records, shards, group_size)
    if (cutouts / LICENSE).is_file():
        shutil.copyfile(cutouts / LICENSE, output / LICENSE)
    (output / CARD).write_text(
        _card(shown, planner, seed, texts, about or f"The cut-outs come from {cutouts}."), encoding="utf-8"
    )
    return rows


def _write_shards(folder: Path, records: Sequence[Row], shards: int, group_size: int) -> None:
    """Write tar files of ``KEY.jpg`` and ``KEY.json``. All images of a group are in the same tar file."""
    (folder / "shards").mkdir()
    bounds = np.linspace(0, -(-len(records) // group_size), shards + 1).round().astype(int) * group_size
    for number, (start, end) in enumerate(pairwise(bounds)):
        with (folder / "shards" / f"train-{number:05}.tar").open("wb") as file:
            shard = ShardWriter(file)
            for row in records[start:end]:
                metadata = {name: value for name, value in row.items() if name != "image"}
                shard.add(row["key"], "jpg", (folder / row["image"]).read_bytes(), metadata)
            shard.close()


# -- the data card -------------------------------------------------------------------------------------------------


def _split_table(split: str, written: _SplitRows) -> str:
    types = Counter(row["truth"]["type"] for row in written.records)
    asked = Counter(row["question_type"] for row in written.questions)
    cells = [", ".join(f"{n} {name}" for name, n in sorted(counter.items())) or "none" for counter in (types, asked)]
    return f"| `{split}.jsonl` | {len(written.records)} | {cells[0]} | {len(written.questions)} | {cells[1]} |"


def _card(
    kinds: Mapping[str, tuple[Cutout, ...]], planner: Planner, seed: int, splits: Sequence[str], about: str
) -> str:
    """Return the data card in Markdown."""
    counts = ", ".join(f"{kind} ({len(kinds[kind])})" for kind in planner.kinds)
    pairs = len(planner.kinds) * (len(planner.kinds) - 1) // 2
    side = IMAGE_SIZE
    num_pairs, num_counts = len(planner.held_out_pairs), len(planner.held_out_counts)
    return f"""# Scenes

Made images of {side} x {side} pixels: cut-outs on a background of one color, with captions, questions and the exact
truth. {about} Seed {seed}.

| file | images | types | questions | types of questions |
|---|---|---|---|---|
{chr(10).join(splits)}

Colors of backgrounds: {", ".join(COLORS)}.

{len(planner.kinds)} kinds, with the number of their cut-outs: {counts}.

Held out from training: {num_pairs} of {pairs} pairs of kinds, {num_counts} counts of a
kind, and one cut-out of each of {len(planner.held_out_cutouts)} kinds.
"""

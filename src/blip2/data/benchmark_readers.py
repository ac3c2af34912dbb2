"""Readers of the files that publishers of data sets give out, as their archives unpack.

Each gives rows in the order of its file. Texts are as they stand there. Files are read entry by entry; what has to be
held are the captions of a file in COCO's format and the answers of VQAv2 and OK-VQA.

Pictures are not opened. Their folder is listed once, before the first row, and a picture that is not in it is an error
at its row.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from blip2.data.cells import CAPTION_COLUMNS, CellError, read_texts
from blip2.data.json_stream import entries, fields, stream_json
from blip2.data.shards import BROKEN, KEY, read_shard
from blip2.errors import InputError

log = logging.getLogger("blip2")

Row = dict[str, Any]

VALIDATION_TENTH = 9
"""Of easy-VQA's training images, those whose id ends with this digit are its validation split."""


class Pictures:
    """A folder of pictures, listed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names = frozenset(path.name for path in folder.iterdir())

    def path(self, name: str, image_id: int | str) -> str:
        """Where a picture lies.

        Raises:
            InputError: it is not in the folder.
        """
        if name not in self._names:
            raise InputError(
                f"image {image_id} has no file {self.folder / name} ({len(self._names)} others are there): unpack the"
                " pictures again, completely"
            )
        return str(self.folder / name)


# -- captions ------------------------------------------------------------------------------------------------------


def read_coco(split: str, annotations: Path, pictures: Pictures) -> Iterator[Row]:
    """COCO's own captions."""
    return _captions(annotations, pictures, "coco")


def read_nocaps(split: str, annotations: Path, pictures: Pictures) -> Iterator[Row]:
    """NoCaps, which has COCO's format and a domain for each image."""
    return _captions(annotations, pictures, "nocaps")


def _captions(annotations: Path, pictures: Pictures, images: str) -> Iterator[Row]:
    rows: dict[Any, Row] = {}
    captions: list[tuple[Any, str]] = []
    for name, entry in stream_json(annotations):
        if name == "images":
            image_id, file = fields(annotations, entry, "id", "file_name")
            rows[image_id] = {"image": file, "image_id": image_id, "image_key": f"{images}/{image_id}", "captions": []}
            rows[image_id] |= {"domain": entry["domain"]} if "domain" in entry else {}
        elif name == "annotations":
            captions.append(fields(annotations, entry, "image_id", "caption"))
    if not rows or not captions:
        raise InputError(f"{annotations} has no {'captions' if rows else 'images'}: it is a file of another kind")
    for image_id, caption in captions:
        if image_id not in rows:
            raise InputError(f"{annotations} has a caption of image {image_id}, which is not among its images")
        rows[image_id]["captions"].append(caption)
    for image_id, row in rows.items():
        if not row["captions"]:
            raise InputError(f"{annotations} has no caption of image {image_id}: download it again")
        yield row | {"image": pictures.path(row["image"], image_id)}


def read_karpathy_coco(split: str, annotations: Path, pictures: Pictures) -> Iterator[Row]:
    """COCO as Karpathy split it."""
    for entry in entries(annotations, "images"):
        names = ("split", "filepath", "filename", "cocoid", "sentences")
        part, folder, file, image_id, sentences = fields(annotations, entry, *names)
        if part != split:
            continue
        if folder != pictures.folder.name:
            raise InputError(f"{annotations} has image {image_id} of {split} in {folder}, expected COCO's own split")
        yield {
            "image": pictures.path(file, image_id),
            "image_id": image_id,
            "image_key": f"coco/{image_id}",
            "captions": [sentence["raw"] for sentence in sentences],
        }


def read_flickr30k(split: str, annotations: Path, pictures: Pictures) -> Iterator[Row]:
    """Flickr30K: as Karpathy split it, or all of it from its own file of captions."""
    captions = _token_file(annotations) if split == "all" else _karpathy_flickr30k(split, annotations)
    for file, sentences in captions:
        image_id = file.removesuffix(".jpg")
        yield {
            "image": pictures.path(file, image_id),
            "image_id": image_id,
            "image_key": f"flickr30k/{image_id}",
            "captions": sentences,
        }


def _karpathy_flickr30k(split: str, path: Path) -> Iterator[tuple[str, list[str]]]:
    for entry in entries(path, "images"):
        part, file, sentences = fields(path, entry, "split", "filename", "sentences")
        if "cocoid" in entry:
            raise InputError(f"{path} holds COCO's images, expected Flickr30K's: it is a file of another data set")
        if part == split:
            yield file, [sentence["raw"] for sentence in sentences]


def _token_file(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Lines of an image's file, ``#`` and a number, a tab and a caption."""
    captions: dict[str, list[str]] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            line = line.rstrip("\n")
            name, tab, caption = line.partition("\t")
            image, sign, _ = name.rpartition("#")
            if not tab or not sign:
                raise InputError(f"{path} line {number} is {line[:60]!r}, expected FILE.jpg#0, a tab and a caption")
            captions.setdefault(image, []).append(caption)
    yield from captions.items()


def read_regions(
    split: str, annotations: Path, images: Path, first: Pictures, second: Pictures
) -> Iterator[Row]:  # fmt: skip
    """Visual Genome's region descriptions: one row an image, its captions are those of its regions.

    An image without regions gives no row.
    """
    known = _visual_genome_images(images)
    for _, entry in stream_json(annotations):
        image_id, regions = _of_image(annotations, entry, "regions")
        captions = [fields(annotations, region, "phrase")[0] for region in regions]
        if captions:
            yield _visual_genome_row(image_id, known, images, (first, second)) | {"captions": captions}


# -- questions -----------------------------------------------------------------------------------------------------


class _Annotation(NamedTuple):
    image_id: int
    question_type: str
    answer_type: str
    answers: tuple[str, ...]
    raw_answers: tuple[str, ...]
    """OK-VQA's before stemming; empty elsewhere."""


def read_vqav2(split: str, questions: Path, pictures: Pictures, annotations: Path | None = None) -> Iterator[Row]:
    """VQAv2; the splits without annotations give rows without answers."""
    return _questions(questions, pictures, annotations, "VQAv2")


def read_ok_vqa(split: str, questions: Path, pictures: Pictures, annotations: Path) -> Iterator[Row]:
    """OK-VQA: ``answers`` are stemmed, which is what its evaluation compares with; ``raw_answers`` are not."""
    return _questions(questions, pictures, annotations, "OK-VQA")


def _questions(path: Path, pictures: Pictures, annotations: Path | None, data_set: str) -> Iterator[Row]:
    subset = pictures.folder.name  # train2014, val2014, test2015
    known = _annotations(annotations, subset, data_set) if annotations else {}
    first = True
    for entry in entries(path, "questions", subset if annotations else None):
        question, number, image_id = fields(path, entry, "question", "question_id", "image_id")
        if first and data_set == "VQAv2":
            _refuse_version_1(path, number, image_id)
        first = False
        row = {
            "image": pictures.path(f"COCO_{subset}_{image_id:0>12}.jpg", image_id),
            "image_id": image_id,
            "image_key": f"coco/{image_id}",
            "question": question,
            "question_id": number,
        }
        if annotations:
            annotation = known.pop(number, None)
            if annotation is None:
                raise InputError(
                    f"question {number} of {path} has no annotation in {annotations}: they are of different splits or"
                    " data sets"
                )
            if annotation.image_id != image_id:
                raise InputError(
                    f"question {number} is about image {image_id} in {path}, but image {annotation.image_id} in"
                    f" {annotations}: they are of different data sets"
                )
            row |= {"question_type": annotation.question_type, "answer_type": annotation.answer_type}
            row["answers"] = list(annotation.answers)
            row |= {"raw_answers": list(annotation.raw_answers)} if annotation.raw_answers else {}
        yield row
    if known:
        raise InputError(
            f"{annotations} has {len(known)} annotations without a question in {path} (the first: question"
            f" {next(iter(known))}): they are of different splits or data sets"
        )


def _annotations(path: Path, subset: str, data_set: str) -> dict[int, _Annotation]:
    found: dict[int, _Annotation] = {}
    for entry in entries(path, "annotations", subset):
        names = ("question_id", "image_id", "question_type", "answer_type", "answers")
        number, image_id, question_type, answer_type, answers = fields(path, entry, *names)
        if not answers:
            raise InputError(f"question {number} has no answers in {path}: download it again")
        if number in found:
            raise InputError(f"question {number} has two annotations in {path}: download it again")
        fields(path, answers[0], "answer")
        raw = "raw_answer" in answers[0]  # only OK-VQA's have it
        if raw != (data_set == "OK-VQA"):
            other = "OK-VQA" if raw else "VQA"
            raise InputError(f"{path} holds answers of {other}, expected {data_set}: it is a file of another data set")
        if not found and data_set == "VQAv2":
            _refuse_version_1(path, number, image_id)
        found[number] = _Annotation(
            image_id,
            sys.intern(question_type),
            sys.intern(answer_type),
            tuple(sys.intern(answer["answer"]) for answer in answers),
            tuple(sys.intern(answer["raw_answer"]) for answer in answers) if raw else (),
        )
    return found


def _refuse_version_1(path: Path, number: Any, image_id: Any) -> None:
    if str(number)[:-3] != str(image_id):  # three digits behind the image's number; VQAv1 has one
        raise InputError(
            f"{path} numbers a question of image {image_id} {number}, expected {image_id}000 to {image_id}999: it is a"
            " file of VQAv1 or another data set"
        )


def read_gqa(split: str, questions: Path, pictures: Pictures) -> Iterator[Row]:
    """GQA's balanced questions; ``question_type`` is their structural type."""
    for number, entry in stream_json(questions):
        question, image_id, answer = fields(questions, entry, "question", "imageId", "answer")
        row = {
            "image": pictures.path(f"{image_id}.jpg", image_id),
            "image_id": image_id,
            "image_key": f"{'visual-genome' if str(image_id).isdecimal() else 'gqa'}/{image_id}",
            "question": question,
            "question_id": number,
            "answers": [answer],
        }
        yield row | ({"question_type": entry["types"]["structural"]} if "types" in entry else {})


def read_visual_genome_questions(
    split: str, annotations: Path, images: Path, first: Pictures, second: Pictures
) -> Iterator[Row]:  # fmt: skip
    """Visual Genome's questions, one answer each."""
    known = _visual_genome_images(images)
    for _, entry in stream_json(annotations):
        image_id, questions = _of_image(annotations, entry, "qas")
        for each in questions:
            question, number, answer = fields(annotations, each, "question", "qa_id", "answer")
            row = _visual_genome_row(image_id, known, images, (first, second))
            yield row | {"question": question, "question_id": number, "answers": [answer]}


def _of_image(path: Path, entry: Any, name: str) -> tuple[int, list[Any]]:
    """An image's number, which is called ``id`` or ``image_id`` by the version of the file, and what it has."""
    number = "image_id" if isinstance(entry, dict) and "image_id" in entry else "id"
    image_id, values = fields(path, entry, number, name)
    return image_id, values


def _visual_genome_images(path: Path) -> dict[int, tuple[str, str, int | None]]:
    """Of each image its folder, its file, and its number in COCO where it comes from there."""
    found = {}
    for _, entry in stream_json(path):
        image_id, url, coco_id = fields(path, entry, "image_id", "url", "coco_id")
        folder, file = url.split("/")[-2:]
        found[image_id] = sys.intern(folder), file, coco_id
    return found


def _visual_genome_row(
    image_id: int, known: dict[int, tuple[str, str, int | None]], path: Path, folders: tuple[Pictures, Pictures]
) -> Row:
    if image_id not in known:
        raise InputError(f"image {image_id} is not in {path}: the files are of different versions")
    folder, file, coco_id = known[image_id]
    pictures = next((each for each in folders if each.folder.name == folder), None)
    if pictures is None:
        raise InputError(f"{path} has image {image_id} in {folder}, expected VG_100K or VG_100K_2")
    key = f"visual-genome/{image_id}"
    return {"image": pictures.path(file, image_id), "image_id": image_id, "image_key": key, "coco_id": coco_id}


def read_easy_vqa(split: str, questions: Path, pictures: Pictures) -> Iterator[Row]:
    """easy-VQA. It has no validation split: val is a tenth of its training images, and train the others."""
    part = questions.parent.name
    for number, (_, entry) in enumerate(stream_json(questions)):
        if not isinstance(entry, list) or len(entry) != 3:
            raise InputError(f"{questions} entry {number} is {entry!r}, expected a question, an answer and an image")
        question, answer, image_id = entry
        if part == "test" or (split == "val") == (image_id % 10 == VALIDATION_TENTH):
            yield {
                "image": pictures.path(f"{image_id}.png", image_id),
                "image_id": image_id,
                "image_key": f"easy-vqa/{part}/{image_id}",
                "question": question,
                "question_id": number,
                "answers": [answer],
            }


# -- pictures of the web ---------------------------------------------------------------------------------------------


def read_shards(split: str, shards: list[Path]) -> Iterator[Row]:
    """WebDataset shards that img2dataset or ``blip2 capfilt`` wrote: ``image`` is the bytes of the file.

    A sample whose caption cannot be read is left out with a warning.
    """
    for shard in shards:
        for row in read_shard(str(shard)):
            if BROKEN in row:
                raise InputError(f"{shard} cannot be read to its end ({row[BROKEN]}): download it again")
            key, column = row.pop(KEY), next((name for name in CAPTION_COLUMNS if name in row), None)
            if not isinstance(row.get("image"), bytes) or column is None:
                found = ", ".join(row) or "nothing"
                raise InputError(
                    f"{shard} has a sample {key} of {found}, expected an image and a txt, or a json with"
                    " captions: run img2dataset with --caption_col, or blip2 capfilt"
                )
            try:
                captions, _ = read_texts(row[column])
            except CellError as error:
                log.warning("left out %s of %s: %s %s", key, shard, column, error)
                continue
            image_key = f"{shard}/{key}"
            yield {"image": row["image"], "image_id": key, "image_key": image_key, "captions": list(captions)}

"""Read datasets from the files that their publishers distribute, as the archives unpack.

The public readers get the name of a split and the files that :data:`blip2.data.benchmarks.BENCHMARKS` lists for the
split, and yield the rows that :func:`blip2.data.benchmarks.read_benchmark` describes. The readers raise
:class:`~blip2.errors.InputError` if a file is damaged or of another dataset, or if an image is missing.

Rows come in the order of the file, and texts are unchanged. Files are streamed; only captions in COCO's format,
Flickr30K's own file of captions, answers of VQAv2 and OK-VQA, and Visual Genome's list of images are held in memory.

Images are not opened. A folder of images is listed once, before the first row; a row whose image is not in the folder
is an error.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from blip2.data.cells import CAPTION_COLUMNS, CellError, first_column, read_texts
from blip2.data.json_stream import require_keys, stream_array, stream_json
from blip2.data.shards import ERROR_COLUMN, KEY_COLUMN, read_shard
from blip2.errors import InputError

log = logging.getLogger("blip2")

Row = dict[str, Any]

VAL_LAST_DIGIT = 9
"""The validation split of easy-VQA consists of the training images whose id ends with this digit."""


class ImageFolder:
    """A folder of images, whose files are listed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names = frozenset(path.name for path in folder.iterdir())

    def path(self, name: str, image_id: int | str) -> str:
        """Return the path of an image.

        Args:
            name: the file name of the image.
            image_id: the publisher's number or name of the image, for the error message.

        Raises:
            InputError: the image is not in the folder.
        """
        if name not in self._names:
            raise InputError(
                f"image {image_id} has no file {self.folder / name} (other files in the folder: {len(self._names)}):"
                " unpack the archive of the images again"
            )
        return str(self.folder / name)

    def row(self, name: str, image_id: int | str, dataset: str, **values: Any) -> Row:
        """Return a row for an image with the key ``DATASET/IMAGE_ID`` and further `values`. Raises as :meth:`path`."""
        key = f"{dataset}/{image_id}"
        return {"image": self.path(name, image_id), "image_id": image_id, "image_key": key, **values}


# -- captions ------------------------------------------------------------------------------------------------------


def read_captions(split: str, annotations: Path, images: ImageFolder, prefix: str) -> Iterator[Row]:
    """Read captions in COCO's format. NoCaps has the same format and a domain for each image.

    Args:
        split: unused; all readers have the parameter.
        annotations: the JSON file with ``images`` and ``annotations``.
        images: the folder of the image files.
        prefix: the first part of the image keys, ``PREFIX/ID``.

    Yields:
        A row per image: ``image`` (a path), ``image_id``, ``image_key``, ``captions`` and, if there is one, ``domain``.
    """
    rows: dict[Any, Row] = {}
    captions: list[tuple[Any, str]] = []
    for name, entry in stream_json(annotations):
        if name == "images":
            image_id, file = require_keys(annotations, entry, "id", "file_name")
            rows[image_id] = {"image": file, "image_id": image_id, "image_key": f"{prefix}/{image_id}", "captions": []}
            rows[image_id] |= {"domain": entry["domain"]} if "domain" in entry else {}
        elif name == "annotations":
            captions.append(require_keys(annotations, entry, "image_id", "caption"))
    if not rows or not captions:
        raise InputError(
            f"{annotations} has no {'captions' if rows else 'images'}: download the file that docs/data.md names"
        )
    for image_id, caption in captions:
        if image_id not in rows:
            raise InputError(
                f"{annotations} has a caption of image {image_id}, but does not list that image: download the file"
                " again"
            )
        rows[image_id]["captions"].append(caption)
    for image_id, row in rows.items():
        if not row["captions"]:
            raise InputError(f"{annotations} has no caption of image {image_id}: download the file again")
        yield row | {"image": images.path(row["image"], image_id)}


def read_karpathy_coco(split: str, annotations: Path, images: ImageFolder) -> Iterator[Row]:
    """Read one of Karpathy's splits of COCO.

    Args:
        split: ``train``, ``restval``, ``val`` or ``test``.
        annotations: Karpathy's JSON file, which contains all splits.
        images: the folder with COCO's images of the split.
    """
    for entry in stream_array(annotations, "images"):
        names = ("split", "filepath", "filename", "cocoid", "sentences")
        part, folder, file, image_id, sentences = require_keys(annotations, entry, *names)
        if part != split:
            continue
        if folder != images.folder.name:
            raise InputError(
                f"{annotations} has image {image_id} of {split} in {folder}, expected {images.folder.name}: download"
                " Karpathy's file again"
            )
        yield images.row(file, image_id, "coco", captions=[sentence["raw"] for sentence in sentences])


def read_flickr30k(split: str, annotations: Path, images: ImageFolder) -> Iterator[Row]:
    """Read Flickr30K.

    Args:
        split: one of Karpathy's splits (``train``, ``val``, ``test``), or ``all``.
        annotations: Karpathy's JSON file; for ``all``, Flickr30K's own file of captions.
        images: the folder of the image files.
    """
    captions = _read_token_file(annotations) if split == "all" else _read_karpathy_flickr30k(split, annotations)
    for file, sentences in captions:
        yield images.row(file, file.removesuffix(".jpg"), "flickr30k", captions=sentences)


def _read_karpathy_flickr30k(split: str, path: Path) -> Iterator[tuple[str, list[str]]]:
    for entry in stream_array(path, "images"):
        part, file, sentences = require_keys(path, entry, "split", "filename", "sentences")
        if "cocoid" in entry:
            raise InputError(
                f"{path} holds COCO's images, expected Flickr30K's: download Karpathy's dataset_flickr30k.json"
            )
        if part == split:
            yield file, [sentence["raw"] for sentence in sentences]


def _read_token_file(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each file name with its captions, from lines that consist of ``FILE.jpg#NUMBER``, a tab and a caption."""
    captions: dict[str, list[str]] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            line = line.rstrip("\n")
            name, tab, caption = line.partition("\t")
            image, sign, _ = name.rpartition("#")
            if not tab or not sign:
                raise InputError(
                    f"{path} line {number} is {line[:60]!r}, expected FILE.jpg#0, a tab and a caption: download the"
                    " file again"
                )
            captions.setdefault(image, []).append(caption)
    yield from captions.items()


def read_regions(
    split: str, annotations: Path, image_data: Path, first: ImageFolder, second: ImageFolder
) -> Iterator[Row]:  # fmt: skip
    """Read Visual Genome's region descriptions: a row per image, whose captions are the phrases of its regions.

    Images without regions are left out.

    Args:
        split: unused; all readers have the parameter.
        annotations: the JSON file of the regions.
        image_data: the JSON file with the URL and the COCO id of each image.
        first, second: the folders VG_100K and VG_100K_2.
    """
    known = _read_visual_genome_images(image_data)
    for _, entry in stream_json(annotations):
        image_id, regions = _require_image_entry(annotations, entry, "regions")
        captions = [require_keys(annotations, region, "phrase")[0] for region in regions]
        if captions:
            yield _visual_genome_row(image_id, known, image_data, (first, second)) | {"captions": captions}


# -- questions -----------------------------------------------------------------------------------------------------


class _Annotation(NamedTuple):
    image_id: int
    question_type: str
    answer_type: str
    answers: tuple[str, ...]
    raw_answers: tuple[str, ...]
    """The answers of OK-VQA before stemming; empty for other datasets."""


def read_questions(
    split: str, path: Path, images: ImageFolder, annotations: Path | None = None, *, dataset: str
) -> Iterator[Row]:
    """Read VQAv2 or OK-VQA.

    The ``answers`` of OK-VQA are stemmed, because OK-VQA's evaluation compares stemmed answers. The ``raw_answers`` of
    OK-VQA are not stemmed.

    Args:
        split: unused; all readers have the parameter.
        path: the JSON file of the questions.
        images: the folder of COCO's images, whose name is COCO's name of the split, such as ``val2014``.
        annotations: the JSON file of the answers. None: the answers are not published, and the rows have none.
        dataset: ``VQAv2`` or ``OK-VQA``.
    """
    subset = images.folder.name  # train2014, val2014, test2015
    known = _read_annotations(annotations, subset, dataset) if annotations else {}
    first = True
    for entry in stream_array(path, "questions", subset if annotations else None):
        question, number, image_id = require_keys(path, entry, "question", "question_id", "image_id")
        if first and dataset == "VQAv2":
            _refuse_vqa_v1(path, number, image_id)
        first = False
        file = f"COCO_{subset}_{image_id:0>12}.jpg"
        row = images.row(file, image_id, "coco", question=question, question_id=number)
        if annotations:
            annotation = known.pop(number, None)
            if annotation is None:
                raise InputError(
                    f"question {number} of {path} has no annotation in {annotations}, which is of another split or"
                    " dataset: download both files of one split"
                )
            if annotation.image_id != image_id:
                raise InputError(
                    f"question {number} is about image {image_id} in {path}, but about image {annotation.image_id} in"
                    f" {annotations}, which is of another dataset: download both files of one dataset"
                )
            row |= {"question_type": annotation.question_type, "answer_type": annotation.answer_type}
            row["answers"] = list(annotation.answers)
            row |= {"raw_answers": list(annotation.raw_answers)} if annotation.raw_answers else {}
        yield row
    if known:
        raise InputError(
            f"{annotations} has {len(known)} annotations without a question in {path} (the first: question"
            f" {next(iter(known))}), which is of another split or dataset: download both files of one split"
        )


def _read_annotations(path: Path, subset: str, dataset: str) -> dict[int, _Annotation]:
    found: dict[int, _Annotation] = {}
    for entry in stream_array(path, "annotations", subset):
        names = ("question_id", "image_id", "question_type", "answer_type", "answers")
        number, image_id, question_type, answer_type, answers = require_keys(path, entry, *names)
        if not answers:
            raise InputError(f"question {number} has no answers in {path}: download the file again")
        if number in found:
            raise InputError(f"question {number} has two annotations in {path}: download the file again")
        require_keys(path, answers[0], "answer")
        raw = "raw_answer" in answers[0]  # only in OK-VQA
        if raw != (dataset == "OK-VQA"):
            other = "OK-VQA" if raw else "VQA"
            raise InputError(f"{path} holds answers of {other}, expected {dataset}: download the file of {dataset}")
        if not found and dataset == "VQAv2":
            _refuse_vqa_v1(path, number, image_id)
        found[number] = _Annotation(
            image_id,
            sys.intern(question_type),
            sys.intern(answer_type),
            tuple(sys.intern(answer["answer"]) for answer in answers),
            tuple(sys.intern(answer["raw_answer"]) for answer in answers) if raw else (),
        )
    return found


def _refuse_vqa_v1(path: Path, number: Any, image_id: Any) -> None:
    if str(number)[:-3] != str(image_id):  # VQAv2 appends three digits to the image number, VQAv1 one
        raise InputError(
            f"{path} has question {number} about image {image_id}, expected a question id from {image_id}000 to"
            f" {image_id}999: it is a file of VQAv1 or another dataset, so download the file of VQAv2"
        )


def read_gqa(split: str, questions: Path, images: ImageFolder) -> Iterator[Row]:
    """Read GQA's balanced questions. The ``question_type`` of a row is GQA's structural type of the question.

    Args:
        split: unused; all readers have the parameter.
        questions: the JSON file of the questions and answers.
        images: the folder of the image files.
    """
    for number, entry in stream_json(questions):
        question, image_id, answer = require_keys(questions, entry, "question", "imageId", "answer")
        dataset, file = "visual-genome" if str(image_id).isdecimal() else "gqa", f"{image_id}.jpg"
        row = images.row(file, image_id, dataset, question=question, question_id=number, answers=[answer])
        yield row | ({"question_type": entry["types"]["structural"]} if "types" in entry else {})


def read_visual_genome_questions(
    split: str, annotations: Path, image_data: Path, first: ImageFolder, second: ImageFolder
) -> Iterator[Row]:  # fmt: skip
    """Read Visual Genome's questions, which have one answer each.

    Args:
        split: unused; all readers have the parameter.
        annotations: the JSON file of the questions and answers.
        image_data: the JSON file with the URL and the COCO id of each image.
        first, second: the folders VG_100K and VG_100K_2.
    """
    known = _read_visual_genome_images(image_data)
    for _, entry in stream_json(annotations):
        image_id, questions = _require_image_entry(annotations, entry, "qas")
        for entry in questions:
            question, number, answer = require_keys(annotations, entry, "question", "qa_id", "answer")
            row = _visual_genome_row(image_id, known, image_data, (first, second))
            yield row | {"question": question, "question_id": number, "answers": [answer]}


def _require_image_entry(path: Path, entry: Any, name: str) -> tuple[int, list[Any]]:
    """Return the image id of an entry, and the list under the key `name`.

    The image id has the key ``id`` or ``image_id``, depending on the version of the file.
    """
    number = "image_id" if isinstance(entry, dict) and "image_id" in entry else "id"
    image_id, values = require_keys(path, entry, number, name)
    return image_id, values


def _read_visual_genome_images(path: Path) -> dict[int, tuple[str, str, int | None]]:
    """Map each image id to its folder, its file name and its COCO id (None if it is not a COCO image)."""
    found = {}
    for _, entry in stream_json(path):
        image_id, url, coco_id = require_keys(path, entry, "image_id", "url", "coco_id")
        folder, file = url.split("/")[-2:]
        found[image_id] = sys.intern(folder), file, coco_id
    return found


def _visual_genome_row(
    image_id: int, known: dict[int, tuple[str, str, int | None]], path: Path, folders: tuple[ImageFolder, ImageFolder]
) -> Row:
    if image_id not in known:
        raise InputError(f"image {image_id} is not in {path}, which is of another version: download all files again")
    folder, file, coco_id = known[image_id]
    images = next((each for each in folders if each.folder.name == folder), None)
    if images is None:
        raise InputError(
            f"{path} has image {image_id} in {folder}, expected VG_100K or VG_100K_2: download the file again"
        )
    return images.row(file, image_id, "visual-genome", coco_id=coco_id)


def read_easy_vqa(split: str, questions: Path, images: ImageFolder) -> Iterator[Row]:
    """Read easy-VQA, which has no validation split of its own.

    Args:
        split: ``train`` (nine tenths of the training images), ``val`` (the other tenth) or ``test``.
        questions: the JSON file of the questions and answers.
        images: the folder of the image files.
    """
    part = questions.parent.name
    for number, (_, entry) in enumerate(stream_json(questions)):
        if not isinstance(entry, list) or len(entry) != 3:
            raise InputError(
                f"{questions} entry {number} is {entry!r}, expected a question, an answer and an image number: download"
                " the file again"
            )
        question, answer, image_id = entry
        if part == "test" or (split == "val") == (image_id % 10 == VAL_LAST_DIGIT):
            file, dataset = f"{image_id}.png", f"easy-vqa/{part}"
            yield images.row(file, image_id, dataset, question=question, question_id=number, answers=[answer])


# -- web datasets ----------------------------------------------------------------------------------------------------


def read_shards(split: str, shards: list[Path]) -> Iterator[Row]:
    """Read WebDataset shards that img2dataset or ``blip2 capfilt`` wrote.

    Samples whose captions cannot be read are left out with a warning.

    Args:
        split: unused; all readers have the parameter.
        shards: the tar files.

    Yields:
        A row per image: ``image`` (the bytes of the image file), ``image_id``, ``image_key`` and ``captions``.
    """
    for shard in shards:
        for row in read_shard(str(shard)):
            if ERROR_COLUMN in row:
                raise InputError(f"{shard} cannot be read to its end: {row[ERROR_COLUMN]}")
            key, column = row.pop(KEY_COLUMN), first_column(row, CAPTION_COLUMNS)
            if not isinstance(row.get("image"), bytes) or column is None:
                found = ", ".join(row) or "nothing"
                raise InputError(
                    f"{shard} has a sample, {key}, that consists of {found}, expected an image and a txt, or an image"
                    " and a json with captions: run img2dataset with --caption_col, or blip2 capfilt"
                )
            try:
                captions, _ = read_texts(row[column])
            except CellError as error:
                log.warning("left out sample %s of %s: %s %s", key, shard, column, error)
                continue
            image_key = f"{shard}/{key}"
            yield {"image": row["image"], "image_id": key, "image_key": image_key, "captions": list(captions)}

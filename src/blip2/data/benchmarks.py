"""The datasets of the paper (§4), and easy-VQA, read from the files that their publishers distribute.

A source is written ``NAME:SPLIT:FOLDER``, as in ``coco-karpathy:test:/data/coco``. Splits are joined with a plus, as in
``vqav2:train+val:/data/vqav2``, and read in that order. ``docs/data.md`` lists the files and where to get them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from blip2.data import benchmark_readers as readers
from blip2.data.assets import resolve
from blip2.data.benchmark_readers import ImageFolder, Row
from blip2.errors import InputError

SOURCE_PATTERN = re.compile(r"(?!hub:|package:)([A-Za-z][\w-]+):([\w+-]+):(.+)", re.DOTALL)


@dataclass(frozen=True)
class Benchmark:
    """A dataset: its splits, their files and their reader."""

    title: str
    homepage: str
    """The page from which the files can be downloaded."""
    splits: dict[str, tuple[str, ...]]
    """The files of each split, relative to the folder of the dataset. A trailing slash marks a folder of images, and
    ``*.tar`` all WebDataset shards."""
    read: Callable[..., Iterator[Row]]
    """Reads a split. The arguments are the name of the split and then, for each entry of `splits`, a path, an
    :class:`~blip2.data.benchmark_readers.ImageFolder` or a list of the paths of shards."""
    unlabeled_splits: tuple[str, ...] = ()
    """Splits whose answers are not published."""


def is_benchmark(source: str) -> bool:
    """Return whether a source is written ``NAME:SPLIT:FOLDER``, even if no dataset has that name."""
    return SOURCE_PATTERN.fullmatch(source) is not None


def read_benchmark(source: str) -> Iterator[Row]:
    """Read the rows of a dataset, in the order of its files.

    Args:
        source: ``NAME:SPLIT:FOLDER``. FOLDER may begin with ``~`` or ``package:``.

    Returns:
        Dicts with ``image``, an absolute path (for web datasets: the bytes of the file); ``image_id``, the publisher's
        number or name of the image; and ``image_key``, which is the same for images with the same ``image_id`` from
        the same publisher, even in different datasets, such as VQAv2 and COCO captions. The rows of ``vg-regions`` and
        ``vg-qa`` also have ``coco_id``, which is None for images that are not from COCO. The other keys are

        - for captions: ``captions``, a list; ``domain`` for NoCaps;
        - for questions: ``question``, ``question_id``, ``question_type`` and ``answer_type`` if they are published, and
          ``answers``, a list of ten answers for VQAv2 and OK-VQA, and of one answer for other datasets. OK-VQA also has
          ``raw_answers``. The test splits of VQAv2 have no ``answers``.

    Raises:
        InputError: when the function is called: the name or the split is unknown, or a file or folder is missing. When
            the rows are read: an image is missing, a file is damaged or of another dataset or split, or the annotations
            do not match the questions.
    """
    benchmark, splits, folder = _parse(source)
    reads = [partial(benchmark.read, split, *_files(benchmark, split, folder, source)) for split in splits]
    return _read_splits(source, reads)


def _read_splits(source: str, reads: list[partial[Iterator[Row]]]) -> Iterator[Row]:
    for read in reads:
        empty = True
        try:
            for row in read():
                empty = False
                yield row
        except InputError:
            raise
        except Exception as error:  # the readers take the types of the publisher's values for granted
            raise InputError(
                f"{source} has values of another form than its publisher's files"
                f" ({type(error).__name__}: {error}): download the files that docs/data.md names"
            ) from error
        if empty:
            raise InputError(
                f"{source} has no rows of split {read.args[0]}: download the files that docs/data.md names"
            )


def find_shards(source: str) -> str | None:
    """Return the glob pattern of the shards of a web dataset, or None for datasets that have no shards.

    Args:
        source: ``NAME:SPLIT:FOLDER``.

    Raises:
        InputError: the name or the split is unknown, or the folder has no shards.
    """
    benchmark, splits, folder = _parse(source)
    if benchmark.splits[splits[0]] != SHARD_PATTERNS:
        return None
    _files(benchmark, splits[0], folder, source)
    return str(folder / SHARD_PATTERNS[0])


def describe_benchmarks() -> str:
    """Return a text with one paragraph per dataset: the name, the homepage, the splits and the files of each split."""
    paragraphs = []
    for name, benchmark in BENCHMARKS.items():
        width = max(map(len, benchmark.splits))
        lines = [f"  {split:{width}}  {', '.join(files)}" for split, files in benchmark.splits.items()]
        paragraphs.append("\n".join([f"{name}: {benchmark.title}, {benchmark.homepage}", *lines]))
    return "\n\n".join(paragraphs)


def check_disjoint(
    one: Iterable[Row | str | int],
    other: Iterable[Row | str | int],
    names: tuple[str, str] = ("the training data", "the evaluation data"),
) -> None:
    """Check that two sets of rows share no image. Only the image keys of the first set are held in memory.

    Args:
        one, other: rows with ``image`` and, if they are known, ``image_key`` and ``coco_id``, which are compared as
            well; or image ids.
        names: the names of the two sets in the error message.

    Raises:
        InputError: the sets share images.
    """
    known = {key for row in one for key in _image_keys(row)}
    shared: dict[str, None] = {}
    for row in other:
        keys = _image_keys(row)
        if not known.isdisjoint(keys):
            shared[keys[0]] = None
    if shared:
        first = ", ".join(list(shared)[:3]) + (", ..." if len(shared) > 3 else "")
        raise InputError(
            f"{names[0]} and {names[1]} share {len(shared)} images ({first}), expected none: remove these images from"
            " one of the two"
        )


def _image_keys(row: Row | str | int) -> list[str]:
    if not isinstance(row, dict):
        return [str(row)]
    keys = [str(key) for key in (row.get("image_key"), row["image"]) if key is not None]
    return keys if row.get("coco_id") is None else [*keys, f"coco/{row['coco_id']}"]


def _parse(source: str) -> tuple[Benchmark, list[str], Path]:
    match = SOURCE_PATTERN.fullmatch(source)
    if match is None:
        raise InputError(
            f"source {source!r} is not of the form NAME:SPLIT:FOLDER: write it as in coco-karpathy:test:/data/coco"
        )
    name, joined, location = match.groups()
    if name not in BENCHMARKS:
        raise InputError(f"source {source!r} names the unknown dataset {name}: choose from {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    splits = joined.split("+")
    for split in splits:
        if split not in benchmark.splits:
            raise InputError(f"{name} has no split {split!r}: choose from {', '.join(benchmark.splits)}, joined with +")
    if len(set(splits)) < len(splits):
        raise InputError(f"source {source!r} names a split twice: name each split once")
    if len(splits) > 1 and (hidden := set(splits) & set(benchmark.unlabeled_splits)):
        raise InputError(
            f"the split {hidden.pop()} of {name} has no published answers: read this split alone, without others"
        )
    folder = Path(resolve(location)).absolute()
    if not folder.is_dir():
        raise InputError(
            f"source {source!r}: {folder} is not a folder: give the folder with the files of {benchmark.title}"
        )
    return benchmark, splits, folder


def _files(benchmark: Benchmark, split: str, folder: Path, source: str) -> list[Any]:
    """Return the files of a split as arguments of its reader. All files must exist."""
    files: list[Any] = []
    for name in benchmark.splits[split]:
        path = folder / name
        if "*" in name:
            files.append(_shards(benchmark, folder, source))
        elif name.endswith("/"):
            if not path.is_dir():
                raise InputError(
                    f"{source} needs the folder of images {path}, which does not exist: {_download_hint(benchmark)}"
                )
            files.append(ImageFolder(path))
        else:
            if not path.is_file():
                raise InputError(f"{source} needs the file {path}, which does not exist: {_download_hint(benchmark)}")
            files.append(path)
    return files


def _shards(benchmark: Benchmark, folder: Path, source: str) -> list[Path]:
    files = sorted(folder.iterdir())
    shards = [path for path in files if path.suffix.lower() == ".tar" and path.is_file()]
    if not shards:
        lists = [path.name for path in files if path.suffix.lower() in (".tsv", ".json", ".parquet", ".txt")]
        found = f"only {lists[0]}, which may be a list of URLs" if lists else "none"
        raise InputError(
            f"{source} needs WebDataset shards (.tar) in {folder}, found {found}: download the list of URLs from"
            f" {benchmark.homepage} and the images with img2dataset --output_format webdataset; docs/data.md lists the"
            " commands"
        )
    return shards


def _download_hint(benchmark: Benchmark) -> str:
    return f"download it from {benchmark.homepage}; docs/data.md lists the commands"


SHARD_PATTERNS = ("*.tar",)
_KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/"
_VISUAL_GENOME = "https://homes.cs.washington.edu/~ranjay/visualgenome/"
_VISUAL_GENOME_IMAGES = ("image_data.json", "VG_100K/", "VG_100K_2/")


def _vqa(prefix: str, part: str) -> tuple[str, str, str]:
    questions, annotations = f"OpenEnded_mscoco_{part}_questions.json", f"mscoco_{part}_annotations.json"
    return prefix + questions, f"{part}/", prefix + annotations


BENCHMARKS = {
    "coco": Benchmark(
        "COCO captions",
        "https://cocodataset.org/#download",
        {part: (f"annotations/captions_{part}2014.json", f"{part}2014/") for part in ("train", "val")},
        partial(readers.read_captions, prefix="coco"),
    ),
    "coco-karpathy": Benchmark(
        "COCO captions in Karpathy's splits",
        _KARPATHY,
        {
            "train": ("dataset_coco.json", "train2014/"),
            **dict.fromkeys(("restval", "val", "test"), ("dataset_coco.json", "val2014/")),
        },
        readers.read_karpathy_coco,
    ),
    "flickr30k": Benchmark(
        "Flickr30K, in Karpathy's splits or all of it",
        _KARPATHY + " and https://shannon.cs.illinois.edu/DenotationGraph/",
        {
            **dict.fromkeys(("train", "val", "test"), ("dataset_flickr30k.json", "flickr30k-images/")),
            "all": ("results_20130124.token", "flickr30k-images/"),
        },
        readers.read_flickr30k,
    ),
    "nocaps": Benchmark(
        "NoCaps",
        "https://nocaps.org/download",
        {"val": ("nocaps_val_4500_captions.json", "validation/")},
        partial(readers.read_captions, prefix="nocaps"),
    ),
    "vg-regions": Benchmark(
        "Visual Genome's region descriptions",
        _VISUAL_GENOME,
        {"all": ("region_descriptions.json", *_VISUAL_GENOME_IMAGES)},
        readers.read_regions,
    ),
    "vg-qa": Benchmark(
        "Visual Genome's questions",
        _VISUAL_GENOME,
        {"all": ("question_answers.json", *_VISUAL_GENOME_IMAGES)},
        readers.read_visual_genome_questions,
    ),
    "vqav2": Benchmark(
        "VQAv2",
        "https://visualqa.org/download.html",
        {
            "train": _vqa("v2_", "train2014"),
            "val": _vqa("v2_", "val2014"),
            "test": ("v2_OpenEnded_mscoco_test2015_questions.json", "test2015/"),
            "test-dev": ("v2_OpenEnded_mscoco_test-dev2015_questions.json", "test2015/"),
        },
        partial(readers.read_questions, dataset="VQAv2"),
        unlabeled_splits=("test", "test-dev"),
    ),
    "ok-vqa": Benchmark(
        "OK-VQA",
        "https://okvqa.allenai.org/download.html",
        {"train": _vqa("", "train2014"), "test": _vqa("", "val2014")},
        partial(readers.read_questions, dataset="OK-VQA"),
    ),
    "gqa": Benchmark(
        "GQA, balanced",
        "https://cs.stanford.edu/people/dorarad/gqa/download.html",
        {part: (f"{part}_balanced_questions.json", "images/") for part in ("train", "val", "testdev")},
        readers.read_gqa,
    ),
    "easy-vqa": Benchmark(
        "easy-VQA, in which val is a tenth of the training images",
        "https://pypi.org/project/easy-vqa/",
        {
            split: (f"easy_vqa/data/{part}/questions.json", f"easy_vqa/data/{part}/images/")
            for split, part in (("train", "train"), ("val", "train"), ("test", "test"))
        },
        readers.read_easy_vqa,
    ),
} | {
    name: Benchmark(title, homepage, {"train": SHARD_PATTERNS}, readers.read_shards)
    for name, title, homepage in (
        ("cc3m", "Conceptual Captions 3M", "https://ai.google.com/research/ConceptualCaptions/download"),
        ("cc12m", "Conceptual 12M", "https://github.com/google-research-datasets/conceptual-12m"),
        ("sbu", "SBU captions", "https://www.cs.rice.edu/~vo9/sbucaptions/"),
        ("laion", "LAION-400M", "https://laion.ai/blog/laion-400-open-dataset/"),
    )
}
"""The datasets, by the NAME in ``NAME:SPLIT:FOLDER``."""

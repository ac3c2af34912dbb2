"""The data sets of the paper (§4), and easy-VQA, read from their publishers' own files.

A source is written ``NAME:SPLIT:FOLDER``, as in ``coco-karpathy:test:/data/coco``. Splits are joined with a plus,
``vqav2:train+val:/data/vqav2``, and read one behind the other. ``docs/data.md`` says where the files come from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from blip2.data import benchmark_readers as official
from blip2.data.assets import resolve
from blip2.data.benchmark_readers import Pictures, Row
from blip2.errors import InputError

SOURCE = re.compile(r"(?!hub:|package:)([A-Za-z][\w-]+):([\w+-]+):(.+)", re.DOTALL)


@dataclass(frozen=True)
class Benchmark:
    """A data set, its splits, and where they lie."""

    title: str
    page: str
    """Where its files come from."""
    splits: dict[str, tuple[str, ...]]
    """Of each split the files below its folder; those that end with a slash are folders of pictures."""
    read: Callable[..., Iterator[Row]]
    """Takes a split and its files: paths, and :class:`~blip2.data.benchmark_readers.Pictures`."""
    without_answers: tuple[str, ...] = ()
    """Splits whose answers are not published."""


def is_benchmark(source: str) -> bool:
    """Whether a source is written as ``NAME:SPLIT:FOLDER``, whether or not there is such a data set."""
    return SOURCE.fullmatch(source) is not None


def read_benchmark(source: str) -> Iterator[Row]:
    """Rows of a data set, in its official order.

    Args:
        source: ``NAME:SPLIT:FOLDER``. FOLDER may begin with ``~`` or ``package:``.

    Returns:
        Dicts with ``image`` (absolute path; of web data sets the bytes of the file), ``image_id`` (the publisher's) and
        ``image_key`` (equal for equal images, whichever data set names them; images of Visual Genome have ``coco_id``
        beside it, which is None for those that are not COCO's). Beside these,

        - of captions: ``captions``, a list; ``domain`` of NoCaps;
        - of questions: ``question``, ``question_id``, ``question_type`` and ``answer_type`` where they are published,
          and ``answers``: ten of VQAv2 and OK-VQA, one of the others. OK-VQA has ``raw_answers`` too. VQAv2's test
          splits have no column ``answers``.

    Raises:
        InputError: at once: an unknown name or split, or a file or folder that is missing. While reading: a picture
            that is missing, a file that is damaged or of another data set or split, annotations that do not fit.
    """
    benchmark, splits, folder = _parse(source)
    read = [partial(benchmark.read, split, *_files(benchmark, split, folder, source)) for split in splits]
    return _rows(source, read)


def _rows(source: str, splits: list[partial[Iterator[Row]]]) -> Iterator[Row]:
    for read in splits:
        empty = True
        for row in read():
            empty = False
            yield row
        if empty:
            raise InputError(f"{source} has no rows of split {read.args[0]}: its files are of another kind or data set")


def find_shards(source: str) -> str | None:
    """The shards of a web data set as :func:`blip2.data.records.open_records` takes them; None for the others.

    Raises:
        InputError: as :func:`read_benchmark` does at once.
    """
    benchmark, splits, folder = _parse(source)
    if benchmark.splits[splits[0]] != SHARDS:
        return None
    _files(benchmark, splits[0], folder, source)
    return str(folder / SHARDS[0])


def describe_benchmarks() -> str:
    """All names, splits and expected files, one data set a paragraph, for a ``--help``."""
    paragraphs = []
    for name, benchmark in BENCHMARKS.items():
        width = max(map(len, benchmark.splits))
        lines = [f"  {split:{width}}  {', '.join(files)}" for split, files in benchmark.splits.items()]
        paragraphs.append("\n".join([f"{name}: {benchmark.title}, {benchmark.page}", *lines]))
    return "\n\n".join(paragraphs)


def check_disjoint(
    one: Iterable[Row | str | int],
    other: Iterable[Row | str | int],
    names: tuple[str, str] = ("the training data", "the evaluation data"),
) -> None:
    """Make sure that two sets of rows share no image. Only the names of the first's images are held.

    Args:
        one, other: rows as :func:`read_benchmark` gives them, rows of one's own, which are known by their ``image``
            alone, or image ids.
        names: of both, for the message.

    Raises:
        InputError: they share images.
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
            f"{names[0]} and {names[1]} share {len(shared)} images ({first}), expected none: take them out of one"
        )


def _image_keys(row: Row | str | int) -> list[str]:
    if not isinstance(row, dict):
        return [str(row)]
    keys = [str(key) for key in (row.get("image_key"), row["image"]) if key is not None]
    return keys if row.get("coco_id") is None else [*keys, f"coco/{row['coco_id']}"]


def _parse(source: str) -> tuple[Benchmark, list[str], Path]:
    match = SOURCE.fullmatch(source)
    if match is None:
        raise InputError(f"source {source!r} is not written NAME:SPLIT:FOLDER, as in coco-karpathy:test:/data/coco")
    name, joined, place = match.groups()
    if name not in BENCHMARKS:
        raise InputError(f"source {source!r} names no known data set: choose from {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    splits = joined.split("+")
    for split in splits:
        if split not in benchmark.splits:
            raise InputError(f"{name} has no split {split!r}: choose from {', '.join(benchmark.splits)}, joined with +")
    if len(set(splits)) < len(splits):
        raise InputError(f"source {source!r} names a split twice: name each once")
    if len(splits) > 1 and (hidden := set(splits) & set(benchmark.without_answers)):
        raise InputError(
            f"{name}'s split {hidden.pop()} has no published answers: read it alone, not joined with others"
        )
    folder = Path(resolve(place)).absolute()
    if not folder.is_dir():
        raise InputError(
            f"source {source!r}: {folder} is not a folder: give the one with the files of {benchmark.title}"
        )
    return benchmark, splits, folder


def _files(benchmark: Benchmark, split: str, folder: Path, source: str) -> list[Any]:
    """The files of a split, all of which have to be there."""
    files: list[Any] = []
    for name in benchmark.splits[split]:
        path = folder / name
        if "*" in name:
            files.append(_shards(benchmark, folder, source))
        elif name.endswith("/"):
            if not path.is_dir():
                raise InputError(
                    f"{source} needs the folder of pictures {path}, which is not there: {_from(benchmark)}"
                )
            files.append(Pictures(path))
        else:
            if not path.is_file():
                raise InputError(f"{source} needs the file {path}, which is not there: {_from(benchmark)}")
            files.append(path)
    return files


def _shards(benchmark: Benchmark, folder: Path, source: str) -> list[Path]:
    shards = sorted(folder.glob(SHARDS[0]))
    if not shards:
        lists = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".tsv", ".json", ".parquet", ".txt")]
        found = f"only {lists[0]}, a list of addresses" if lists else "none"
        raise InputError(
            f"{source} needs WebDataset shards (.tar) in {folder}, found {found}: download its pictures with"
            f" img2dataset --output_format webdataset; {_from(benchmark)}"
        )
    return shards


def _from(benchmark: Benchmark) -> str:
    return f"get it from {benchmark.page}, docs/data.md has the commands"


SHARDS = ("*.tar",)
_KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/"
_VISUAL_GENOME = ("image_data.json", "VG_100K/", "VG_100K_2/")


def _vqa(prefix: str, part: str) -> tuple[str, str, str]:
    questions, annotations = f"OpenEnded_mscoco_{part}_questions.json", f"mscoco_{part}_annotations.json"
    return prefix + questions, f"{part}/", prefix + annotations


BENCHMARKS = {
    "coco": Benchmark(
        "COCO captions",
        "https://cocodataset.org/#download",
        {part: (f"annotations/captions_{part}2014.json", f"{part}2014/") for part in ("train", "val")},
        official.read_coco,
    ),
    "coco-karpathy": Benchmark(
        "COCO captions as Karpathy split them",
        _KARPATHY,
        {
            "train": ("dataset_coco.json", "train2014/"),
            **dict.fromkeys(("restval", "val", "test"), ("dataset_coco.json", "val2014/")),
        },
        official.read_karpathy_coco,
    ),
    "flickr30k": Benchmark(
        "Flickr30K as Karpathy split it; all of it",
        _KARPATHY + " and https://shannon.cs.illinois.edu/DenotationGraph/",
        {
            **dict.fromkeys(("train", "val", "test"), ("dataset_flickr30k.json", "flickr30k-images/")),
            "all": ("results_20130124.token", "flickr30k-images/"),
        },
        official.read_flickr30k,
    ),
    "nocaps": Benchmark(
        "NoCaps",
        "https://nocaps.org/download",
        {"val": ("nocaps_val_4500_captions.json", "validation/")},
        official.read_nocaps,
    ),
    "vg-regions": Benchmark(
        "Visual Genome's region descriptions",
        "https://homes.cs.washington.edu/~ranjay/visualgenome/",
        {"all": ("region_descriptions.json", *_VISUAL_GENOME)},
        official.read_regions,
    ),
    "vg-qa": Benchmark(
        "Visual Genome's questions",
        "https://homes.cs.washington.edu/~ranjay/visualgenome/",
        {"all": ("question_answers.json", *_VISUAL_GENOME)},
        official.read_visual_genome_questions,
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
        official.read_vqav2,
        without_answers=("test", "test-dev"),
    ),
    "ok-vqa": Benchmark(
        "OK-VQA",
        "https://okvqa.allenai.org/download.html",
        {"train": _vqa("", "train2014"), "test": _vqa("", "val2014")},
        official.read_ok_vqa,
    ),
    "gqa": Benchmark(
        "GQA, balanced",
        "https://cs.stanford.edu/people/dorarad/gqa/download.html",
        {part: (f"{part}_balanced_questions.json", "images/") for part in ("train", "val", "testdev")},
        official.read_gqa,
    ),
    "easy-vqa": Benchmark(
        "easy-VQA; val is a tenth of its training images",
        "https://pypi.org/project/easy-vqa/",
        {
            split: (f"easy_vqa/data/{part}/questions.json", f"easy_vqa/data/{part}/images/")
            for split, part in (("train", "train"), ("val", "train"), ("test", "test"))
        },
        official.read_easy_vqa,
    ),
    "cc3m": Benchmark(
        "Conceptual Captions 3M",
        "https://ai.google.com/research/ConceptualCaptions/download",
        {"train": SHARDS},
        official.read_shards,
    ),
    "cc12m": Benchmark(
        "Conceptual 12M",
        "https://github.com/google-research-datasets/conceptual-12m",
        {"train": SHARDS},
        official.read_shards,
    ),
    "sbu": Benchmark(
        "SBU captions",
        "https://www.cs.rice.edu/~vo9/sbucaptions/",
        {"train": SHARDS},
        official.read_shards,
    ),
    "laion": Benchmark(
        "LAION-400M",
        "https://laion.ai/blog/laion-400-open-dataset/",
        {"train": SHARDS},
        official.read_shards,
    ),
}
"""Every NAME of a source."""

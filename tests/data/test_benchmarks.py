"""Readers of benchmarks, tested on small files in the formats of the publishers."""

import io
import json
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from blip2.config import DataConfig
from blip2.data.benchmarks import (
    BENCHMARKS,
    check_disjoint,
    describe_benchmarks,
    find_shards,
    is_benchmark,
    read_benchmark,
)
from blip2.data.images import read_image
from blip2.data.json_stream import stream_json
from blip2.data.records import Records, RecordStream
from blip2.data.sources import open_records
from blip2.errors import InputError

Json = dict[str, Any]


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    write_json(path, content)


def draw(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for shade, name in enumerate(names):
        Image.new("RGB", (8, 6), (40 * shade, 90, 0)).save(folder / name)


def coco_name(part: str, number: int) -> str:
    return f"COCO_{part}_{number:012d}.jpg"


def rows(source: str) -> list[dict[str, Any]]:
    return list(read_benchmark(source))


# -- small files --------------------------------------------------------------------------------------------------

INFO = {"description": "COCO 2014 Dataset", "url": "http://cocodataset.org", "version": "1.0", "year": 2014}


def coco_file(part: str, captions: dict[int, list[str]]) -> Json:
    # In the real files the captions of an image are neither consecutive nor in the order of the images.
    flat = [(number, text) for number, texts in reversed(captions.items()) for text in texts]
    return {
        "info": INFO | {"contributor": "COCO Consortium", "date_created": "2017/09/01"},
        "images": [
            {
                "license": 5,
                "file_name": coco_name(part, number),
                "coco_url": f"http://images.cocodataset.org/{part}/{coco_name(part, number)}",
                "height": 6,
                "width": 8,
                "date_captured": "2013-11-14 16:28:13",
                "flickr_url": "http://farm4.staticflickr.com/3153/2970773875_164f0c0b83_z.jpg",
                "id": number,
            }
            for number in captions
        ],
        "licenses": [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"}],
        "annotations": [{"image_id": number, "id": 48 + i, "caption": text} for i, (number, text) in enumerate(flat)],
    }


def make_coco(folder: Path) -> Path:
    train = {57870: ["A restaurant has modern wooden tables.", "A long table."], 318219: ["A young man — cooking"]}
    val = {391895: ["A man with a red helmet.", "A man riding."]}
    for part, captions in (("train2014", train), ("val2014", val)):
        write_json(folder / f"annotations/captions_{part}.json", coco_file(part, captions))
        draw(folder / part, *(coco_name(part, number) for number in captions))
    return folder


def karpathy_entry(number: int, split: str, file: str, captions: Sequence[str], **others: object) -> Json:
    sentences = [
        {"tokens": text.lower().rstrip(".").split(), "raw": text, "imgid": number, "sentid": 10 * number + i}
        for i, text in enumerate(captions)
    ]
    sentids = [sentence["sentid"] for sentence in sentences]
    return others | {
        "sentids": sentids, "filename": file, "imgid": number, "split": split, "sentences": sentences
    }  # fmt: skip


def make_karpathy(folder: Path) -> Path:
    images = []
    plan = [("test", 391895), ("train", 57870), ("restval", 184613), ("val", 522418), ("train", 318219), ("test", 9)]
    for number, (split, coco_id) in enumerate(plan):
        part = "train2014" if split == "train" else "val2014"
        file = coco_name(part, coco_id)
        captions = [f"Caption {i} of {coco_id}." for i in range(5)]
        images.append(karpathy_entry(number, split, file, captions, filepath=part, cocoid=coco_id))
        draw(folder / part, file)
    write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})
    return folder


FLICKR = {"train": "1000092795", "val": "1018148011", "test": "1007129816"}


def make_flickr(folder: Path) -> Path:
    files = {split: f"{number}.jpg" for split, number in FLICKR.items()}
    captions = {split: [f"Two men, {split}.", "Several men ."] for split in files}
    images = [karpathy_entry(i, split, files[split], captions[split]) for i, split in enumerate(files)]
    write_json(folder / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    lines = [f"{files[split]}#{i}\t{text}\n" for split in files for i, text in enumerate(captions[split])]
    (folder / "results_20130124.token").write_text("".join(lines), encoding="utf-8")
    draw(folder / "flickr30k-images", *files.values())
    return folder


def make_nocaps(folder: Path) -> Path:
    names = {"in-domain": "0013ea2087020901", "near-domain": "0023d1bd4fd6e5b5", "out-domain": "004e21eb2e686f40"}
    images = [
        {
            "coco_url": f"https://s3.amazonaws.com/nocaps/val/{name}.jpg",
            "date_captured": "2018-11-06 11:04:33",
            "file_name": f"{name}.jpg",
            "height": 1024,
            "id": number,
            "license": 0,
            "open_images_id": name,
            "width": 732,
            "domain": domain,
        }
        for number, (domain, name) in enumerate(names.items())
    ]
    captions = [
        {"image_id": number, "id": 10 * number + i, "caption": f"A baby {number}, {i}."}
        for number in range(3)
        for i in range(10)
    ]
    info = {"url": "http://nocaps.org", "date_created": "2018/11/06", "version": "0.1", "year": 2018}
    content = {"licenses": [], "info": info, "images": images, "annotations": captions}
    write_json(folder / "nocaps_val_4500_captions.json", content)
    draw(folder / "validation", *(f"{name}.jpg" for name in names.values()))
    return folder


def make_visual_genome(folder: Path) -> Path:
    url, size = "https://cs.stanford.edu/people/rak248", {"width": 8, "height": 6, "flickr_id": None}
    write_json(
        folder / "image_data.json",
        [
            {
                "width": 8,
                "url": f"{url}/VG_100K_2/1.jpg",
                "height": 6,
                "image_id": 1,
                "coco_id": None,
                "flickr_id": None,
            },
            size | {"url": f"{url}/VG_100K/2.jpg", "image_id": 2, "coco_id": 57870},
            size | {"url": f"{url}/VG_100K/3.jpg", "image_id": 3, "coco_id": None},
        ],
    )
    box = {"x": 1, "y": 2, "width": 3, "height": 4}
    write_json(
        folder / "region_descriptions.json",
        [
            {
                "regions": [
                    box | {"region_id": 1382, "image_id": 1, "phrase": "the clock is green in color"},
                    box | {"region_id": 1383, "image_id": 1, "phrase": "shade is along the street"},
                ],
                "id": 1,
            },
            {"regions": [], "id": 3},
            {"regions": [box | {"region_id": 1, "image_id": 2, "phrase": "a car"}], "id": 2},
        ],
    )
    write_json(
        folder / "question_answers.json",
        [
            {
                "id": 1,
                "qas": [
                    {
                        "a_objects": [],
                        "question": question,
                        "image_id": 1,
                        "qa_id": 986768 + i,
                        "answer": answer,
                        "q_objects": [],
                    }
                    for i, (question, answer) in enumerate(
                        [("What color is the clock?", "Green."), ("How tall is the light post?", "Tall.")]
                    )
                ],
            },
            {"id": 2, "qas": []},
        ],
    )
    draw(folder / "VG_100K", "2.jpg", "3.jpg")
    draw(folder / "VG_100K_2", "1.jpg")
    return folder


VQA_LICENSE = {
    "url": "http://creativecommons.org/licenses/by/4.0/",
    "name": "Creative Commons Attribution 4.0 International License",
}


def vqa_files(folder: Path, prefix: str, part: str, asked: list[tuple[int, int, str, str]], **entry: Any) -> None:
    """Write questions (question id, image id, question, answer) and, except for test images, ten answers each."""
    head = {
        "info": {"description": "This is v2.0 of the VQA dataset.", "version": "2.0", "year": 2017},
        "data_type": "mscoco",
        "license": VQA_LICENSE,
        "data_subtype": part,
    }
    questions = [{"image_id": image, "question": text, "question_id": number} for number, image, text, _ in asked]
    path = folder / f"{prefix}OpenEnded_mscoco_{part}_questions.json"
    write_json(path, head | {"task_type": "Open-Ended", "questions": questions})
    folder_name = part.replace("-dev", "")
    draw(folder / folder_name, *(coco_name(folder_name, image) for _, image, _, _ in asked))
    if "test" in part:
        return
    annotations = [
        {
            "question_type": "what is this",
            "multiple_choice_answer": answer,
            "answers": [
                {"answer": answer if i < 7 else "other", "answer_confidence": "yes", "answer_id": i + 1} | entry
                for i in range(10)
            ],
            "image_id": image,
            "answer_type": "other",
            "question_id": number,
        }
        for number, image, _, answer in reversed(asked)
    ]
    write_json(folder / f"{prefix}mscoco_{part}_annotations.json", head | {"annotations": annotations})


def make_vqav2(folder: Path) -> Path:
    train = [
        (458752000, 458752, "What is this photo taken looking through?", "net"),
        (458752001, 458752, "What position is this man playing?", "pitcher"),
        (57870000, 57870, "Where?", "restaurant"),
    ]
    vqa_files(folder, "v2_", "train2014", train)
    vqa_files(folder, "v2_", "val2014", [(262148000, 262148, "Where is he looking?", "down")])
    vqa_files(folder, "v2_", "test2015", [(262144000, 262144, "Is the ball flying?", ""), (9000, 9, "Is it?", "")])
    vqa_files(folder, "v2_", "test-dev2015", [(262144000, 262144, "Is the ball flying?", "")])
    return folder


def make_ok_vqa(folder: Path) -> Path:
    train = [(516065, 51606, "What is the hairstyle of the blond called?", "pony tail")]
    test = [(2971475, 297147, "What sport can you use this for?", "race")]
    for part, asked in (("train2014", train), ("val2014", test)):
        vqa_files(folder, "", part, asked, raw_answer="racing")
        kinds = {"question_types": {"one": "Vehicles and Transportation", "other": "Other"}}
        edit_json(folder / f"mscoco_{part}_annotations.json", lambda content, kinds=kinds: content.update(kinds))
    return folder


def make_gqa(folder: Path) -> Path:
    def entry(question: str, image: str, answer: str) -> Json:
        return {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
            "entailed": ["02930160"],
            "equivalent": ["02930152"],
            "question": question,
            "imageId": image,
            "isBalanced": True,
            "groups": {"global": None, "local": "06-sky_dark"},
            "answer": answer,
            "semanticStr": "select: sky (2486325)->verify color: dark [0]",
            "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
            "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
            "fullAnswer": f"{answer.title()}.",
        }

    parts = {
        "train": {"07333408": entry("What is on the wall?", "2375429", "pipe")},
        "val": {"05451384": entry("Are there fences?", "1", "no"), "05451385": entry("Which?", "2375429", "left")},
        "testdev": {"20602949": entry("Is it overcast?", "n288870", "no")},
    }
    for part, content in parts.items():
        write_json(folder / f"{part}_balanced_questions.json", content)
    draw(folder / "images", "2375429.jpg", "1.jpg", "n288870.jpg")
    return folder


def make_easy_vqa(folder: Path) -> Path:
    data = folder / "easy_vqa" / "data"
    for part, images in (("train", 20), ("test", 2)):
        content = [[f"what is shape {i}?", "circle", i] for i in range(images) for _ in range(2)]
        write_json(data / part / "questions.json", content)
        draw(data / part / "images", *(f"{i}.png" for i in range(images)))
    (data / "answers.txt").write_text("circle\nno\n")
    return folder


def make_web(folder: Path) -> Path:
    """Write two shards as img2dataset does; the first download of the second shard failed."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, keys in ((0, (0, 1)), (1, (1,))):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for key in keys:
                image = io.BytesIO()
                Image.new("RGB", (8, 6), (90, 60 * shard, 40 * key)).save(image, "JPEG")
                name = f"{shard:05d}{key:04d}"
                about = {
                    "caption": f"photo {name}",
                    "url": "http://example.org/a.jpg",
                    "key": name,
                    "status": "success",
                }
                files = {"jpg": image.getvalue(), "txt": f"photo {name}".encode(), "json": json.dumps(about).encode()}
                for suffix, data in files.items():
                    entry = tarfile.TarInfo(f"{name}.{suffix}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
        write_json(folder / f"{shard:05d}_stats.json", {"count": 2, "successes": len(keys)})
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    return folder


MAKE = {
    "coco": make_coco,
    "coco-karpathy": make_karpathy,
    "flickr30k": make_flickr,
    "nocaps": make_nocaps,
    "vg-regions": make_visual_genome,
    "vg-qa": make_visual_genome,
    "vqav2": make_vqav2,
    "ok-vqa": make_ok_vqa,
    "gqa": make_gqa,
    "easy-vqa": make_easy_vqa,
    "cc3m": make_web,
    "cc12m": make_web,
    "sbu": make_web,
    "laion": make_web,
}
WEB = ("cc3m", "cc12m", "sbu", "laion")
SPLITS = [(name, split) for name, benchmark in BENCHMARKS.items() for split in benchmark.splits]


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_every_split_has_rows_with_readable_images(name: str, split: str, tmp_path: Path) -> None:
    found = rows(f"{name}:{split}:{MAKE[name](tmp_path)}")
    assert found
    for row in found:
        assert read_image(row["image"]).size == (8, 6)
        assert isinstance(row["image"], bytes) == (name in WEB)
        assert name in WEB or Path(row["image"]).is_absolute()
        assert ("captions" in row) != ("question" in row)
        assert all(row.get("captions", ["-"])) and row["image_key"]
        texts = row.get("answers", row.get("captions", []))
        assert all(isinstance(text, str) for text in texts)
        assert ("answers" in row) == (
            "question" in row and split not in ("test-dev",) and (name, split) != ("vqav2", "test")
        )


def test_coco(tmp_path: Path) -> None:
    first, second = rows(f"coco:train:{make_coco(tmp_path)}")
    assert first == {
        "image": str(tmp_path / "train2014/COCO_train2014_000000057870.jpg"),
        "image_id": 57870,
        "image_key": "coco/57870",
        "captions": ["A restaurant has modern wooden tables.", "A long table."],
    }
    assert second["captions"] == ["A young man — cooking"]
    assert [row["image_id"] for row in rows(f"coco:train+val:{tmp_path}")] == [57870, 318219, 391895]


def test_karpathy_split(tmp_path: Path) -> None:
    source = f"coco-karpathy:{{}}:{make_karpathy(tmp_path)}"
    ids = {s: [row["image_id"] for row in rows(source.format(s))] for s in ("test", "val", "train+restval")}
    assert ids == {"test": [391895, 9], "val": [522418], "train+restval": [57870, 318219, 184613]}
    first = rows(source.format("test"))[0]
    assert first["captions"] == [f"Caption {i} of 391895." for i in range(5)]
    assert first["image"].endswith("val2014/COCO_val2014_000000391895.jpg")


def test_flickr30k(tmp_path: Path) -> None:
    make_flickr(tmp_path)
    for split, number in FLICKR.items():
        (row,) = rows(f"flickr30k:{split}:{tmp_path}")
        assert (row["image_id"], row["captions"]) == (number, [f"Two men, {split}.", "Several men ."])
    whole = rows(f"flickr30k:all:{tmp_path}")
    assert whole == [row for split in FLICKR for row in rows(f"flickr30k:{split}:{tmp_path}")]


def test_nocaps_has_domains(tmp_path: Path) -> None:
    found = rows(f"nocaps:val:{make_nocaps(tmp_path)}")
    assert [row["domain"] for row in found] == ["in-domain", "near-domain", "out-domain"]
    assert [row["image_id"] for row in found] == [0, 1, 2]
    assert found[2]["captions"] == [f"A baby 2, {i}." for i in range(10)]


def test_visual_genome(tmp_path: Path) -> None:
    first, second = rows(f"vg-regions:all:{make_visual_genome(tmp_path)}")  # image 3 has no regions
    assert first["captions"] == ["the clock is green in color", "shade is along the street"]
    assert first["image"] == str(tmp_path / "VG_100K_2/1.jpg") and second["image"] == str(tmp_path / "VG_100K/2.jpg")
    assert (first["coco_id"], second["coco_id"]) == (None, 57870)
    one, two = rows(f"vg-qa:all:{tmp_path}")
    assert (one["question_id"], one["question"], one["answers"]) == (986768, "What color is the clock?", ["Green."])
    assert (two["image_id"], two["answers"]) == (1, ["Tall."])


def test_older_files_of_visual_genome_use_the_key_image_id(tmp_path: Path) -> None:
    new = rows(f"vg-qa:all:{make_visual_genome(tmp_path)}")
    edit_json(tmp_path / "question_answers.json", lambda c: [e.update(image_id=e.pop("id")) for e in c])
    assert rows(f"vg-qa:all:{tmp_path}") == new


def test_vqav2(tmp_path: Path) -> None:
    found = rows(f"vqav2:train:{make_vqav2(tmp_path)}")
    assert found[1] == {
        "image": str(tmp_path / "train2014/COCO_train2014_000000458752.jpg"),
        "image_id": 458752,
        "image_key": "coco/458752",
        "question": "What position is this man playing?",
        "question_id": 458752001,
        "question_type": "what is this",
        "answer_type": "other",
        "answers": ["pitcher"] * 7 + ["other"] * 3,
    }
    assert [row["question_id"] for row in found] == [458752000, 458752001, 57870000]
    assert [row["question_id"] for row in rows(f"vqav2:val+train:{tmp_path}")] == [
        262148000,
        458752000,
        458752001,
        57870000,
    ]
    assert [row["question_id"] for row in rows(f"vqav2:test:{tmp_path}")] == [262144000, 9000]
    assert [row["question_id"] for row in rows(f"vqav2:test-dev:{tmp_path}")] == [262144000]


def test_ok_vqa_has_stemmed_and_raw_answers(tmp_path: Path) -> None:
    (row,) = rows(f"ok-vqa:test:{make_ok_vqa(tmp_path)}")
    assert row["answers"] == ["race"] * 7 + ["other"] * 3
    assert row["raw_answers"] == ["racing"] * 10
    assert row["image"].endswith("val2014/COCO_val2014_000000297147.jpg")


def test_gqa(tmp_path: Path) -> None:
    first, second = rows(f"gqa:val:{make_gqa(tmp_path)}")
    assert (first["question_id"], first["image_id"], first["answers"]) == ("05451384", "1", ["no"])
    assert (second["question"], second["question_type"]) == ("Which?", "verify")
    edit_json(tmp_path / "val_balanced_questions.json", lambda c: c["05451384"].pop("types"))
    untyped, typed = rows(f"gqa:val:{tmp_path}")
    assert untyped | {"question_type": "verify"} == first and typed == second


def test_easy_vqa_splits_share_no_images(tmp_path: Path) -> None:
    make_easy_vqa(tmp_path)
    train, val, test = (rows(f"easy-vqa:{split}:{tmp_path}") for split in ("train", "val", "test"))
    assert {row["image_id"] for row in val} == {9, 19}
    assert {row["image_id"] for row in train} == set(range(20)) - {9, 19}
    assert sorted(row["question_id"] for row in train + val) == list(range(40))
    assert [row["image_id"] for row in test] == [0, 0, 1, 1]
    for one, other in ((train, val), (train, test), (val, test)):
        check_disjoint(one, other)  # although test and train use the same image numbers


@pytest.mark.parametrize("name", WEB)
def test_web_shards_are_read_by_open_records(name: str, tmp_path: Path) -> None:
    source = f"{name}:train:{make_web(tmp_path / name)}"
    found = rows(source)
    assert [row["image_id"] for row in found] == ["000000000", "000000001", "000010001"]
    assert len({row["image_key"] for row in found}) == 3
    shards = find_shards(source)
    assert shards is not None
    records = open_records(shards, DataConfig(train=shards))
    assert isinstance(records, RecordStream)
    assert [(r.image, list(r.captions)) for r in records.read()] == [(r["image"], r["captions"]) for r in found]


@pytest.mark.parametrize(("name", "split"), [pair for pair in SPLITS if pair[0] not in WEB])
def test_every_split_opens_as_records(name: str, split: str, tmp_path: Path) -> None:
    source = f"{name}:{split}:{MAKE[name](tmp_path)}"
    records, found = open_records(source, DataConfig(train=source)), rows(source)
    assert isinstance(records, Records) and len(records) == len(found)
    captions = records.captions(range(len(found)))
    for record, texts, row in zip(records, captions, found, strict=True):
        assert record.captions == texts == tuple(row.get("answers", row.get("captions", ())))
        assert (record.image, record.question) == (row["image"], row.get("question"))
        assert record.metadata["image_id"] == row["image_id"]
        for key in ("question_id", "question_type", "answer_type", "domain"):
            assert record.metadata.get(key) == row.get(key)


def test_other_datasets_have_no_shards(tmp_path: Path) -> None:
    assert find_shards(f"coco:train:{make_coco(tmp_path)}") is None


# -- sources -------------------------------------------------------------------------------------------------------


def test_is_benchmark() -> None:
    assert is_benchmark("coco-karpathy:train+restval:/data/coco") and is_benchmark("vqav2:test-dev:data:2/vqa")
    assert is_benchmark("cocoo:test:/data"), "an unknown name is refused by read_benchmark and not treated as a path"
    for other in (
        "data/train.jsonl",
        "hub:owner/name",
        "hub:cifar10:x",
        "package:openmoji/all.jsonl",
        "C:/data/a:b",
        "coco:val",
    ):
        assert not is_benchmark(other)


def test_a_folder_may_be_relative_or_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_coco(tmp_path / "coco")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    here = rows("coco:val:coco")
    assert here == rows("coco:val:~/coco") == rows(f"coco:val:{tmp_path}/coco")
    monkeypatch.chdir("/")
    assert Path(here[0]["image"]).is_file()


def test_the_description_lists_every_dataset_split_and_file() -> None:
    text = describe_benchmarks()
    for name, benchmark in BENCHMARKS.items():
        (paragraph,) = [part for part in text.split("\n\n") if part.startswith(f"{name}:")]
        for split, files in benchmark.splits.items():
            assert re.search(rf"^  {split} +{re.escape(', '.join(files))}$", paragraph, re.MULTILINE)
        assert benchmark.homepage in paragraph


def test_the_docs_list_every_dataset_and_file() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for name, benchmark in BENCHMARKS.items():
        for split, files in benchmark.splits.items():
            assert re.search(rf"`{name}:([\w+-]+\+)?{split}(\+[\w+-]+)?:", page), f"{name}:{split}"
            assert all(Path(file).name in page for file in files), files


# -- errors ------------------------------------------------------------------------------------------------------

REFUSED = {
    "coco": ("'coco' is not of the form NAME:SPLIT:FOLDER", None),
    "cocoo:test:{}": ("names the unknown dataset cocoo: choose from coco, coco-karpathy, flickr30k", None),
    "coco:test:{}": ("coco has no split 'test': choose from train, val", make_coco),
    "coco:train+train:{}": ("names a split twice", make_coco),
    "vqav2:train+test-dev:{}": (
        "the split test-dev of vqav2 has no published answers: read this split alone",
        make_vqav2,
    ),
    "coco:val:{}/nowhere": ("nowhere is not a folder: give the folder with the files of COCO captions", make_coco),
}


@pytest.mark.parametrize("source", REFUSED)
def test_invalid_sources_are_refused_immediately(source: str, tmp_path: Path) -> None:
    message, make = REFUSED[source]
    if make:
        make(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_benchmark(source.format(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "split"), [each for each in SPLITS if each[0] not in WEB])
def test_missing_files_are_reported_with_path_and_homepage(name: str, split: str, tmp_path: Path) -> None:
    for file in BENCHMARKS[name].splits[split]:
        folder = MAKE[name](tmp_path / file.replace("/", "_"))
        (folder / file).rename(folder / "elsewhere")
        kind = "folder of images" if file.endswith("/") else "file"
        message = (
            f"needs the {kind} {folder / file}, which does not exist: download it from {BENCHMARKS[name].homepage}"
        )
        with pytest.raises(InputError, match=re.escape(message)):
            read_benchmark(f"{name}:{split}:{folder}")


def test_a_list_of_urls_is_refused(tmp_path: Path) -> None:
    (tmp_path / "Train_GCC-training.tsv").write_text("a very typical bus station\thttp://example.org/a.jpg\n")
    message = "found only Train_GCC-training.tsv, which may be a list of URLs: download"
    for ask in (read_benchmark, find_shards):
        with pytest.raises(InputError, match=re.escape(message)):
            ask(f"cc3m:train:{tmp_path}")


def test_shards_without_captions_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        entry = tarfile.TarInfo("000000000.json")
        entry.size = 2
        archive.addfile(entry, io.BytesIO(b"{}"))
    with pytest.raises(InputError, match=r"expected an image and a txt, .*: run img2dataset with --caption_col"):
        rows(f"laion:train:{tmp_path}")


MISSING_IMAGES = {
    "coco:train": ("train2014/COCO_train2014_000000318219.jpg", 318219),
    "coco-karpathy:test": ("val2014/COCO_val2014_000000000009.jpg", 9),
    "flickr30k:test": ("flickr30k-images/1007129816.jpg", 1007129816),
    "nocaps:val": ("validation/004e21eb2e686f40.jpg", 2),
    "vg-regions:all": ("VG_100K/2.jpg", 2),
    "vg-qa:all": ("VG_100K_2/1.jpg", 1),
    "vqav2:test": ("test2015/COCO_test2015_000000000009.jpg", 9),
    "ok-vqa:train": ("train2014/COCO_train2014_000000051606.jpg", 51606),
    "gqa:val": ("images/2375429.jpg", 2375429),
    "easy-vqa:val": ("easy_vqa/data/train/images/19.png", 19),
}


@pytest.mark.parametrize("source", MISSING_IMAGES)
def test_missing_images_are_reported(source: str, tmp_path: Path) -> None:
    file, number = MISSING_IMAGES[source]
    folder = MAKE[source.split(":")[0]](tmp_path)
    (folder / file).unlink()
    with pytest.raises(InputError, match=re.escape(f"image {number} has no file {folder / file} (")):
        rows(f"{source}:{folder}")


def copy(one: str, other: str) -> Callable[[Path], None]:
    return lambda folder: (folder / other).write_bytes((folder / one).read_bytes()) and None


def edit(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / file, change)


def version_1(folder: Path) -> None:
    """Write files of VQAv1 under the names of VQAv2."""
    vqa_files(folder, "v2_", "train2014", [(4870250, 487025, "What shape is the bench seat?", "oval")])


def ok_vqa_annotations(folder: Path) -> None:
    make_ok_vqa(folder / "ok")
    copy("ok/mscoco_train2014_annotations.json", "v2_mscoco_train2014_annotations.json")(folder)


def vqa_under_ok_vqa_s_names(folder: Path) -> None:
    vqa_files(folder, "", "train2014", [(4870250, 487025, "What shape is the bench seat?", "oval")])


def captions_for_questions(folder: Path) -> None:
    make_coco(folder)
    copy("annotations/captions_train2014.json", "v2_OpenEnded_mscoco_train2014_questions.json")(folder)


def vqav2_questions_for_ok_vqa(folder: Path) -> None:
    make_vqav2(folder)
    copy("v2_OpenEnded_mscoco_train2014_questions.json", "OpenEnded_mscoco_train2014_questions.json")(folder)


QUESTIONS = "v2_OpenEnded_mscoco_{}2014_questions.json"
ANNOTATIONS = "v2_mscoco_{}2014_annotations.json"
T = ANNOTATIONS.format("train")
MISMATCHED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "version 1": (
        "vqav2:train",
        version_1,
        "has question 4870250 about image 487025, expected a question id from 487025000 to 487025999",
    ),
    "OK-VQA's answers": ("vqav2:train", ok_vqa_annotations, "holds answers of OK-VQA, expected VQAv2"),
    "VQA's answers": ("ok-vqa:train", vqa_under_ok_vqa_s_names, "holds answers of VQA, expected OK-VQA"),
    "captions": (
        "vqav2:train",
        captions_for_questions,
        "contains the keys info, images, licenses, annotations, expected entries under the key questions",
    ),
    "VQAv2's questions": ("ok-vqa:train", vqav2_questions_for_ok_vqa, "question 458752000 of"),
    "another split's annotations": (
        "vqav2:train",
        copy(ANNOTATIONS.format("val"), T),
        "holds val2014, expected train2014: download the file of train2014",
    ),
    "another split's questions": (
        "vqav2:val",
        copy(QUESTIONS.format("train"), QUESTIONS.format("val")),
        "holds train2014, expected val2014",
    ),
    "questions for annotations": (
        "vqav2:train",
        copy(QUESTIONS.format("train"), T),
        "questions, expected entries under the key annotations",
    ),
    "no annotation": (
        "vqav2:train",
        edit(T, lambda c: c["annotations"].pop(1)),
        "question 458752001 of",
    ),
    "no question": (
        "vqav2:train",
        edit(QUESTIONS.format("train"), lambda c: c["questions"].pop(1)),
        "has 1 annotations without a question in",
    ),
    "no answers": (
        "vqav2:train",
        edit(T, lambda c: c["annotations"][0].update(answers=[])),
        "question 57870000 has no answers in",
    ),
    "two annotations": (
        "vqav2:train",
        edit(T, lambda c: c["annotations"].append(c["annotations"][0])),
        "question 57870000 has two annotations in",
    ),
    "another image": (
        "vqav2:train",
        edit(T, lambda c: c["annotations"][2].update(image_id=57870)),
        "question 458752000 is about image 458752 in",
    ),
    "a question without a number": (
        "vqav2:val",
        edit(QUESTIONS.format("val"), lambda c: c["questions"][0].pop("question_id")),
        "contains an entry with the keys image_id, question, expected an object with the keys question, question_id,"
        " image_id: download",
    ),
    "objects instead of captions": (
        "coco:train",
        edit("annotations/captions_train2014.json", lambda c: c["annotations"][0].pop("caption")),
        "contains an entry with the keys image_id, id, expected an object with the keys image_id, caption",
    ),
    "names without captions": (
        "nocaps:val",
        edit("nocaps_val_4500_captions.json", lambda c: c.pop("annotations")),
        "has no captions: download the file that docs/data.md names",
    ),
    "a caption of nothing": (
        "coco:train",
        edit("annotations/captions_train2014.json", lambda c: c["annotations"][0].update(image_id=5)),
        "has a caption of image 5, but does not list that image",
    ),
    "an image without caption": (
        "coco:train",
        edit("annotations/captions_train2014.json", lambda c: c["annotations"].pop(0)),
        "has no caption of image 318219",
    ),
    "Flickr's for COCO's": (
        "coco-karpathy:test",
        lambda folder: copy("f/dataset_flickr30k.json", "dataset_coco.json")(make_flickr(folder / "f").parent),
        "expected an object with the keys split, filepath, filename, cocoid, sentences",
    ),
    "COCO's for Flickr's": (
        "flickr30k:test",
        lambda folder: copy("coco/dataset_coco.json", "dataset_flickr30k.json")(make_karpathy(folder / "coco").parent),
        "holds COCO's images, expected Flickr30K's",
    ),
    "another split of COCO's images": (
        "coco-karpathy:test",
        edit("dataset_coco.json", lambda c: c["images"][0].update(filepath="val2017")),
        "has image 391895 of test in val2017, expected val2014",
    ),
    "no row of the split": (
        "coco-karpathy:val",
        edit("dataset_coco.json", lambda c: [image.update(split="train") for image in c["images"]]),
        "has no rows of split val",
    ),
    "a token file of another kind": (
        "flickr30k:all",
        lambda folder: (folder / "results_20130124.token").write_text("a,b,c\n") and None,
        "line 1 is 'a,b,c', expected FILE.jpg#0, a tab and a caption",
    ),
    "regions for questions": (
        "vg-qa:all",
        copy("region_descriptions.json", "question_answers.json"),
        "contains an entry with the keys regions, id, expected an object with the keys id, qas",
    ),
    "another version's images": (
        "vg-qa:all",
        edit("image_data.json", lambda c: c.pop(0)),
        "image 1 is not in",
    ),
    "another folder of images": (
        "vg-regions:all",
        edit("image_data.json", lambda c: c[0].update(url="https://example.org/VG/1.jpg")),
        "has image 1 in VG, expected VG_100K or VG_100K_2",
    ),
    "GQA's scene graphs": (
        "gqa:val",
        lambda folder: write_json(folder / "val_balanced_questions.json", {"1": {"width": 4, "objects": {}}}),
        "contains an entry with the keys width, objects, expected an object with the keys question, imageId, answer",
    ),
    "a list": (
        "vqav2:val",
        lambda folder: write_json(folder / QUESTIONS.format("val"), [{"question": "why?"}]),
        "contains a list, expected entries under the key questions",
    ),
    "other questions for easy-VQA's": (
        "easy-vqa:test",
        lambda folder: write_json(folder / "easy_vqa/data/test/questions.json", [{"question": "why?"}]),
        "entry 0 is {'question': 'why?'}, expected a question, an answer and an image",
    ),
    "half a file": (
        "gqa:val",
        lambda folder: (folder / "val_balanced_questions.json").write_text('{"1": {"question": "Is') and None,
        "val_balanced_questions.json is damaged or not JSON (",
    ),
}  # fmt: skip


def test_values_of_other_types_are_no_bug_of_this_program(tmp_path: Path) -> None:
    make_karpathy(tmp_path)
    edit_json(tmp_path / "dataset_coco.json", lambda content: content["images"][0].update(sentences=[{}]))
    source = f"coco-karpathy:test+val+train+restval:{tmp_path}"
    with pytest.raises(InputError, match=r"has values of another form .* \(KeyError: 'raw'\): download") as error:
        open_records(source, DataConfig(train=source))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", MISMATCHED)
def test_files_that_do_not_match_are_refused(name: str, tmp_path: Path) -> None:
    source, spoil, message = MISMATCHED[name]
    MAKE[source.split(":")[0]](tmp_path)
    rows(f"{source}:{tmp_path}")
    spoil(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        rows(f"{source}:{tmp_path}")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


# -- overlaps ------------------------------------------------------------------------------------------------------


def test_splits_that_share_images_are_refused(tmp_path: Path) -> None:
    coco, karpathy, vqa = make_coco(tmp_path / "a"), make_karpathy(tmp_path / "b"), make_vqav2(tmp_path / "c")
    check_disjoint(rows(f"coco:train:{coco}"), rows(f"coco:val:{coco}"))
    with pytest.raises(
        InputError, match=re.escape("VQAv2 and COCO share 1 images (coco/57870), expected none: remove")
    ):
        check_disjoint(rows(f"vqav2:train:{vqa}"), rows(f"coco:train:{coco}"), ("VQAv2", "COCO"))
    with pytest.raises(InputError, match=re.escape("share 6 images (coco/391895, coco/9, coco/57870, ...)")):
        both = rows(f"coco-karpathy:train+restval+val+test:{karpathy}")
        check_disjoint(both, rows(f"coco-karpathy:test+train+restval+val:{karpathy}"))


def test_images_are_compared_by_the_numbers_of_both_datasets(tmp_path: Path) -> None:
    coco, genome, gqa = make_coco(tmp_path / "a"), make_visual_genome(tmp_path / "b"), make_gqa(tmp_path / "c")
    regions = rows(f"vg-regions:all:{genome}")
    for one, other in ((regions, rows(f"coco:train:{coco}")), (rows(f"coco:train:{coco}"), regions)):
        with pytest.raises(InputError, match="share 1 images"):
            check_disjoint(one, other)
    with pytest.raises(InputError, match=re.escape("share 1 images (visual-genome/1)")):
        check_disjoint(regions, rows(f"gqa:val:{gqa}"))
    with pytest.raises(InputError, match="share 2 images"):
        check_disjoint(regions, regions)
    check_disjoint(regions, rows(f"gqa:testdev:{gqa}"))


def test_other_rows_and_ids_are_compared_directly() -> None:
    own = [{"image": "a.jpg", "captions": ["a"]}, {"image": "b.jpg", "captions": ["b"]}]
    check_disjoint(own, ["c.jpg"])
    check_disjoint([1, 2], [3])
    with pytest.raises(InputError, match=re.escape("share 1 images (b.jpg)")):
        check_disjoint(own, ["b.jpg", "b.jpg"])
    with pytest.raises(InputError, match=re.escape("share 2 images (3, 2)")):
        check_disjoint([1, 2, 3], [3, 2])


# -- JSON ----------------------------------------------------------------------------------------------------------

DOCUMENTS: list[Any] = [
    [],
    {},
    {"a": []},
    [[], {}, [1, [2, "]"]], 12345, -1.5, 1e-30, None, True, '"\\ü\n—😀'],
    {"info": {"x": [1, 2]}, "list": [{"a": "b" * 50}, 3], "number": 12, "text": "a,b:]}", "none": None},
]


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("document", DOCUMENTS)
def test_members_are_independent_of_the_chunk_size(
    document: Any, indent: int | None, chunk_size: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document, indent=indent, ensure_ascii=indent is None) + "\n", encoding="utf-8")
    expected = []
    for name, value in document.items() if isinstance(document, dict) else [("", document)]:
        expected += [(name, each) for each in value] if isinstance(value, list) else [(name, value)]
    assert list(stream_json(path, chunk_size)) == expected


@pytest.mark.parametrize(
    "text",
    [b"", b" ", b"3", b"[1 2]", b"[1,", b"[1, 2", b"{1: 2}", b'{"a" 2}', b'{"a": 2', b"[1] 2", b'{"a": nul}', b"\xff["],
)
@pytest.mark.parametrize("chunk_size", [1, 1 << 20])
def test_invalid_json_is_refused(text: bytes, chunk_size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(InputError, match=re.escape(f"{path} is damaged or not JSON (")):
        list(stream_json(path, chunk_size))

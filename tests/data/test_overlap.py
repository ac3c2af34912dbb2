"""Detection of held-out images in the training data."""

import json
from dataclasses import replace

import datasets
import pytest

from blip2.config import DataConfig
from blip2.data import overlap
from blip2.data.benchmarks import read_benchmark
from blip2.data.overlap import check_overlap
from blip2.data.sources import open_records
from blip2.errors import InputError
from conftest import draw


def write(folder, names, file="table.jsonl", make=True):
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        if make:
            draw("disc", "red", number).save(folder / name)
    path = folder / file
    path.write_text("".join(json.dumps({"image": name, "caption": "a disc"}) + "\n" for name in names))
    return str(path)


def check(train, held_out, **config):
    def opened(key, source):
        return key, source, open_records(source, DataConfig(source, **config))

    return check_overlap([opened("data.train", train)], [opened("data.validation", held_out)])


def test_shared_paths(tmp_path):
    """Paths are normalized, and images are not opened."""
    train = write(tmp_path / "a", [f"{i}.png" for i in range(2000)], make=False)
    one = write(tmp_path / "b", ["x.png", "../a/./7.png", "..//a/1999.png", str(tmp_path / "a" / "3.png")], make=False)
    with pytest.raises(InputError) as raised:
        check(train, one)
    a = tmp_path / "a"
    assert str(raised.value) == (
        f"data.validation ({one}) and data.train ({train}) share 3 images ({a}/3.png, {a}/7.png, {a}/1999.png),"
        " expected none: remove these images from one of the two, or set data.allow_overlap to true"
    )
    assert check(train, write(tmp_path / "c", ["1.png"], make=False)) == []


def saved(folder, shades):
    for shade in shades:
        draw("disc", "red", shade).save(folder / f"{shade}.png")
    images = [{"bytes": (folder / f"{shade}.png").read_bytes(), "path": None} for shade in shades]
    table = datasets.Dataset.from_dict({"image": images, "caption": ["a disc"] * len(shades)})
    table.cast_column("image", datasets.Image()).save_to_disk(folder / f"saved-{len(shades)}")
    return str(folder / f"saved-{len(shades)}")


def test_embedded_images_are_compared_by_their_bytes(tmp_path, monkeypatch):
    train, held_out = saved(tmp_path, [1, 2, 3]), saved(tmp_path, [3, 9])
    with pytest.raises(InputError, match=r"share 1 images \([0-9a-f]{32}\), expected none"):
        check(train, held_out)
    monkeypatch.setattr(overlap, "MAX_HASHED_IMAGES", 2)
    assert check(train, held_out) == [
        f"data.validation ({held_out}) and data.train ({train}) are not checked for shared images, because data.train"
        f" ({train}) is a table that holds 3 images"
    ]


def test_a_stream_is_reported_as_not_compared(tmp_path):
    train = write(tmp_path / "a", ["1.png"])
    stream = open_records(train, DataConfig(train, streaming=True))
    held_out = open_records(train, DataConfig(train))
    (line,) = check_overlap([("data.train", train, stream)], [("evaluation.data", train, held_out)])
    assert line.startswith(f"evaluation.data ({train}) and data.train ({train}) are not checked for shared images")
    assert line.endswith("is a stream")


@pytest.fixture
def benchmarks(tmp_path):
    """Two images of COCO with questions, one of them with a caption and also in Visual Genome."""
    coco, vg = tmp_path / "coco", tmp_path / "vg"
    for folder in (coco / "val2014", coco / "annotations", vg / "VG_100K", vg / "VG_100K_2"):
        folder.mkdir(parents=True)
    for number in (42, 73):
        draw("disc", "red", number).save(coco / "val2014" / f"COCO_val2014_{number:012}.jpg")
    questions = [{"image_id": n, "question": "what?", "question_id": 1000 * n} for n in (42, 73)]
    answers = [
        {"question_id": q["question_id"], "image_id": q["image_id"], "question_type": "what", "answer_type": "other",
         "answers": [{"answer": "a disc", "answer_id": i} for i in range(10)]} for q in questions
    ]  # fmt: skip
    for name, value in {
        coco / "v2_OpenEnded_mscoco_val2014_questions.json": {"data_subtype": "val2014", "questions": questions},
        coco / "v2_mscoco_val2014_annotations.json": {"data_subtype": "val2014", "annotations": answers},
        coco / "annotations/captions_val2014.json": {
            "images": [{"id": 73, "file_name": "COCO_val2014_000000000073.jpg"}],
            "annotations": [{"image_id": 73, "caption": "a disc"}],
        },
        vg / "image_data.json": [{"image_id": 5, "url": "https://x/VG_100K/5.jpg", "coco_id": 73}],
        vg / "region_descriptions.json": [{"id": 5, "regions": [{"phrase": "a disc"}]}],
    }.items():
        name.write_text(json.dumps(value))
    draw("disc", "blue", 5).save(vg / "VG_100K" / "5.jpg")
    return {
        "vqa": f"vqav2:val:{coco}", "captions": f"coco:val:{coco}", "regions": f"vg-regions:all:{vg}",
        "own": str(coco / "val2014" / "COCO_val2014_000000000073.jpg"),
    }  # fmt: skip


@pytest.mark.parametrize("train", ["captions", "regions"])
def test_publishers_image_numbers(benchmarks, train):
    """VQAv2 and COCO share images; some images of Visual Genome are copies of COCO's."""
    assert len(list(read_benchmark(benchmarks["vqa"]))) == 2
    with pytest.raises(InputError, match=r"share 1 images .*expected none"):
        check(benchmarks[train], benchmarks["vqa"])


def test_a_table_that_shares_files_with_a_benchmark(benchmarks, tmp_path):
    own = write(tmp_path / "own", [benchmarks["own"]], make=False)
    with pytest.raises(InputError, match=r"share 1 images \(.*COCO_val2014_000000000073\.jpg\)"):
        check(own, benchmarks["vqa"])


# -- in a run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["data.validation", "evaluation.data"])
def test_training_refuses_shared_images(parts, tmp_path, capsys, key):
    from blip2.cli import main
    from blip2.recipe import dump_config

    changes = {"data": {"allow_overlap": False}}
    if key == "data.validation":
        changes["data"]["validation"] = parts.images
    else:
        changes["evaluation"] = {"task": "retrieval", "data": parts.images, "limit": 4, "rerank_k": 0}
    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 1}, **changes)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(recipe))
    assert main(["train", str(path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {key} ({parts.images}) and data.train ({parts.images}) share 24 images (")
    assert line.endswith(": remove these images from one of the two, or set data.allow_overlap to true")
    path.write_text(dump_config(replace(recipe, data=replace(recipe.data, allow_overlap=True))))
    assert main(["train", str(path)]) == 0

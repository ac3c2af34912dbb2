"""Parts of the demo; `blip2 demo --quick` runs it as a whole."""

import json
from dataclasses import replace

import pytest

from blip2.config import DataConfig
from blip2.data.sources import open_records
from blip2.demo.data import MIN_IMAGES, user_data
from blip2.demo.report import WITHOUT_STAGE1, tables
from blip2.demo.run import RUNS, DemoPlan, demo_recipes, make_plan
from blip2.errors import InputError
from conftest import draw


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "own").mkdir()
    for i in range(30):
        draw("disc", "red", i % 8).save(tmp_path / "own" / f"{i}.png")
        (tmp_path / "own" / f"{i}.txt").write_text(f"disc number {i}\n")
    return tmp_path / "own"


def test_a_tenth_of_a_user_s_images_is_held_out(folder, tmp_path):
    data = user_data(str(folder), tmp_path / "demo")
    sides = [open_records(path, DataConfig(train=path)) for path in (data.train, data.validation)]
    names = [{record.image for record in side} for side in sides]
    assert [len(side) for side in names] == [27, 3] and not names[0] & names[1]
    assert all(record.captions[0].startswith("disc number") for side in sides for record in side)
    assert data.held_out is not None
    again = user_data(str(folder), tmp_path / "again").held_out
    assert again is not None and data.held_out.read_text() == again.read_text()
    assert data.scenes is None and data.questions is None


def test_images_that_cannot_be_used_are_refused(folder, tmp_path):
    for path in sorted(folder.glob("*.txt"))[MIN_IMAGES - 1 :]:
        path.unlink()
    with pytest.raises(InputError, match=rf"has {MIN_IMAGES - 1} images with a caption, expected at least"):
        user_data(str(folder), tmp_path / "demo")
    with pytest.raises(InputError, match=r"is neither a folder nor a file"):
        user_data(str(tmp_path / "nothing"), tmp_path / "demo")


def test_each_run_has_its_data_and_starts_from_the_run_before(folder, tmp_path):
    own = user_data(str(folder), tmp_path / "demo")
    plan = DemoPlan("fp32", 1.0)
    recipes = demo_recipes(tmp_path / "demo", own, plan, quick=True)
    assert list(recipes) == ["stage 1", "stage 2", WITHOUT_STAGE1]  # there are no questions
    first, second, _ = recipes.values()
    assert second.start_from == [first.output]
    scenes = replace(
        own, twins="twins.jsonl", questions="questions.jsonl", questions_validation="held_out_questions.jsonl"
    )
    recipes = demo_recipes(tmp_path / "demo", scenes, plan, quick=True)
    assert list(recipes) == list(RUNS)
    first, twins, second, vqa, alone = recipes.values()
    assert (twins.start_from, alone.start_from) == ([first.output], None)
    assert second.start_from == [twins.output]
    assert vqa.start_from == [second.output, twins.output]
    assert [recipe.data.train for recipe in (first, second, alone)] == [own.train] * 3
    assert (twins.data.train, twins.data.validation) == (scenes.twins, own.validation)
    assert (vqa.data.train, vqa.data.validation) == (scenes.questions, scenes.questions_validation)
    assert replace(second, output=alone.output, start_from=None) == alone  # they differ in where they start alone
    assert len({recipe.output for recipe in recipes.values()}) == len(RUNS)
    longer = demo_recipes(tmp_path / "demo", own, replace(plan, scale=2.0), quick=False)
    once = demo_recipes(tmp_path / "demo", own, plan, quick=False)
    assert [r.training.max_steps for r in longer.values()] == [2 * r.training.max_steps for r in once.values()]


def test_a_killed_demo_keeps_its_plan(tmp_path):
    first = make_plan(tmp_path / "demo")
    assert first.precision in ("bf16", "fp32") and first.scale == 1.0
    other = DemoPlan("bf16" if first.precision == "fp32" else "fp32", 3.5)
    (tmp_path / "demo" / "plan.json").write_text(json.dumps({"precision": other.precision, "scale": other.scale}))
    assert make_plan(tmp_path / "demo") == other  # it was not measured again
    assert make_plan(tmp_path / "demo", 2.0) == replace(other, scale=2.0) == make_plan(tmp_path / "demo")
    assert make_plan(tmp_path / "new", 0.5).scale == 0.5


def test_tables_hold_what_was_measured():
    recalls = {side: {f"r{k}": 0.1 * k for k in (1, 5, 10)} for side in ("image_to_text", "text_to_image")}
    chance = {"r1": 0.01, "r5": 0.05, "r10": 0.1}
    scores = {"token_f1": 0.5, "content_f1": 0.25, "exact": 0.0}
    images = {
        "source": "mine",
        "count": 3,
        "retrieval": {"itc": recalls, "itm": recalls, "chance": chance},
        "captions": {"stage 2": scores},
    }
    (retrieval, rows), (captions, lines) = tables(json.loads(json.dumps({"images": images})))
    assert retrieval == ("retrieval, 3 images of mine", "R@1", "R@5", "R@10")
    assert rows[0] == ["text to image, ITC", "10.0", "50.0", "100.0"] and rows[-1] == ["chance", "1.0", "5.0", "10.0"]
    assert captions[0] == "captions of mine" and lines == [["stage 2", "50.0", "25.0", "0.0"]]

"""Parts of the demo; `blip2 demo --quick` runs it as a whole."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from blip2.config import DataConfig
from blip2.data.records import Record
from blip2.data.scene_texts import Truth
from blip2.data.sources import open_records
from blip2.demo.conversations import ANIMAL, COLOR, STORY, judge, write_conversations
from blip2.demo.data import MIN_IMAGES, user_data
from blip2.demo.report import WITHOUT_STAGE1, DemoResults, tables
from blip2.demo.run import RUNS, DemoPlan, demo_recipes, make_plan
from blip2.errors import InputError
from blip2.pipelines import GenerationPipeline, load
from conftest import draw

CHATML = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"


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


@pytest.mark.parametrize(("key", "value"), [("quick", True), ("scale", 2.0), ("data", "0123")])
def test_the_runs_of_another_demo_are_not_taken_for_those_of_this_one(tmp_path, key, value):
    plan = make_plan(tmp_path / "demo")
    (tmp_path / "demo" / "stage1").mkdir()
    assert make_plan(tmp_path / "demo") == plan
    with pytest.raises(InputError, match=f"contains a demo whose {key} is .* instead of {value}: give another"):
        make_plan(tmp_path / "demo", **{key: value})
    assert make_plan(tmp_path / "demo") == plan


def test_all_captions_of_a_user_s_image_are_on_one_side_and_damaged_images_are_not_held_out(folder, tmp_path):
    table = folder / "captions.csv"
    rows = [f"{i}.png,disc number {i} {each}\n" for each in range(5) for i in range(30)]
    table.write_text("image,caption\n" + "".join(rows))
    data = user_data(str(table), tmp_path / "demo")
    train, held = ([*open_records(path, DataConfig(train=path))] for path in (data.train, data.validation))
    assert (len(train), len(held)) == (27, 3)
    assert all(len(record.captions) == 5 for record in (*train, *held))
    for record in held[:2]:
        Path(str(record.image)).write_bytes(b"no image")
    damaged = {record.image for record in held[:2]}
    again = user_data(str(table), tmp_path / "again")
    held = [*open_records(again.validation, DataConfig(train=again.validation))]
    assert len(held) == 3 and not damaged & {record.image for record in held}
    assert again.digest != data.digest


def test_tables_hold_what_was_measured():
    recalls = {side: {f"r{k}": 0.1 * k for k in (1, 5, 10)} for side in ("image_to_text", "text_to_image")}
    chance = {"r1": 0.01, "r5": 0.05, "r10": 0.1}
    scores = {"token_f1": 0.5, "content_f1": 0.25, "exact": 0.0}
    images = {
        "source": "mine",
        "count": 3,
        "retrieval": {"itc": recalls, "reranked": recalls, "chance": chance},
        "captions": {"stage 2": scores},
    }
    (retrieval, rows), (captions, lines) = tables(json.loads(json.dumps({"images": images})))
    assert retrieval == ("retrieval, 3 images of mine", "R@1", "R@5", "R@10")
    assert rows[0] == ["text to image, ITC", "10.0", "50.0", "100.0"] and rows[-1] == ["chance", "1.0", "5.0", "10.0"]
    assert captions[0] == "captions of mine" and lines == [["stage 2", "50.0", "25.0", "0.0"]]


@pytest.mark.parametrize(
    ("instruction", "answer", "mistake"),
    [
        (COLOR, "The background is Red.", ""),
        (COLOR, "Red or blue.", "it is red"),
        (COLOR, "It is bright.", "it is red"),
        (ANIMAL, "The pig is the animal.", ""),
        (ANIMAL, "A pig and a crown.", "the animals are: pig"),
        (ANIMAL, "None.", "the animals are: pig"),
        (STORY, "Once upon a time there were two pigs.", ""),
        (STORY, "Emma found a zebra.", "it tells of no pig and no crown"),
    ],
)
def test_answers_are_judged_by_the_scene(instruction, answer, mistake):
    truth = Truth("pair", "red", "plain", ("pig", "crown"), "left", 0, "")
    assert judge(instruction, answer, truth) == mistake


def test_conversations_show_right_and_wrong_answers_with_their_evidence(runs, tmp_path):
    writer = load(runs["llama"], device="cpu")
    assert isinstance(writer, GenerationPipeline)
    writer.tokenizer.chat_template = CHATML
    image = draw("disc", "red", 0)
    image.save(tmp_path / "scene.png")
    truth = Truth("pair", "red", "plain", ("pig", "crown"), "left", 0, "")
    row = {"image": "scene.png", "captions": ["A pig left of a crown on red."], "truth": truth.to_json()}
    features = writer.encode_images([image, image])
    captions = ["A pig to the left of a crown on red.", "A cat <script> on a blue background."]
    questions = {0: [("Is there a pig?", "yes", "yes", 0.9), ("What is on the left?", "owl", "pig", 0.5)]}
    scenes = DemoResults([], features, {"stage 2": captions}, None, tmp_path, [row, row], questions)
    others = DemoResults(
        [Record("0", str(tmp_path / "scene.png"), ("A pigeon.",))], features[:1], {"stage 2": ["A dove."]}
    )
    write_conversations(tmp_path / "page.html", writer, writer, scenes, others, 2)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    talks, wrong = page.split("<h2>Wrong answers</h2>")
    assert "<script" not in page and page.count("A cat &lt;script&gt;") == 2
    assert talks.count('<div class="card">') == 3 * 5  # an image and four turns for each of three images
    assert talks.count('<div class="right">A pig to the left of a crown on red.</div>') == 1
    assert "wrong objects, relation, color: A pig left of a crown on red" in talks and "A pig to the" not in wrong
    evidence = (r"p 0\.\d\d, blank image 0\.\d\d<", "least certain: ", "bright: looked at for ")
    assert [len(re.findall(each, talks)) for each in evidence] == [3 * 4] * 3
    # Exactly the wrong answers are shown again, with the wrong one of the other model.
    assert wrong.count('<div class="card">') == talks.count("\N{BALLOT X}") + 1
    assert "it is pig (" in wrong and "owl" in wrong and "Is there a pig?" not in wrong and "it is: A pigeon" in wrong
    order = [float(each) for each in re.findall(r"p (0\.\d\d), blank", wrong)]
    assert order == sorted(order, reverse=True) and len(order) == wrong.count('<div class="card">')

"""The model of lmms-eval: its scores on a task of local files are those of the pipeline's own texts.

The tests with lmms-eval run where it is installed: it does not fit into the environment of the other tests.
"""

import ast
import json
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from blip2.decoding.options import Decoding
from blip2.errors import InputError
from conftest import COLORS, SHAPES, draw
from fixtures.tiny import save_writer

ROOT = Path(__file__).parents[2]
needs_lmms_eval = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")

HEAD = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
doc_to_visual: !function functions.images
doc_to_text: !function functions.text
doc_to_target: answer
"""
GENERATE = """
output_type: generate_until
generation_kwargs: {{max_new_tokens: 6, temperature: 0, do_sample: false, num_beams: {beams}, until: ["zz"], x: 1}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
FUNCTIONS = """
from PIL import Image

def images(document):
    return [Image.open(path) for path in document["images"]]

def text(document, lmms_eval_specific_kwargs=None):
    return document["question"]
"""


def test_the_entry_point_names_the_manifest():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["lmms_eval.models"]["blip2"].split(":")
    path = ROOT / "src" / Path(*module.split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text())
    [manifest] = [each.value for each in tree.body if isinstance(each, ast.Assign) and each.targets[0].id == name]
    [given] = [each.value.value for each in manifest.keywords if each.arg == "simple_class_path"]
    assert given.rpartition(".")[0] == module
    assert given.rpartition(".")[2] in [each.name for each in tree.body if isinstance(each, ast.ClassDef)]


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    """A tiny stage-2 model with random weights."""
    return save_writer(parts, tmp_path_factory.mktemp("writer"))


def evaluate(folder, checkpoint, rows, task, **options):
    """The results of lmms-eval on one task of local files."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "local.yaml").write_text("task: local" + HEAD.format(folder=folder) + task)
    return simple_evaluate(
        model="blip2",
        model_args=f"pretrained={checkpoint},dtype=fp32",
        tasks=["local"],
        device="cpu",
        task_manager=TaskManager(include_path=str(folder), include_defaults=False, model_name="blip2"),
        bootstrap_iters=0,
        **options,
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    images = [draw(shape, color, 0) for shape in SHAPES for color in COLORS][:5]
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(5)]


@needs_lmms_eval
@pytest.mark.filterwarnings("default")
def test_texts_of_a_task_are_those_of_the_pipeline(checkpoint, photos, tmp_path, caplog):
    from blip2 import load

    pipeline = load(checkpoint, "cpu", "fp32")
    decoding = Decoding(num_beams=3, max_new_tokens=6, stop_strings=("zz",))
    questions = [f"what is it {number}" for number in range(5)]
    answers = pipeline.answer(photos, questions, decoding)
    assert len(set(answers)) > 1
    rows = [
        {"images": [photo], "question": f"<image>\n{question}", "answer": answer if number else "something else"}
        for number, (photo, question, answer) in enumerate(zip(photos, questions, answers, strict=True))
    ]
    results = evaluate(tmp_path, checkpoint, rows, GENERATE.format(beams=3), batch_size=2)
    assert results["results"]["local"]["exact_match,none"] == pytest.approx(0.8)
    assert [each["filtered_resps"] for each in results["samples"]["local"]] == [[answer] for answer in answers]
    assert "without effect on this model: x" in caplog.text


@needs_lmms_eval
@pytest.mark.filterwarnings("default")
def test_several_images_and_none(checkpoint, photos, tmp_path):
    from blip2 import load

    pipeline, decoding = load(checkpoint, "cpu", "fp32"), Decoding(num_beams=1, max_new_tokens=6)
    parts = ["", {"type": "image", "image": photos[0]}, "and ", {"type": "image", "image": photos[1]}, " alike"]
    content = [{"type": "text", "text": each} if isinstance(each, str) else each for each in parts if each]
    expected = [pipeline.chat().ask(content, decoding), pipeline.chat(photos[:3]).ask("which", decoding)]
    expected.append(pipeline.chat().ask("why", decoding))
    rows = [
        {"images": photos[:2], "question": "<image>and <image> alike", "answer": expected[0]},
        {"images": photos[:3], "question": "which", "answer": expected[1]},
        {"images": [], "question": "why", "answer": expected[2]},
    ]
    results = evaluate(tmp_path, checkpoint, rows, GENERATE.format(beams=1))
    assert [each["filtered_resps"] for each in results["samples"]["local"]] == [[each] for each in expected]


@needs_lmms_eval
@pytest.mark.filterwarnings("default")
def test_likelihoods_and_rounds(checkpoint, photos):
    """Called as lmms-eval does. Its version 0.7.3 makes texts of likelihoods, so that no task can use them."""
    from lmms_eval.api.instance import Instance
    from PIL import Image

    from blip2 import load
    from blip2.evaluation.lmms_eval import Blip2

    pipeline, model = load(checkpoint, "cpu", "fp32"), Blip2(str(checkpoint), "cpu", "fp32", "2")
    model.task_dict = {"local": {"test": photos}}
    metadata = {"task": "local", "doc_id": 0, "repeats": 1}
    place = (lambda photo: [Image.open(photo)], 0, "local", "test")
    [written] = pipeline.answer(photos[0], "what is it", Decoding(num_beams=1, max_new_tokens=5))
    texts = ["a red disc", "b", written]
    given = [f" {text}" for text in texts[:2]] + [lambda _: written]
    asked = [Instance("loglikelihood", ("what is it", each, *place), 0, metadata) for each in given]
    found = model.loglikelihood(asked)
    prompts = pipeline.format_questions(["what is it"] * 3)
    own = pipeline.log_likelihood(photos[0], prompts, texts, [0, 0, 0])
    assert [value for value, _ in found] == pytest.approx(own.tolist(), abs=1e-3)
    assert [greedy for _, greedy in found[:2]] == [False, False]

    def next_round(document, previous_output, round_idx, previous_round_info):
        assert (document, round_idx, len(previous_output)) == (photos[0], (previous_round_info or 0) + 1, round_idx)
        return None, f"and then {previous_output[-1]}", round_idx == 2, previous_output, round_idx

    arguments = ("what is it", {"max_new_tokens": 5}, place[0], next_round, *place[1:])
    [rounds] = model.generate_until_multi_round([Instance("generate_until_multi_round", arguments, 0, metadata)])
    second = pipeline.answer(photos[0], f"and then {written}", Decoding(num_beams=1, max_new_tokens=5))
    assert rounds == [written, *second]


@needs_lmms_eval
def test_what_cannot_be_run(checkpoint, tmp_path):
    from blip2.evaluation.lmms_eval import Blip2

    with pytest.raises(InputError, match="batch_size is 'auto', expected a number"):
        Blip2(str(checkpoint), "cpu", batch_size="auto")
    model = Blip2(str(checkpoint), "cpu")
    model.task_dict = {"films": {"test": [{}]}}
    with pytest.raises(InputError, match="films has a str where images were expected"):
        model._images(lambda _: ["film.mp4"], 0, "films", "test")
    sampled = model._decoding({"temperature": 0.5, "max_new_tokens": 10**6}, 40)
    assert sampled.do_sample and sampled.temperature == 0.5
    assert sampled.max_new_tokens == model._pipeline.model.language.max_position_embeddings - 40
    assert not model._decoding({"temperature": 0.5, "do_sample": False, "top_k": 3}, 40).do_sample

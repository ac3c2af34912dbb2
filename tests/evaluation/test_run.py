"""Evaluation of tiny models on tables of images."""

import json
import os
import shutil
import time
from pathlib import Path

import datasets
import pytest
import torch

from blip2.cli import main
from blip2.config import DataConfig, EvaluationConfig
from blip2.decoding.search import Decoding
from blip2.errors import InputError
from blip2.evaluation.data import EvalData
from blip2.evaluation.report import MAX_EXAMPLES
from blip2.evaluation.retrieval import recall
from blip2.evaluation.run import evaluate as evaluate_config
from blip2.evaluation.tasks import CHUNK_SIZE
from blip2.io import lock_folder
from blip2.pipelines import GenerationPipeline, load
from conftest import COLORS, SHAPES, draw
from fixtures.processes import start_two

GREEDY = {"num_beams": 1, "max_new_tokens": 4}
QUESTIONS = ("what color?", "what shape?", "is it round?")


def greedy_vqa(runs, table):
    """The arguments of an evaluation of questions, without its output."""
    return ["evaluate", str(runs["llama"]), "--task", "vqa", "--data", table, "--num-beams", "1", "--device", "cpu"]


def evaluate(model, task, data, output, seed=0, **options):
    return evaluate_config(model, EvaluationConfig(task, data, **options), output, seed=seed, device="cpu")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Three questions about each of 48 images, ten answers to each, and one image that is broken."""
    folder = tmp_path_factory.mktemp("table")
    rows = []
    for shade in range(4):
        for shape in SHAPES:
            for color in COLORS:
                name = f"{color}-{shape}-{shade}.png"
                draw(shape, color, 10 * shade).save(folder / name)
                for question, answer in zip(QUESTIONS, (color, shape, "yes" if shape == "disc" else "no"), strict=True):
                    kind = "yes/no" if question == "is it round?" else "other"
                    rows.append({
                        "image": name, "question": question, "answers": [answer] * 7 + ["who knows"] * 3,
                        "question_id": 1000 + len(rows), "answer_type": kind,
                    })  # fmt: skip
    (folder / rows[3]["image"]).write_bytes(b"no image")
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def read(folder):
    return [json.loads((folder / name).read_text()) for name in ("metrics.json", "predictions.json")]


def test_answers(runs, table, tmp_path):
    metrics = evaluate(runs["llama"], "vqa", table, tmp_path, **GREEDY)
    found, predictions = read(tmp_path)
    assert found == json.loads(json.dumps(metrics))
    rows = [json.loads(line) for line in Path(table).read_text().splitlines()]
    assert (metrics["records"], metrics["answered"], metrics["images_skipped"]) == (len(rows), len(rows) - 3, 1)
    assert "is not an image" in metrics["skipped"][0]
    assert [row["question_id"] for row in predictions] == [
        r["question_id"] for r in rows if r["image"] != rows[3]["image"]
    ]
    pipeline = load(runs["llama"], device="cpu")
    for row, said in ((rows[0], predictions[0]), (rows[7], predictions[4])):
        image = Path(table).parent / row["image"]
        assert pipeline.answer(image, row["question"], Decoding(**GREEDY)) == [said["answer"]]
    page = (tmp_path / "report.html").read_text()
    assert page.count('class="card"') == 3 * MAX_EXAMPLES and "what color?" in page
    assert not (tmp_path / "parts").exists()


def test_an_image_that_cannot_be_used_is_named_and_counted_once(runs, tmp_path, caplog):
    """Also if it has no path, and its questions are in two chunks of work."""
    good = tmp_path / "good.png"
    draw("disc", "red", 0).save(good)
    images = [good.read_bytes(), b"damaged"]
    rows = [{"image": images[i % 2], "question": "what is it?", "answer": "disc"} for i in range(2 * CHUNK_SIZE)]
    source = str(tmp_path / "questions.parquet")
    datasets.Dataset.from_list(rows).to_parquet(source)
    metrics = evaluate(runs["llama"], "vqa", source, tmp_path / "out", **GREEDY)
    assert (metrics["images_skipped"], metrics["answered"]) == (1, CHUNK_SIZE)
    assert metrics["skipped"][0].startswith(f"{source} row 1: image of 7 bytes")
    assert "1 images of" in caplog.text and "are not scored; the first: " in caplog.text
    datasets.Dataset.from_list(rows[1:2]).to_parquet(source)
    for task in ("vqa", "captioning"):
        with pytest.raises(InputError, match=r"none of the 1 records of .* has an image that can be used"):
            evaluate(runs["llama"], task, source, tmp_path / task, **GREEDY)


def test_right_answers_score(runs, table, tmp_path, monkeypatch):
    rows = {}
    for line in Path(table).read_text().splitlines():
        row = json.loads(line)
        rows[(row["image"], row["question"])] = row["answers"][0]
    truth = iter(value for (image, _), value in rows.items() if image != "green-square-0.png")

    def know(self, images, prompts, *others, **named):
        return [next(truth) if "color" in prompt else (next(truth), "nonsense")[1] for prompt in prompts]

    monkeypatch.setattr(GenerationPipeline, "generate", know)
    metrics = evaluate(runs["llama"], "vqa", table, tmp_path, **GREEDY)
    # Seven of ten gave the answer: 1 for each of them and for the three others.
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["by_answer_type"] == {"other": pytest.approx(1 / 2), "yes/no": 0.0}


def test_a_killed_evaluation_goes_on_and_two_processes_give_the_same(runs, table, tmp_path, monkeypatch):
    whole = evaluate(runs["llama"], "vqa", table, tmp_path / "whole", **GREEDY)
    generate, calls = GenerationPipeline.generate, []

    def stop(self, *given, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, *given, **named)

    monkeypatch.setattr(GenerationPipeline, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(runs["llama"], "vqa", table, tmp_path / "killed", **GREEDY)
    assert not (tmp_path / "killed" / "metrics.json").exists()
    assert evaluate(runs["llama"], "vqa", table, tmp_path / "killed", **GREEDY) == whole
    assert len(calls) == 2 + 2  # three parts, of which the first was done

    start_two([*greedy_vqa(runs, table), "--max-new-tokens", "4", "--output", str(tmp_path / "two")], tmp_path)
    assert read(tmp_path / "two")[1] == read(tmp_path / "whole")[1]
    one, two = (read(tmp_path / name)[0] for name in ("whole", "two"))
    assert one == two


def read_late():
    """The second process looks for what was done a while after the first."""
    from blip2 import resumable as module

    wait = module.all_gather_objects

    def late(value):
        found = wait(value)
        if value is None and os.environ["RANK"] == "1":
            time.sleep(3)
        return found

    module.all_gather_objects = late


def test_what_was_done_stays_until_all_have_read_it(runs, table, tmp_path):
    start_two([*greedy_vqa(runs, table), "--output", str(tmp_path / "late")], tmp_path, read_late)
    assert read(tmp_path / "late")[0]["answered"] > 0 and not (tmp_path / "late" / "parts").exists()


def test_captions(runs, parts, tmp_path):
    metrics = evaluate(runs["t5"], "captioning", parts.images, tmp_path, **GREEDY, limit=20)
    found, predictions = read(tmp_path)
    assert (metrics["records"], metrics["images"], len(predictions)) == (20, 20, 20)
    pipeline = load(runs["t5"], device="cpu")
    first = Path(parts.images).parent / json.loads(Path(parts.images).read_text().splitlines()[0])["image"]
    assert pipeline.caption(first, None, Decoding(**GREEDY)) == [predictions[0]["caption"]]
    assert found["CIDEr"] is not None


@pytest.fixture
def no_meteor(tmp_path_factory, monkeypatch):
    """Java tokenizes and does nothing else, because METEOR takes seconds."""
    pytest.importorskip("pycocoevalcap")
    real = shutil.which("java")
    if real is None:
        pytest.skip("needs Java")
    java = tmp_path_factory.mktemp("bin") / "java"
    java.write_text(f'#!/bin/sh\ncase "$*" in *PTBTokenizer*) exec {real} "$@";; esac\nexit 1\n')
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(java.parent), prepend=os.pathsep)


@pytest.mark.usefixtures("no_meteor")
def test_captions_of_one_image_in_several_rows_are_the_truth_of_one(runs, parts, tmp_path):
    rows = [json.loads(line) for line in Path(parts.images).read_text().splitlines()][:4]
    file = Path(parts.images).parent / "flat.jsonl"
    file.write_text(
        "".join(json.dumps({"image": r["image"], "caption": c}) + "\n" for r in rows for c in r["captions"])
    )
    flat = evaluate(runs["llama"], "captioning", str(file), tmp_path / "flat", **GREEDY)
    nested = evaluate(runs["llama"], "captioning", parts.images, tmp_path / "nested", **GREEDY, limit=4)
    assert (flat["records"], flat["images"]) == (8, 4)
    assert flat["CIDEr"] == nested["CIDEr"] is not None
    file.unlink()


@pytest.mark.parametrize("fusion", ["itm", "itm+itc", "itm+itc/temperature"])
def test_retrieval(runs, parts, tmp_path, fusion):
    metrics = evaluate(runs["stage1"], "retrieval", parts.images, tmp_path, rerank_k=5, fusion=fusion)
    rows = [json.loads(line) for line in Path(parts.images).read_text().splitlines()]
    texts = [text for row in rows for text in row["captions"]]
    assert (metrics["images"], metrics["texts"]) == (len(rows), len(texts))
    pipeline = load(runs["stage1"], device="cpu")
    images = [Path(parts.images).parent / row["image"] for row in rows]
    similarity = pipeline.similarity(images, texts)
    positive = torch.zeros_like(similarity, dtype=torch.bool)
    for i in range(len(rows)):
        positive[i, 2 * i : 2 * i + 2] = True
    found = recall(similarity, positive)  # which is tested elsewhere
    assert metrics["itc"]["TR@1"] == pytest.approx(found["r1"]) and metrics["itc"]["TR@10"] == found["r10"]
    # All pairs by matching, of which only those on the shortlist count.
    every = torch.arange(len(texts)).expand(len(rows), -1)
    logits = pipeline.match_candidates(images, texts, every)
    log_odds = logits[..., 1] - logits[..., 0]
    scores = {
        "itm": log_odds,
        "itm+itc": logits[..., 1] + similarity,
        "itm+itc/temperature": log_odds + similarity / pipeline.model.temperature,
    }[fusion]
    among = torch.zeros_like(positive)
    for t in range(len(texts)):
        among[similarity[:, t].topk(5).indices, t] = True
    reranked = recall(scores.masked_fill(~among, -torch.inf).T, positive.T)
    assert metrics[fusion]["IR@1"] == pytest.approx(reranked["r1"]) and metrics[fusion]["IR@5"] == pytest.approx(
        reranked["r5"]
    )
    assert "rank of its image: " in (tmp_path / "report.html").read_text()


def test_two_processes_retrieve_as_one(runs, parts, tmp_path):
    """70 images: two parts of the work."""
    (tmp_path / "data").mkdir()
    rows = []
    for i in range(70):
        color, shape = list(COLORS)[i % 4], SHAPES[i % 3]
        draw(shape, color, i).save(tmp_path / "data" / f"{i}.png")
        rows += [{"image": f"{i}.png", "caption": text} for text in (f"a {color} {shape}", f"number {i}")]
    data = tmp_path / "data" / "some.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["evaluate", str(runs["stage1"]), "--task", "retrieval", "--data", str(data), "--rerank-k", "3"]
    start_two([*arguments, "--device", "cpu", "--output", str(tmp_path / "two")], tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two has
    try:
        evaluate(runs["stage1"], "retrieval", str(data), tmp_path / "one", rerank_k=3)
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "one/metrics.json").read_bytes() == (tmp_path / "two/metrics.json").read_bytes()
    assert (tmp_path / "one/report.html").read_bytes() == (tmp_path / "two/report.html").read_bytes()


def test_sampled_texts_do_not_depend_on_who_writes_them(runs, table, tmp_path):
    """Each part begins with a seed of its own."""
    options = {"top_p": 0.9, "max_new_tokens": 4}
    whole = evaluate(runs["llama"], "vqa", table, tmp_path / "whole", seed=3, **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    (tmp_path / "again/metrics.json").unlink()  # killed before it was done, with nothing left but what it is of
    torch.manual_seed(99)
    assert evaluate(runs["llama"], "vqa", table, tmp_path / "again", seed=3, **options) == whole
    assert read(tmp_path / "again")[1] == read(tmp_path / "whole")[1]
    evaluate(runs["llama"], "vqa", table, tmp_path / "other", seed=4, **options)
    assert read(tmp_path / "other")[1] != read(tmp_path / "whole")[1]


def test_images_are_read_when_they_are_looked_at(runs, tmp_path):
    """Of a table that holds them no more than a part's are in memory."""
    images = []
    for i in range(130):
        draw("disc", "red", i).save(tmp_path / "image.png")
        images.append({"bytes": (tmp_path / "image.png").read_bytes(), "path": None})
    rows = {"image": images, "question": ["what?"] * 130, "answers": [["a disc"] * 10] * 130}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(tmp_path / "saved")
    table = EvalData(DataConfig(train=str(tmp_path / "saved")))
    assert [record.image for record in table.records] == [None] * 130
    assert len(set(table.image_ids)) == 130 and table.image(7) == images[7]["bytes"]
    metrics = evaluate(runs["llama"], "vqa", str(tmp_path / "saved"), tmp_path / "out", **GREEDY)
    assert metrics["answered"] == 130


def write(folder, rows):
    folder.mkdir()
    for row in rows:
        draw("disc", "red", 0).save(folder / row["image"])
    file = folder / "some.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_what_was_done_is_not_done_again(runs, table, tmp_path, monkeypatch):
    once = evaluate(runs["llama"], "vqa", table, tmp_path, **GREEDY, limit=3)
    monkeypatch.setattr(GenerationPipeline, "generate", None)
    assert evaluate(runs["llama"], "vqa", table, tmp_path, **GREEDY, limit=3) == once


@pytest.mark.parametrize(
    ("task", "keys"), [("vqa", ("questionId", "prediction")), ("captioning", ("image_id", "caption"))]
)
def test_ids_may_be_names(runs, tmp_path, monkeypatch, task, keys):
    monkeypatch.setenv("PATH", str(tmp_path))  # without Java, because its metrics take seconds
    text = (
        {"question": "what?", "answers": ["a disc"], "question_id": "first"} if task == "vqa" else {"caption": "a disc"}
    )
    data = write(tmp_path / "data", [{"image": "a.png", "image_id": "first", **text}])
    evaluate(runs["llama"], task, data, tmp_path / "out", **GREEDY)
    (said,) = read(tmp_path / "out")[1]
    assert tuple(said) == keys and said[keys[0]] == "first"


def test_domains(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # without Java, because its metrics take seconds
    rows = [{"image": f"{i}.png", "caption": f"a disc {i}", "domain": "in" if i % 2 else "out"} for i in range(4)]
    metrics = evaluate(runs["llama"], "captioning", write(tmp_path / "data", rows), tmp_path / "out", **GREEDY)
    assert set(metrics["by_domain"]) == {"in", "out"}
    assert metrics["by_domain"]["in"].keys() == set(metrics["by_domain"]["out"]) >= {"CIDEr", "SPICE"}


# -- what cannot be --------------------------------------------------------------------------------------------------


def test_an_output_belongs_to_one_evaluation(runs, parts, table, tmp_path):
    evaluate(runs["llama"], "vqa", table, tmp_path, **GREEDY, limit=3)
    with pytest.raises(InputError, match=r"contains another evaluation, whose records is 3 instead of 2: give another"):
        evaluate(runs["llama"], "vqa", table, tmp_path, **GREEDY, limit=2)


def test_an_output_belongs_to_the_records_as_they_were(runs, tmp_path):
    """Metrics of a table that was corrected are not those of the table before."""
    row = {"image": "a.png", "question": "what?", "answers": ["a disc"]}
    data = write(tmp_path / "data", [row])
    evaluate(runs["llama"], "vqa", data, tmp_path / "out", **GREEDY)
    Path(data).write_text(json.dumps({**row, "answers": ["a cube"]}))
    with pytest.raises(InputError, match="contains another evaluation, whose records_digest is"):
        evaluate(runs["llama"], "vqa", data, tmp_path / "out", **GREEDY)


def test_an_output_that_another_evaluation_is_writing(runs, table, tmp_path):
    with lock_folder(tmp_path), pytest.raises(InputError, match="is in use by another job of this process"):
        evaluate(runs["llama"], "vqa", table, tmp_path, **GREEDY)
    assert list(tmp_path.iterdir()) == []


def test_damaged_notes_are_named(runs, table, tmp_path):
    """Other files in the folder are kept."""
    whole = evaluate(runs["llama"], "vqa", table, tmp_path, **GREEDY)
    for name, torn in (("evaluation.json", b'{"task": "v\xff'), ("metrics.json", b"[1]")):
        (tmp_path / name).write_bytes(torn)
        with pytest.raises(
            InputError, match=rf"{name} (is damaged|contains a JSON list).*: delete this file if the other files"
        ) as error:
            evaluate(runs["llama"], "vqa", table, tmp_path, **GREEDY)
        assert "\n" not in str(error.value)
        (tmp_path / name).unlink()
        assert evaluate(runs["llama"], "vqa", table, tmp_path, **GREEDY) == whole


def test_a_full_disk(runs, table, small_disk):
    with pytest.raises(InputError, match=r"disk/out cannot be written \(No space left on device\): free disk") as error:
        evaluate(runs["llama"], "vqa", table, small_disk(16) / "out", **GREEDY)
    assert "\n" not in str(error.value)


def test_tasks_that_do_not_fit(runs, parts, table, tmp_path):
    with pytest.raises(InputError, match=r"row 0 .* has no question, which the task vqa needs"):
        evaluate(runs["llama"], "vqa", parts.images, tmp_path / "a", **GREEDY)
    with pytest.raises(InputError, match="contains only stage representation"):
        evaluate(runs["stage1"], "vqa", table, tmp_path / "b", **GREEDY)
    with pytest.raises(InputError, match="contains only stage generation"):
        evaluate(runs["llama"], "retrieval", parts.images, tmp_path / "c")
    with pytest.raises(InputError, match=r"the prompt 'what' has no \{\}, which stands for the question: add \{\}"):
        evaluate(runs["llama"], "vqa", table, tmp_path / "d", prompt="what")


def test_two_questions_of_one_id(runs, tmp_path):
    row = {"image": "a.png", "question": "what?", "answers": ["a disc"], "question_id": 7}
    with pytest.raises(InputError, match="1 question ids occur more than once in the data, the first is 7: give each"):
        evaluate(runs["llama"], "vqa", write(tmp_path / "data", [row, row]), tmp_path / "out", **GREEDY)


def test_the_command(runs, table, tmp_path, capsys):
    command = ["evaluate", str(runs["llama"]), "--task", "vqa", "--data", table, "--output", str(tmp_path / "out")]
    assert main([*command, "--limit", "2", "--num-beams", "1", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["answered"] == 2
    assert main([*command, "--limit", "3", "--num-beams", "1", "--device", "cpu"]) == 2
    assert "contains another evaluation" in capsys.readouterr().err

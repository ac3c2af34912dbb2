"""Answers by ranking candidates: choices of each record, and lists of answers for all."""

import json
from dataclasses import replace

import pytest
import torch

from blip2.cli import main
from blip2.config import DataConfig, EvaluationConfig
from blip2.decoding.search import Decoding
from blip2.errors import InputError
from blip2.evaluation.control import flatten_scores
from blip2.evaluation.data import EvalData, read_answer_list
from blip2.evaluation.run import evaluate as evaluate_config
from blip2.evaluation.tasks import find_candidates, reference_answers
from blip2.pipelines import load
from conftest import COLORS, SHAPES, draw

GREEDY = {"num_beams": 1, "max_new_tokens": 4}
ANSWERS = ["red", "green", "blue", "yellow", "yes", "no"]


def evaluate(model, data, output, **options):
    return evaluate_config(model, EvaluationConfig("vqa", data, **GREEDY, **options), output, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two questions about each of twelve images, with four and with two choices."""
    folder = tmp_path_factory.mktemp("choices")
    rows = []
    for shape in SHAPES:
        for color in COLORS:
            name = f"{color}-{shape}.png"
            draw(shape, color, 0).save(folder / name)
            about = {"image": name, "question_type": shape}
            rows += [
                {**about, "question": "what color?", "answers": [color], "choices": list(COLORS)},
                {**about, "question": "a disc?", "answers": ["yes" if shape == "disc" else "no"],
                 "choices": ["yes", "no"]},
            ]  # fmt: skip
    (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "answers.txt").write_text("\n".join(["", *ANSWERS, ""]))
    (folder / "answers.json").write_text(json.dumps(ANSWERS))
    return folder


def rows(folder):
    return [json.loads(line) for line in (folder / "some.jsonl").read_text().splitlines()]


def rewrite(folder, target, change):
    """The records with a change to each."""
    changed = [{**row, "image": str(folder / row["image"])} for row in rows(folder)]
    for row in changed:
        change(row)
    target.write_text("".join(json.dumps(row) + "\n" for row in changed))
    return str(target)


@pytest.mark.parametrize("by", ["lm", "pmi"])
def test_choices_are_ranked_as_by_the_pipeline(runs, folder, tmp_path, by):
    metrics = evaluate(runs["llama"], str(folder / "some.jsonl"), tmp_path, rank_by=by)
    pipeline, asked = load(runs["llama"], device="cpu"), rows(folder)
    found = json.loads((tmp_path / "ranked.json").read_text())
    for number, (row, said) in enumerate(zip(asked[:4], found, strict=False)):
        (ranked,) = pipeline.rank(folder / row["image"], row["choices"], row["question"], by)
        assert said == {
            "question_id": number, "answer": ranked[0].text,
            "probability": pytest.approx(ranked[0].probability, abs=1e-4),
        }  # fmt: skip
    right = [said["answer"] == row["answers"][0] for row, said in zip(asked, found, strict=True)]
    assert metrics["ranked"]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert set(metrics["ranked"]["by_question_type"]) == set(SHAPES)
    assert metrics["ranked"]["accuracy_at_coverage"]["100"] == metrics["ranked"]["accuracy"]
    assert 0 <= metrics["ranked"]["expected_calibration_error"] <= 1
    page = (tmp_path / "report.html").read_text()
    assert f"ranked first: {found[0]['answer']} ({found[0]['probability']:.2f})" in page


def test_generated_answers_are_the_same_with_ranking(runs, folder, tmp_path):
    data = str(folder / "some.jsonl")
    plain = evaluate(runs["t5"], data, tmp_path / "plain", limit=8)
    both = evaluate(runs["t5"], data, tmp_path / "both", rank_by="lm", calibration=True, limit=8)
    added = {"ranked", "rank_by", "calibration", "expected_calibration_error", "accuracy_at_coverage"}
    assert set(both) - set(plain) == added and {name: both[name] for name in plain} == plain
    assert (tmp_path / "plain/predictions.json").read_bytes() == (tmp_path / "both/predictions.json").read_bytes()
    assert not (tmp_path / "plain/ranked.json").exists()


def test_a_list_of_answers_for_all(runs, folder, tmp_path, monkeypatch):
    data = str(folder / "some.jsonl")
    options = {"rank_by": "lm", "limit": 6}
    text = evaluate(runs["llama"], data, tmp_path / "text", answer_list=str(folder / "answers.txt"), **options)
    monkeypatch.setattr("blip2.evaluation.tasks.MAX_RANKED", 7)  # a question at a time
    listed = evaluate(runs["llama"], data, tmp_path / "json", answer_list=str(folder / "answers.json"), **options)
    assert dict(flatten_scores(text["ranked"])) == pytest.approx(dict(flatten_scores(listed["ranked"])), abs=1e-4)
    (first, *_), row = json.loads((tmp_path / "text/ranked.json").read_text()), rows(folder)[0]
    (ranked,) = load(runs["llama"], device="cpu").rank(folder / row["image"], ANSWERS, row["question"])
    assert first["answer"] == ranked[0].text
    (folder / "answers.txt").write_text("\n".join(ANSWERS[:-1]))
    try:
        with pytest.raises(InputError, match="contains another evaluation, whose answer_list_digest is"):
            evaluate(runs["llama"], data, tmp_path / "text", answer_list=str(folder / "answers.txt"), **options)
    finally:
        (folder / "answers.txt").write_text("\n".join(ANSWERS))


def test_the_control_ranks_too(runs, folder, tmp_path):
    metrics = evaluate(runs["llama"], str(folder / "some.jsonl"), tmp_path, rank_by="lm", control=True, limit=6)
    assert metrics["gap_blank"]["ranked"]["accuracy"] == pytest.approx(
        metrics["ranked"]["accuracy"] - metrics["blank"]["ranked"]["accuracy"]
    )


def test_a_prompt_of_one_s_own(runs, folder, tmp_path):
    data, prompt = str(folder / "some.jsonl"), "Q: {} A:"
    metrics = evaluate(runs["llama"], data, tmp_path, rank_by="lm", prompt=prompt, limit=2)
    row = rows(folder)[0]
    pipeline = load(runs["llama"], device="cpu")
    (ranked,) = pipeline.rank(folder / row["image"], row["choices"], row["question"], prompt=prompt)
    (same,) = pipeline.rank(folder / row["image"], row["choices"], prompt="Q: what color? A:")
    assert json.loads((tmp_path / "ranked.json").read_text())[0]["answer"] == ranked[0].text == same[0].text
    assert ranked[0].score == pytest.approx(same[0].score, abs=1e-4) and "ranked" in metrics


def test_confidences_are_those_of_answers_with_details(runs, folder, tmp_path):
    metrics = evaluate(runs["llama"], str(folder / "some.jsonl"), tmp_path, calibration=True)
    asked = rows(folder)
    images, questions = [folder / row["image"] for row in asked], [row["question"] for row in asked]
    made = load(runs["llama"], device="cpu").answer(
        images, questions, Decoding(length_penalty=-1.0, **GREEDY), details=True
    )
    mean = sum(each.confidence for each in made) / len(made)
    assert metrics["accuracy"] == 0  # so that all that is left of each bin's gap is its confidence
    assert metrics["expected_calibration_error"] == pytest.approx(mean, abs=1e-4)


def test_several_reference_answers(runs, folder, tmp_path):
    """They need not be among the choices."""

    def change(row):
        row["answers"] = [*row["answers"], *["who knows"] * 9]

    metrics = evaluate(
        runs["llama"], rewrite(folder, tmp_path / "several.jsonl", change), tmp_path / "out", rank_by="lm"
    )
    assert 0 <= metrics["ranked"]["accuracy"] <= 0.3


def test_without_reference_answers_there_are_only_predictions(runs, folder, tmp_path):
    data = rewrite(folder, tmp_path / "open.jsonl", lambda row: row.pop("answers"))
    metrics = evaluate(runs["llama"], data, tmp_path / "out", rank_by="lm", calibration=True)
    assert "ranked" not in metrics and "accuracy" not in metrics
    assert len(json.loads((tmp_path / "out/ranked.json").read_text())) == 24


# -- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (None, r"row 3 \(.*\) has no choices, among which to rank answers: add a column choices"),
        (["no"], r"row 3 .*choices holds \['no'\], expected at least two texts that differ"),
        (["no", "no"], r"choices holds \['no', 'no'\], expected at least two"),
        (["no", " "], r"choices holds \['no', ''\], expected at least two"),
        (["no", {"a": 1}], r"choices holds an object with the keys a, expected text"),
        (["yes", "maybe"], r"has the answer 'no', which is not one of its choices \['yes', 'maybe'\]: write the text"),
    ],
)
def test_choices_that_cannot_be_used(folder, tmp_path, choices, expected):
    def change(row):
        if row["image"].endswith("green-square.png") and len(row["choices"]) == 2:
            row["choices"] = choices

    data = EvalData(DataConfig(train=rewrite(folder, tmp_path / "bad.jsonl", change)))  # they matter to ranking alone
    with pytest.raises(InputError, match=expected) as error:
        find_candidates(data, None, reference_answers(data), "official")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "yes", "has 1 entries, 0 of them blank or not text and 0 repeated, expected at least two"),
        ("a.txt", "yes\nno\nyes\n", "has 3 entries, 0 of them blank or not text and 1 repeated"),
        ("a.JSON", '["yes", 3]', "has 2 entries, 1 of them blank or not text"),
        ("a.json", '["yes", 3]', "has 2 entries, 1 of them blank or not text"),
        ("a.json", '{"yes": 1}', "has 0 entries"),
        ("a.json", "yes\nno", "cannot be read \\(Expecting value at character 0\\), expected a text file"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read .*, expected a text file with one answer per line"),
        ("missing.txt", None, "missing.txt cannot be read \\(No such file or directory\\)"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=expected) as error:
        read_answer_list(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"task": "captioning", "rank_by": "lm"}, "rank_by is set, but the task is captioning: leave out rank_by"),
        ({"task": "retrieval", "calibration": True}, "calibration is set, but the task is retrieval"),
        ({"answer_list": "a.txt"}, "answer_list is a.txt, but rank_by is null, so that nothing ranks these answers"),
        ({"calibration": True, "prompt": "{}"}, "calibration is on and prompt is '{}', but the confidence"),
    ],
)
def test_options_that_do_not_fit(options, expected):
    with pytest.raises(InputError) as error:
        EvaluationConfig(**{"task": "vqa", "data": "x", **options})
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)


def test_the_command(runs, folder, tmp_path, capsys):
    command = ["evaluate", str(runs["llama"]), "--task", "vqa", "--data", str(folder / "some.jsonl"), "--limit", "2"]
    command += ["--device", "cpu", "--num-beams", "1", "--output", str(tmp_path / "out")]
    assert main([*command, "--rank-by", "pmi", "--answer-list", str(folder / "answers.txt"), "--calibration"]) == 0
    assert "expected_calibration_error" in json.loads(capsys.readouterr().out)["ranked"]
    assert main([*command[:-1], str(tmp_path / "no"), "--rank-by", "pmi", "--answer-list", "no.txt"]) == 2
    assert (
        "error: the answer list no.txt cannot be read (No such file or directory), expected" in capsys.readouterr().err
    )
    given = tmp_path / "given.json"
    given.write_text("[]")
    arguments = ["--task", "vqa", "--data", str(folder / "some.jsonl"), "--output", str(tmp_path / "given")]
    assert main(["evaluate", "--predictions", str(given), *arguments, "--rank-by", "lm"]) == 2
    assert capsys.readouterr().err == (
        f"error: rank_by is set for {given}, but a file of predictions has no probabilities: give a model, or leave it"
        " out\n"
    )


def test_training_records_the_accuracy_of_ranked_answers(parts, folder, tmp_path):
    from blip2.evaluation.in_training import Evaluation, train
    from blip2.training.metrics import read_metrics

    recipe = parts.recipe(
        tmp_path / "run", stage="generation", language={"name": parts.llama, "prompt": "Question: {} Answer:"},
        data={"train": str(folder / "some.jsonl")}, training={"max_steps": 1, "save_steps": 1},
        evaluation={"task": "vqa", "data": str(folder / "some.jsonl"), "limit": 4, "rank_by": "lm", **GREEDY},
    )  # fmt: skip
    missing = replace(recipe.evaluation, answer_list=str(tmp_path / "no.txt"))
    with pytest.raises(InputError, match=r"no\.txt cannot be read"):  # before the training
        Evaluation(replace(recipe, evaluation=missing))
    torch.manual_seed(0)
    train(recipe)
    last = read_metrics(tmp_path / "run")[-1]
    assert {"evaluation_ranked_accuracy", "evaluation_ranked_expected_calibration_error"} <= set(last)

"""Predictions of any model, scored from the command line."""

import importlib.util
import json
import os

import pytest

from blip2.cli import main
from blip2.config import EvaluationConfig
from blip2.errors import InputError
from blip2.evaluation import tasks
from blip2.evaluation.run import evaluate
from conftest import draw

ROWS = [
    {"image": image, "question": question, "answers": answers, "question_id": number, "answer_type": kind}
    for image, question, answers, number, kind in (
        ("a.png", "what?", ["dogs"] * 4 + ["a dog"] * 6, 7, "other"),
        ("b.png", "how many?", ["2"] * 9 + ["3"], 9, "number"),
        ("b.png", "red?", ["yes"] * 10, 4, "yes/no"),
    )
]  # fmt: skip
ANSWERS = [
    {"question_id": 4, "answer": "yes"},
    {"question_id": 9, "answer": "three"},
    {"question_id": 7, "answer": "dog!"},
]


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


@pytest.fixture
def score(table, tmp_path, capsys):
    """``blip2 evaluate --predictions`` of some rows; what it printed."""

    def score(rows, *options, task="vqa", status=0, data=table):
        file = tmp_path / "given.json"
        file.write_text(json.dumps(rows))
        output = ["--output", str(tmp_path / "out")]
        assert (
            main(["evaluate", "--task", task, "--data", data, "--predictions", str(file), *output, *options]) == status
        )
        out, err = capsys.readouterr()
        if status:
            (line,) = err.splitlines()
            return line.replace(str(file), "FILE")
        return json.loads(out)

    return score


def test_answers(score, tmp_path):
    """Without a model, and without the images."""
    metrics = score(ANSWERS)
    # Six of ten said "a dog"; one of ten "3"; all of them "yes".
    assert metrics["by_answer_type"] == pytest.approx({"other": 1.0, "number": 0.3, "yes/no": 1.0})
    assert metrics["accuracy"] == pytest.approx(2.3 / 3)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert "true: a dog (6), dogs (4)" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ANSWERS[:2], "FILE: 1 missing question_id (7), expected all 3 ids of the data: add the missing entries"),
        ([*ANSWERS, ANSWERS[0]], "FILE: 1 repeated question_id (4): keep one entry for each id"),
        (
            [*ANSWERS, {"question_id": 5, "answer": "no"}],
            "FILE: 1 unknown question_id (5), expected only ids of the data: check that both are of the same split",
        ),
        ([{"image_id": 4, "caption": "a dog"}], 'FILE: 1 entry (0) in another format, the first is {"image_id": 4'),
        ({"4": "yes"}, "FILE holds one dict, expected a list: write the predictions as ["),
    ],
)
def test_files_that_do_not_fit(score, rows, message):
    assert score(rows, status=2).startswith(f"error: {message}")


def test_what_a_model_wrote_scores_the_same(runs, score, table, tmp_path):
    for name in ("a.png", "b.png"):
        draw("disc", "red", 0).save(tmp_path / name)
    wanted = evaluate(
        runs["llama"], EvaluationConfig("vqa", table, num_beams=1, max_new_tokens=4), tmp_path / "model", device="cpu"
    )
    rows = json.loads((tmp_path / "model" / "predictions.json").read_text())
    for name in ("a.png", "b.png"):
        (tmp_path / name).unlink()
    metrics = score(rows)
    assert {name: metrics[name] for name in ("accuracy", "by_answer_type")} == {
        name: wanted[name] for name in ("accuracy", "by_answer_type")
    }


def test_captions_of_other_images(score, tmp_path):
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps({"image": f"{i}.png", "caption": "a dog"}) + "\n" for i in range(3)))
    rows = [{"image_id": i, "caption": "a dog"} for i in range(3)]
    line = score(rows, "--limit", "2", task="captioning", data=str(file), status=2)
    assert line == (
        "error: FILE: 1 unknown image_id (2), expected only ids of the data: check that both are of the same split"
    )


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            (7, 7, 8),
            "row 0 (FOLDER/0.png) and FOLDER/captions.jsonl row 1 (FOLDER/1.png) have the image_id 7, but differ",
        ),
        (
            (5, "5", 6),
            "two images of FOLDER/captions.jsonl have the id 5, which is the image_id of one and the image_id",
        ),
        ((2, 3, None), "two images of FOLDER/captions.jsonl have the id 2, which is the image_id of one"),
    ],
)
def test_images_that_share_an_id(score, tmp_path, ids, message):
    """One of them would not be captioned, or its caption would be missing in the file of predictions."""
    file = tmp_path / "captions.jsonl"
    rows = [{"image": f"{i}.png", "caption": "a dog", "image_id": key} for i, key in enumerate(ids)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = score([], task="captioning", data=str(file), status=2)
    assert message in line.replace(str(tmp_path), "FOLDER")


def test_questions_whose_ids_are_one_in_a_file(score, tmp_path):
    file = tmp_path / "questions.jsonl"
    rows = [{"image": "a.png", "question": "what?", "answers": ["a dog"], "question_id": key} for key in (5, "5")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "1 question ids occur more than once in the data, the first is 5" in score([], data=str(file), status=2)


def test_ids_that_are_names(score, tmp_path):
    file = tmp_path / "named.jsonl"
    file.write_text(json.dumps({"image": "a.png", "question": "what?", "answers": ["dog"], "question_id": "07"}) + "\n")
    assert score([{"questionId": "07", "prediction": "dog"}], data=str(file))["accuracy"] == 1.0


def test_captions_without_java(score, tmp_path, monkeypatch):
    file = tmp_path / "captions.jsonl"
    file.write_text(json.dumps({"image": "a.png", "caption": "a dog", "image_id": 3}) + "\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    metrics = score([{"image_id": 3, "caption": "a dog"}], task="captioning", data=str(file))
    assert metrics["CIDEr"] is None
    reason = "the official metrics need Java, which is not installed: apt install"
    assert metrics["missing"]["CIDEr"].startswith(reason)


# -- lemmas ----------------------------------------------------------------------------------------------------------


def test_base_forms_are_missing_without_spacy(score):
    if importlib.util.find_spec("spacy") is not None:
        pytest.skip("spaCy is installed here")
    metrics = score(ANSWERS, "--lemmatize")
    assert metrics["accuracy_lemmatized"] is None
    assert metrics["missing"]["accuracy_lemmatized"].startswith("lemmatized OK-VQA answers need spaCy and its model")
    assert metrics["accuracy"] == pytest.approx(2.3 / 3)


@pytest.mark.parametrize("data_set", ["ok-vqa", "own"])
def test_base_forms_stand_beside_the_answers(score, table, tmp_path, monkeypatch, data_set):
    """Always for OK-VQA, otherwise where they are asked for."""
    seen = []
    monkeypatch.setattr(tasks, "lemmatize", lambda answers: seen.extend(answers) or [a.rstrip("s") for a in answers])
    rows = [ANSWERS[0], {**ANSWERS[1], "answer": "2s"}, {**ANSWERS[2], "answer": "dogs"}]
    data, options = table, ["--lemmatize"]
    if data_set == "ok-vqa":
        folder = tmp_path / "coco"
        (folder / "val2014").mkdir(parents=True)
        questions, annotations = [], []
        for row in ROWS:
            number = row["question_id"]
            (folder / "val2014" / f"COCO_val2014_{number:012}.jpg").touch()
            questions.append({"image_id": number, "question": row["question"], "question_id": number})
            answers = [
                {"answer": answer, "raw_answer": answer, "answer_id": i} for i, answer in enumerate(row["answers"])
            ]
            about = {"question_id": number, "image_id": number, "question_type": "x", "answer_type": "other"}
            annotations.append({**about, "answers": answers})
        for name, value in (
            ("OpenEnded_mscoco_val2014_questions.json", {"data_subtype": "val2014", "questions": questions}),
            ("mscoco_val2014_annotations.json", {"data_subtype": "val2014", "annotations": annotations}),
        ):
            (folder / name).write_text(json.dumps(value))
        data, options = f"ok-vqa:test:{folder}", []
    metrics = score(rows, *options, data=data)
    assert seen == ["dogs", "2s", "yes"]
    # "dogs", "2s" and "yes" were said by 4, 0 and 10 of ten; "dog", "2" and "ye" by 6, 9 and none.
    assert metrics["accuracy"] == pytest.approx((1 + 0 + 1) / 3)
    assert metrics["accuracy_lemmatized"] == pytest.approx((1 + 1 + 0) / 3)
    assert metrics["by_question_type"] == ({"x": metrics["accuracy"]} if data_set == "ok-vqa" else {})
    assert "accuracy_lemmatized" not in score(rows, "--output", str(tmp_path / "other"), data=table)


# -- data that do not fit, from the command line ---------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path):
    """A miniature of VQAv2's validation split: three questions about two images."""
    folder = tmp_path / "coco"
    (folder / "val2014").mkdir(parents=True)
    for number in (42, 73):
        (folder / "val2014" / f"COCO_val2014_{number:012}.jpg").touch()
    about = {42000: 42, 42001: 42, 73000: 73}
    questions = [{"question_id": key, "image_id": image, "question": "what?"} for key, image in about.items()]
    answers = [{"answer": "a dog", "answer_id": i} for i in range(10)]
    annotations = [
        {"question_id": key, "image_id": image, "question_type": "what", "answer_type": "other", "answers": answers}
        for key, image in about.items()
    ]
    for name, key, entries in (
        ("v2_OpenEnded_mscoco_val2014_questions.json", "questions", questions),
        ("v2_mscoco_val2014_annotations.json", "annotations", annotations),
    ):
        (folder / name).write_text(json.dumps({"data_subtype": "val2014", key: entries}))
    return folder


def change(coco, edit):
    file = coco / "v2_mscoco_val2014_annotations.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


OF_COCO = [{"question_id": number, "answer": "a dog"} for number in (42000, 42001, 73000)]


def test_the_miniature(score, coco):
    assert score(OF_COCO, data=f"vqav2:val:{coco}")["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda content: content.update(data_subtype="train2014"),
            "v2_mscoco_val2014_annotations.json holds train2014, expected val2014: download the file of val2014",
        ),
        (
            lambda content: [a.update(raw_answer="dogs") for e in content["annotations"] for a in e["answers"]],
            "holds answers of OK-VQA, expected VQAv2: download the file of VQAv2",
        ),
        (
            lambda content: content["annotations"][0].update(image_id=4200, question_id=42000),
            "expected a question id from 4200000 to 4200999: it is a file of VQAv1 or another dataset",
        ),
        (lambda content: content["annotations"][2].update(answers=[]), "question 73000 has no answers in"),
        (lambda content: content["annotations"].pop(), "has no annotation in"),
    ],
)
def test_annotations_of_another_data_set(score, coco, edit, message):
    change(coco, edit)
    line = score(OF_COCO, data=f"vqav2:val:{coco}", status=2)
    assert line.startswith("error: ")
    assert message in line


def test_an_image_that_has_no_file(score, coco):
    (coco / "val2014" / "COCO_val2014_000000000073.jpg").unlink()
    line = score(OF_COCO, data=f"vqav2:val:{coco}", status=2)
    assert line == (
        f"error: image 73 has no file {coco}/val2014/COCO_val2014_000000000073.jpg (other files in the folder: 1):"
        " unpack the archive of the images again"
    )


def test_a_question_without_answers_among_others(score, tmp_path):
    file = tmp_path / "bare.jsonl"
    rows = [ROWS[0], {**ROWS[1], "answers": []}, {**ROWS[2], "answers": [" "]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = score(ANSWERS, data=str(file), status=2)
    assert line.startswith(
        f"error: {file} has questions that cannot be scored together: 2 with no answers (the first: {file} row 1 "
    )
    assert "1 with several answers" in line and line.endswith("one answer, or every question several")


def test_a_blank_question(score, tmp_path):
    file = tmp_path / "blank.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[0], {**ROWS[1], "question": " "}, ROWS[2])))
    line = score(ANSWERS, data=str(file), status=2)
    assert line.startswith(f"error: {file} row 1 ") and "cannot be used: question is blank, expected a question" in line


def test_a_question_whose_answers_are_all_blank(score, tmp_path):
    file = tmp_path / "blank.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[0], {**ROWS[1], "answers": ["", " "]}, ROWS[2])))
    line = score(ANSWERS, data=str(file), status=2)
    assert f"scored together: 1 with no answers (the first: {file} row 1 " in line


def test_an_image_without_caption_among_others(score, tmp_path):
    file = tmp_path / "blank.jsonl"
    rows = [{"image": f"{i}.png", "caption": text, "image_id": i} for i, text in enumerate(("a dog", " ", ""))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [{"image_id": i, "caption": "a dog"} for i in range(3)]
    line = score(given, task="captioning", data=str(file), status=2)
    assert line.startswith(f"error: 2 of the 3 images of {file} have no caption (the first: {file} row 1 ")


def test_blank_answers_count(score, tmp_path):
    """Three of ten said so, one said nothing: eight thirds of nine in ten, as the official script has it."""
    file = tmp_path / "blank.jsonl"
    file.write_text(json.dumps({**ROWS[0], "answers": ["cat"] * 3 + ["dog"] * 6 + [""]}))
    assert score([{"question_id": 7, "answer": "cat"}], data=str(file))["accuracy"] == pytest.approx(0.9)


@pytest.mark.parametrize("model", [False, True])
def test_one_answer_beside_several_is_found_before_anything_is_answered(score, runs, tmp_path, monkeypatch, model):
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[0], {**ROWS[1], "answers": ["2"]}, ROWS[2])))
    if model:
        monkeypatch.setattr(tasks, "_encode_images", lambda *_: pytest.fail("an image was looked at"))
        with pytest.raises(InputError, match=r"scored together: 1 with one answer .* 2 with several answers"):
            evaluate(runs["llama"], EvaluationConfig("vqa", str(file)), tmp_path / "out", device="cpu")
    else:
        line = score(ANSWERS, data=str(file), status=2)
        assert f"1 with one answer (the first: {file} row 1" in line


def test_answers_of_a_csv_are_texts(score, tmp_path):
    """The same from CSV as from JSON Lines, whatever the answers look like."""
    answers = ["007", "true", "None", "1.50", "2020-01-02"]
    (tmp_path / "a.csv").write_text(
        "image,question,answer,question_id\n" + "".join(f"a.png,what?,{text},{n}\n" for n, text in enumerate(answers))
    )
    given = [{"question_id": n, "answer": text} for n, text in enumerate(answers)]
    assert score(given, data=str(tmp_path / "a.csv"))["accuracy"] == 1.0


def test_a_row_that_cannot_be_used(score, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[0], {**ROWS[1], "question": "<image> what?"})))
    line = score(ANSWERS, data=str(file), status=2)
    assert line.startswith(f"error: {file} row 1 ") and "cannot be used: question holds <image>" in line


# -- what cannot be --------------------------------------------------------------------------------------------------


def test_a_model_or_predictions(score, runs, table, tmp_path, capsys):
    line = score(ANSWERS, str(runs["llama"]), status=2)
    assert line == "error: found both MODEL and --predictions, expected one of them: give the one to score"
    assert main(["evaluate", "--task", "vqa", "--data", table, "--output", str(tmp_path / "out")]) == 2
    assert "found neither MODEL nor --predictions, expected one of them" in capsys.readouterr().err


def test_retrieval_has_no_predictions(score):
    assert score([], task="retrieval", status=2) == (
        "error: the task retrieval cannot score a file of predictions, expected captioning or vqa: give a model, or"
        " choose another task"
    )


def test_no_file(table, tmp_path, capsys):
    missing = str(tmp_path / "nothing.json")
    assert main(["evaluate", "--predictions", missing, "--task", "vqa", "--data", table, "--output", missing]) == 2
    assert capsys.readouterr().err == (
        f"error: {missing} cannot be read (No such file or directory): check the path and the permissions\n"
    )
    os.mkfifo(tmp_path / "pipe")
    for endless in ("/dev/zero", str(tmp_path / "pipe")):
        assert main(["evaluate", "--predictions", endless, "--task", "vqa", "--data", table, "--output", missing]) == 2
        assert f"error: {endless} is a pipe, a socket or a device, expected a regular" in capsys.readouterr().err

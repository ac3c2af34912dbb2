"""Calibration error, accuracy at coverage, temperatures, and ``blip2 calibrate``."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

import blip2
from blip2.checkpoint import find_checkpoint, open_checkpoint, write_calibration
from blip2.cli import main
from blip2.config import CalibrationConfig, EvaluationConfig
from blip2.convert import convert
from blip2.decoding.search import Decoding
from blip2.errors import InputError
from blip2.evaluation import calibration, temperatures
from blip2.evaluation.calibration import accuracy_at_coverage, expected_calibration_error, fit_temperature
from blip2.evaluation.run import evaluate
from blip2.evaluation.temperatures import calibrate
from conftest import COLORS, SHAPES, draw
from fixtures.checkpoints import save_transformers

CHOICES = [*COLORS, "yes", "no"]
GREEDY = Decoding(num_beams=1, max_new_tokens=2)


def message(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# -- measures --------------------------------------------------------------------------------------------------------


def test_calibration_error_by_hand():
    # Bins of 1/15: two predictions in (0.6, 0.667], one in (0.933, 1], one in the first, which has 0 itself.
    confidences, accuracies = [0.62, 0.66, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0]
    assert expected_calibration_error(confidences, accuracies) == pytest.approx((2 * abs(0.5 - 0.64) + 0 + 1) / 4)
    assert expected_calibration_error([0.6, 0.6], [0.6, 0.6]) == 0  # the upper end belongs to a bin: (8/15, 9/15]
    assert expected_calibration_error([0.6, 0.61], [1.0, 0.2]) == pytest.approx((0.4 + 0.41) / 2)


def test_calibration_error_of_a_calibrated_model_is_small():
    generator = torch.Generator().manual_seed(0)
    confidences = torch.rand(20_000, generator=generator)
    accuracies = (torch.rand(20_000, generator=generator) < confidences).double().tolist()
    assert expected_calibration_error(confidences.tolist(), accuracies) < 0.015
    assert expected_calibration_error((confidences**2).tolist(), accuracies) > 0.15


def test_accuracy_at_coverage():
    confidences = [0.1 * i for i in range(10)]
    curve = accuracy_at_coverage(confidences, [0.0] * 5 + [1.0] * 5)
    assert list(curve) == ["100", "90", "80", "70", "60", "50", "40", "30", "20", "10"]
    assert curve == pytest.approx({"100": 0.5, "90": 5 / 9, "80": 5 / 8, "70": 5 / 7, "60": 5 / 6} | dict.fromkeys(
        ("50", "40", "30", "20", "10"), 1.0))  # fmt: skip
    assert accuracy_at_coverage([0.5], [1.0])["10"] == 1.0  # at least one
    assert accuracy_at_coverage([0.5, 0.5], [1.0, 0.0])["50"] == 1.0  # the first of equal ones


@pytest.mark.parametrize("true", [0.4, 2.5])
def test_the_temperature_of_samples_is_found(true):
    """Outcomes drawn at a temperature: candidates by softmax, and matches by the logistic function."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    drawn = (logits / true).softmax(dim=1).multinomial(1, generator=generator).squeeze(1)
    right = (drawn == logits.argmax(dim=1)).double()
    found = fit_temperature(lambda t: (logits / t).softmax(dim=1).amax(dim=1), right)
    assert found == pytest.approx(true, rel=0.06)
    log_odds = logits[:, 0]
    outcomes = (torch.rand(20_000, generator=generator, dtype=torch.float64) < (log_odds / true).sigmoid()).double()
    assert fit_temperature(lambda t: (log_odds / t).sigmoid(), outcomes) == pytest.approx(true, rel=0.06)


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_no_temperature_fits_what_is_always_right_or_wrong(right):
    logits = torch.randn(50, 3, dtype=torch.float64)
    with pytest.raises(InputError) as error:
        fit_temperature(lambda t: (logits / t).softmax(dim=1).amax(dim=1), torch.full((50,), right).double())
    assert f"these 50 predictions, of which {100 * right:.1f} % are right" in message(error)


# -- pipelines -------------------------------------------------------------------------------------------------------

IMAGES = [draw("disc", "red", 0), draw("square", "blue", 7)]


def calibrated(pipeline, **values):
    """The same model with temperatures."""
    other = type(pipeline).__new__(type(pipeline))
    other.__dict__ = {**vars(pipeline), "config": replace(pipeline.config, calibration=CalibrationConfig(**values))}
    return other


@pytest.fixture(scope="module")
def writer(runs):
    return blip2.load(runs["llama"], device="cpu")


@pytest.fixture(scope="module")
def compare(runs):
    return blip2.load(runs["stage1"], device="cpu")


@pytest.mark.parametrize("by", ["lm", "pmi"])
def test_ranked_candidates(writer, by):
    for ask in (
        lambda each: each.rank(IMAGES, CHOICES, "what?", by),
        lambda each: each.classify(IMAGES, CHOICES, by=by, questions="what?"),
    ):
        for plain, warm in zip(ask(writer), ask(calibrated(writer, **{by: 3.0})), strict=True):
            assert [(each.text, each.score) for each in plain] == [(each.text, each.score) for each in warm]
            expected = (torch.tensor([each.score for each in plain]) / 3).softmax(dim=0)
            assert [each.probability for each in warm] == pytest.approx(expected.tolist())
            assert warm[0].probability < plain[0].probability
        assert ask(calibrated(writer, answer=3.0)) == ask(writer)  # another temperature
    plain, warm = (each.rank(IMAGES, CHOICES, "what?", by, per_token=True) for each in
                   (writer, calibrated(writer, **{by: 3.0})))  # fmt: skip
    assert plain == warm


def test_matches(compare):
    warm = calibrated(compare, itm=2.0, itc=5.0)
    p, q = compare.match(IMAGES, CHOICES), warm.match(IMAGES, CHOICES)
    torch.testing.assert_close(q, (p.logit() / 2).sigmoid(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(warm.score(IMAGES, CHOICES, "itm").values, q, atol=1e-6, rtol=1e-5)
    ranked = warm.rank(IMAGES[0], CHOICES, by="itm")[0]
    assert sorted(each.score for each in ranked) == pytest.approx(sorted(q[0].tolist()))
    assert [each.probability for each in ranked] == pytest.approx([each.score / float(q[0].sum()) for each in ranked])
    assert torch.equal(warm.similarity(IMAGES, CHOICES), compare.similarity(IMAGES, CHOICES))
    cosines = torch.tensor([each.score for each in warm.rank(IMAGES[0], CHOICES, by="itc")[0]])
    expected = (cosines / compare.model.temperature.detach() / 5).softmax(dim=0).tolist()
    assert [each.probability for each in warm.rank(IMAGES[0], CHOICES, by="itc")[0]] == pytest.approx(expected)


def test_the_confidence_of_answers_but_not_of_captions(writer):
    warm = calibrated(writer, answer=2.0)
    made = (each.answer(IMAGES, "what?", GREEDY, details=True) for each in (writer, warm))
    for plain, other in zip(*made, strict=True):
        assert (plain.text, plain.log_prob, plain.temperature, other.temperature) == (other.text, other.log_prob, 1, 2)
        assert other.confidence == pytest.approx(math.sqrt(plain.confidence))
        threshold = (plain.confidence + other.confidence) / 2
        assert plain.is_unsure(threshold) and not other.is_unsure(threshold)
    captions = [each.caption(IMAGES, None, GREEDY, details=True) for each in (writer, warm)]
    assert captions[0] == captions[1]


# -- blip2 calibrate -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Fewer images are enough, and temperatures that only a model that has hardly learned anything needs."""
    monkeypatch.setattr(temperatures, "MIN_IMAGES", 8)
    monkeypatch.setattr(calibration, "TEMPERATURES", (1e-3, 1e3))


@pytest.fixture(scope="module")
def table(tmp_path_factory, writer):
    """Two questions about each of twelve images, a caption of each, and questions without choices.

    The model is right on two of three questions by ranking its choices, and on every other one by generating.
    """
    folder = tmp_path_factory.mktemp("held-out")
    questions, captions = [], []
    for number, (shape, color) in enumerate((shape, color) for shape in SHAPES for color in COLORS):
        name = f"{number}.png"
        draw(shape, color, number).save(folder / name)
        questions.append({"image": name, "question": "what color?", "choices": CHOICES})
        questions.append({"image": name, "question": "a disc?", "choices": ["yes", "no"]})
        captions.append({"image": name, "caption": f"number {chr(97 + number)} is a {color} {shape}"})
    images, asked = [folder / row["image"] for row in questions], [row["question"] for row in questions]
    ranked = writer.rank(images, [row["choices"] for row in questions], asked)
    written = writer.answer(images, asked, GREEDY)
    for number, (row, best, text) in enumerate(zip(questions, ranked, written, strict=True)):
        row["answers"] = [best[number % 3 == 2].text]
        row["written"] = text if number % 2 and text.strip() else "something else"
    open_questions = [
        {"image": row["image"], "question": row["question"], "answers": [row.pop("written")]} for row in questions
    ]
    for name, rows in (("questions", questions), ("captions", captions), ("open", open_questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def copy(runs, tmp_path):
    """Returns a copy of a run, which may be changed."""

    def make(name):
        shutil.copytree(runs[name], tmp_path / name)
        return tmp_path / name

    return make


def test_candidates(copy, writer, table, tmp_path):
    run, data = copy("llama"), table / "questions.jsonl"
    before = {path: path.read_bytes() for path in find_checkpoint(run).rglob("*") if path.is_file()}
    results = calibrate(run, str(data), ["lm"], device="cpu")
    assert list(results) == ["lm"] and (results["lm"]["fitted_to"], results["lm"]["measured_on"]) == (12, 12)
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    assert changed == ["model.yaml"]
    # The same by hand: the records of every second image.
    rows = read(data)
    ranked = writer.rank(
        [table / row["image"] for row in rows], [row["choices"] for row in rows], [row["question"] for row in rows]
    )
    scores = [torch.tensor([each.score for each in group]).double() for group in ranked]
    right = [float(group[0].text == row["answers"][0]) for group, row in zip(ranked, rows, strict=True)]
    assert sum(right) == 16
    half = [i for i in range(24) if i // 2 % 2 == 0]
    other = [i for i in range(24) if i not in half]

    def confidences(temperature, chosen):
        return torch.stack([(scores[i] / temperature).softmax(dim=0)[0] for i in chosen])

    found = fit_temperature(lambda t: confidences(t, half), torch.tensor([right[i] for i in half]).double())
    assert results["lm"]["temperature"] == pytest.approx(found, rel=0.01)
    for name, temperature in (("before", 1.0), ("after", results["lm"]["temperature"])):
        expected = expected_calibration_error(confidences(temperature, other).tolist(), [right[i] for i in other])
        assert results["lm"]["expected_calibration_error"][name] == pytest.approx(expected, abs=1e-3)
    # An evaluation uses the temperature.
    config = EvaluationConfig("vqa", str(data), rank_by="lm", num_beams=1, max_new_tokens=2)
    metrics = evaluate(run, config, tmp_path / "scores", device="cpu")
    everything = confidences(results["lm"]["temperature"], range(24)).tolist()
    assert metrics["ranked"]["expected_calibration_error"] == pytest.approx(
        expected_calibration_error(everything, right), abs=1e-3
    )
    assert metrics["temperatures"]["lm"] == results["lm"]["temperature"]
    assert "accuracy of the most certain answers" in (tmp_path / "scores/report.html").read_text()


def test_generated_answers_and_a_second_calibration(copy, writer, table):
    run, rows = copy("llama"), read(table / "open.jsonl")
    write_calibration(find_checkpoint(run), {"lm": 1.5, "answer": 7.0})
    result = calibrate(run, str(table / "open.jsonl"), decoding=GREEDY, device="cpu")["answer"]
    found = open_checkpoint(str(run)).config.calibration
    assert found == CalibrationConfig(lm=1.5, answer=result["temperature"])
    images, questions = [table / row["image"] for row in rows], [row["question"] for row in rows]
    made = writer.answer(images, questions, GREEDY, details=True)
    chosen = [i for i in range(24) if i // 2 % 2]
    right = [float(rows[i]["answers"][0] == made[i].text) for i in chosen]
    assert 0 < sum(right) < 12
    for name, temperature in (("before", 1.0), ("after", result["temperature"])):  # the earlier 7 does not matter
        confidences = [made[i].confidence ** (1 / temperature) for i in chosen]
        assert result["expected_calibration_error"][name] == pytest.approx(
            expected_calibration_error(confidences, right), abs=1e-3
        )


def test_matches_of_captions(copy, compare, table, monkeypatch):
    asked, rows = [], read(table / "captions.jsonl")
    match = type(compare).match_candidates
    monkeypatch.setattr(
        type(compare), "match_candidates", lambda self, *given: asked.append(given) or match(self, *given)
    )
    seen = {}
    monkeypatch.setattr(temperatures, "fit", lambda name, each: seen.update({name: each}) or {"temperature": 2.0})
    run = copy("stage1")
    calibrate(run, str(table / "captions.jsonl"), device="cpu")
    assert open_checkpoint(str(run)).config.calibration == CalibrationConfig(itc=2.0, itm=2.0)
    ((_, texts, pairs),) = asked
    assert texts == [row["caption"] for row in rows] and pairs[:, 0].tolist() == list(range(12))
    similarity = compare.similarity([table / row["image"] for row in rows], texts)
    best = similarity.masked_fill(torch.eye(12, dtype=torch.bool), -2).topk(2).indices
    assert torch.equal(pairs[:, 1:], best)
    assert seen["itm"].accuracies.tolist() == [1.0, 0.0, 0.0] * 12
    p = compare.score([table / row["image"] for row in rows], [texts[i] for i in pairs[:, 2]], "itm", pairs=True).values
    torch.testing.assert_close(seen["itm"].confidences(1.0)[2::3].float(), p, atol=1e-5, rtol=1e-4)
    expected = (similarity / compare.model.temperature.detach()).softmax(dim=1).amax(dim=1)
    torch.testing.assert_close(seen["itc"].confidences(1.0).float(), expected, atol=1e-5, rtol=1e-4)
    assert seen["itc"].accuracies.mean() == (similarity.argmax(dim=1) == torch.arange(12)).double().mean()
    first, second = seen["itm"].halves()
    assert (first.images, second.images) == ([i for i in range(0, 12, 2) for _ in range(3)],
                                             [i for i in range(1, 12, 2) for _ in range(3)])  # fmt: skip


def test_what_is_calibrated_by_default(copy, table, monkeypatch):
    asked = []
    monkeypatch.setattr(temperatures, "fit", lambda name, _: asked.append(name) or {"temperature": 2.0})
    run = copy("llama")
    calibrate(run, str(table / "questions.jsonl"), decoding=GREEDY, device="cpu")
    (run.parent / "answers.txt").write_text("\n".join(CHOICES))
    listed = str(run.parent / "answers.txt")
    calibrate(run, str(table / "open.jsonl"), ["pmi"], answer_list=listed, device="cpu")
    assert asked == ["answer", "lm", "pmi"]


def test_the_command(copy, table, capsys):
    run = copy("llama")
    command = ["calibrate", str(run), str(table / "questions.jsonl"), "--by", "lm", "--device", "cpu"]
    assert main(command) == 0
    assert set(json.loads(capsys.readouterr().out)["lm"]["expected_calibration_error"]) == {"before", "after"}
    command = ["ask", str(run), str(table / "0.png"), "what?", "--device", "cpu", "--max-new-tokens", "2"]
    assert main([*command, "--calibration.lm", "null"]) == 0


# -- other formats ---------------------------------------------------------------------------------------------------


def test_conversion_keeps_temperatures_or_says_that_it_does_not(copy, tmp_path, caplog):
    run = copy("llama")
    write_calibration(find_checkpoint(run), {"lm": 1.5})
    convert(run, tmp_path / "same", "blip2")
    assert open_checkpoint(str(tmp_path / "same")).config.calibration == CalibrationConfig(lm=1.5)
    assert "no place for temperatures" not in caplog.text
    convert(run, tmp_path / "other", "transformers")
    assert "is calibrated, but the format transformers has no place for temperatures" in caplog.text


# -- what cannot be --------------------------------------------------------------------------------------------------


def test_models_and_data_that_do_not_fit(copy, parts, table, tmp_path):
    run, data = copy("llama"), str(table / "questions.jsonl")
    save_transformers(tmp_path / "theirs", "llama", parts.bert)
    (tmp_path / "answers.txt").write_text("yes\nno")
    cases = [
        ({"model": tmp_path / "theirs"}, "theirs has the format of transformers, which has no place for temperatures"),
        ({"by": ["itm"]}, "by is itm, expected some of lm, pmi, answer, the temperatures of stage generation"),
        ({"by": []}, "by is empty, expected some of lm, pmi, answer"),
        ({"limit": 10}, "questions.jsonl has 5 images, expected at least 8, half of them to fit"),
        ({"data": str(table / "captions.jsonl")}, "has no question, which the task vqa needs"),
        ({"by": ["answer"], "answer_list": str(tmp_path / "answers.txt")}, "by is answer, which ranks no candidates"),
        ({"answer_list": str(tmp_path / "no.txt")}, "no.txt cannot be read (No such file or directory)"),
    ]
    for changes, expected in cases:
        with pytest.raises(InputError) as error:
            calibrate(**{"model": run, "data": data, "device": "cpu", **changes})
        assert expected in message(error)
    stage1 = copy("stage1")
    same = [{"image": str(table / f"{i}.png"), "caption": "a disc" if i % 2 else "A disc."} for i in range(12)]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in same))
    with pytest.raises(InputError, match="has 1 images with captions of their own, expected at least 8"):
        calibrate(stage1, str(tmp_path / "same.jsonl"), device="cpu")


def test_questions_without_answers(copy, table, tmp_path):
    rows = read(table / "open.jsonl")
    rows = [{"image": str(table / row["image"]), "question": row["question"]} for row in rows]
    (tmp_path / "open.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="has no answers, which calibration needs"):
        calibrate(copy("llama"), str(tmp_path / "open.jsonl"), device="cpu")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", "calibration.lm is 0.0, expected at least 0.001"),
        ("5000", "calibration.lm is 5000.0, expected at most 1000"),
        (".nan", "calibration.lm is nan"),
        ("hot", "calibration.lm is 'hot', expected a finite number or null"),
    ],
)
def test_temperatures_out_of_range(copy, value, expected):
    run = copy("llama")
    file = find_checkpoint(run) / "model.yaml"
    file.write_text(file.read_text().replace("calibration: null", f"calibration: {{lm: {value}}}"))
    with pytest.raises(InputError) as error:
        open_checkpoint(str(run))
    assert expected in message(error)

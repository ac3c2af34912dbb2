"""Runs that evaluate themselves as they go."""

import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip2.data.sources import open_records
from blip2.errors import InputError
from blip2.evaluation.in_training import train
from blip2.evaluation.run import evaluate
from blip2.pipelines import GenerationPipeline
from blip2.recipe import dump_config
from blip2.resumable import ResumableMap
from blip2.training import trainer
from blip2.training.metrics import read_metrics
from conftest import COLORS, SHAPES, draw
from fixtures.processes import finish, kill_at, start, start_two
from fixtures.runs import assert_same_run, lines

BEST = "evaluation_accuracy"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes that are started have, whose sums differ in the last digit from those of several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """One question about each of 72 images, none of which is trained on: two parts of the work."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for shade in range(11, 17):
        for shape in SHAPES:
            for color in COLORS:
                draw(shape, color, shade).save(folder / f"{len(rows)}.png")
                answers = [color] * 10
                rows.append({"image": f"{len(rows)}.png", "question": "what color?", "answers": answers})
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def asking(parts, output, questions, training=None, **evaluation):
    evaluation = {"task": "vqa", "data": questions, "eval_steps": 2, "num_beams": 1, "max_new_tokens": 4, **evaluation}
    return parts.recipe(
        output,
        stage="generation",
        language={"name": parts.llama},
        evaluation=evaluation,
        training={"max_steps": 5, "save_steps": 100, "metric_for_best_model": BEST, **(training or {})},
    )


@pytest.fixture(scope="module")
def calm(parts, questions, tmp_path_factory):
    """A recipe and its run, which was never interrupted."""
    recipe = asking(parts, tmp_path_factory.mktemp("calm") / "run", questions)
    train(recipe)
    return recipe


def test_the_same_numbers_as_the_command(calm, tmp_path):
    run = Path(calm.output)
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [BEST in row for row in rows] == [False, True, False, True, True]
    for step in (4, 5):  # training.save_total_limit
        folder = run / "checkpoints" / f"step-{step:08d}"
        found = evaluate(folder, calm.evaluation, tmp_path / str(step), device="cpu")
        assert rows[step - 1][BEST] == found["accuracy"]
        said = [
            (place / "predictions.json").read_text()
            for place in (run / f"evaluation/step-{step:08d}", tmp_path / str(step))
        ]
        assert said[0] == said[1]
    assert (run / "evaluation/step-00000002/report.html").is_file()


def test_evaluation_changes_nothing_in_training(calm, tmp_path):
    plain = replace(
        calm,
        output=str(tmp_path),
        evaluation=None,
        training=replace(calm.training, metric_for_best_model=None, save_steps=5),
    )
    trainer.train(plain)
    evaluated = [
        {key: value for key, value in row.items() if not key.startswith("evaluation_")}
        for row in lines(Path(calm.output))
    ]
    assert evaluated == lines(tmp_path)


@pytest.mark.parametrize("values", [[0.25, 0.75, 0.5], [0.75, 0.75, 0.5], [float("nan"), 0.1, 0.1]])
def test_the_best_is_kept(parts, questions, tmp_path, monkeypatch, values):
    """Beyond training.save_total_limit; of equal ones the first; what is no number is never the best."""
    seen = {}

    class Evaluation:
        def __init__(self, recipe):
            self.records = open_records(questions, recipe.data)

        def __call__(self, built, step):
            seen[step] = built.model.qformer.queries.detach().clone()
            return {BEST: values[len(seen) - 1]}

    recipe = asking(parts, tmp_path / "run", questions, training={"save_total_limit": 1, "max_steps": 6})
    trainer.train(recipe, make_evaluator=Evaluation)
    wanted = {0.25: 4, 0.75: 2}.get(values[0], 4)
    best = tmp_path / "run" / "best"
    kept = load_file(best / "model.safetensors")["qformer.queries"]
    assert torch.equal(kept, seen[wanted])
    assert json.loads((best / "best.json").read_text()) == {
        "step": wanted, "metric": BEST, "value": values[wanted // 2 - 1]
    }  # fmt: skip
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000006"]
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_the_best_can_be_loaded(calm, tmp_path):
    from blip2.pipelines import load

    pipeline = load(f"{calm.output}/best", device="cpu")
    draw("disc", "red", 0).save(tmp_path / "image.png")
    assert len(pipeline.answer(str(tmp_path / "image.png"), "what?")) == 1


def test_a_validation_loss_decides(parts, tmp_path):
    recipe = parts.recipe(
        tmp_path / "run",
        data={"validation": parts.images},
        optimizer={"learning_rate": {"vision.*": "frozen", "*": 3e-2}, "warmup_steps": 0},
        training={
            "max_steps": 8,
            "eval_steps": 2,
            "save_steps": 100,
            "save_total_limit": 1,
            "metric_for_best_model": "validation_loss",
        },
    )
    trainer.train(recipe)
    rows = [row for row in read_metrics(tmp_path / "run") if "validation_loss" in row]
    for row in rows:
        parts_of = [row[f"validation_{name}"] for name in ("itc", "itm", "itg")]
        assert row["validation_loss"] == pytest.approx(sum(parts_of), rel=1e-6)
    smallest = min(rows, key=lambda row: row["validation_loss"])
    found = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    assert found == {"step": smallest["step"], "metric": "validation_loss", "value": smallest["validation_loss"]}


def test_stage_one_is_evaluated_by_retrieval(parts, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for color in COLORS:
        draw("disc", color, 99).save(folder / f"{color}.png")
        rows.append({"image": f"{color}.png", "caption": f"a {color} disc"})
    (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = parts.recipe(
        tmp_path / "run",
        evaluation={"task": "retrieval", "data": str(folder / "some.jsonl"), "eval_steps": 2, "rerank_k": 2},
        training={"max_steps": 2, "metric_for_best_model": "evaluation_itm_IR@1"},
    )
    train(recipe)
    row = read_metrics(tmp_path / "run")[-1]
    found = evaluate(tmp_path / "run", recipe.evaluation, tmp_path / "out", device="cpu")
    for kind in ("itc", "itm"):
        for name, value in found[kind].items():
            assert row[f"evaluation_{kind}_{name}"] == value
    assert (tmp_path / "run" / "best" / "tokenizer").is_dir()


# -- going on ------------------------------------------------------------------------------------------------------


def test_killed_in_the_middle_of_an_evaluation(calm, tmp_path, monkeypatch):
    """What was done is not done again, and the run ends as if nothing had happened."""
    recipe = replace(calm, output=str(tmp_path / "run"))
    generate, calls = GenerationPipeline.generate, []

    def stop(self, *given, **named):
        calls.append(1)
        if len(calls) == 4:  # the second of two parts, at the second evaluation
            raise KeyboardInterrupt
        return generate(self, *given, **named)

    monkeypatch.setattr(GenerationPipeline, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]
    train(recipe, resume=True)
    assert len(calls) == 4 + 1 + 2
    assert_same_run(Path(calm.output), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    train(recipe, resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    for name in ("best.json", "model.safetensors"):
        one, other = ((Path(each.output) / "best" / name).read_bytes() for each in (calm, recipe))
        assert one == other


def test_a_sigkill_in_an_evaluation(calm, tmp_path):
    recipe = replace(calm, output=str(tmp_path / "run"))
    path, log = tmp_path / "recipe.yaml", tmp_path / "log"
    path.write_text(dump_config(recipe))
    answers = tmp_path / "run/evaluation/step-00000004/parts/answers"
    status, printed = finish(start(["train", str(path)], log, partial(kill_at, f"{answers}/000001.pt")), log)
    assert status == -signal.SIGKILL and (answers / "000000.pt").exists(), printed
    status, printed = finish(start(["train", str(path), "--resume"], log), log)
    assert status == 0, printed
    assert_same_run(Path(calm.output), tmp_path / "run")


def test_an_evaluation_of_other_weights_starts_over(calm, tmp_path):
    recipe = replace(calm, output=str(tmp_path / "run"))
    stale = tmp_path / "run/evaluation/step-00000002"
    ResumableMap(stale / "parts").run("answers", 2, lambda part: ({}, []))
    (stale / "evaluation.json").write_text('{"weights": "others"}')
    train(recipe)
    assert_same_run(Path(calm.output), tmp_path / "run")


def test_two_processes(parts, questions, calm, tmp_path):
    """They share the evaluation, whose results are those of one process on the same weights."""
    recipe = replace(calm, output=str(tmp_path / "run"), data=replace(calm.data, batch_size=2))
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(recipe))
    start_two(["train", str(path)], tmp_path)
    rows = read_metrics(tmp_path / "run")
    found = evaluate(tmp_path / "run", recipe.evaluation, tmp_path / "one", device="cpu")
    assert rows[-1][BEST] == found["accuracy"]
    one, two = (tmp_path / "one", tmp_path / "run/evaluation/step-00000005")
    assert (one / "predictions.json").read_bytes() == (two / "predictions.json").read_bytes()
    assert (tmp_path / "run" / "best" / "best.json").is_file()


# -- what cannot be ------------------------------------------------------------------------------------------------


def test_a_metric_that_is_not_measured(parts, questions, tmp_path):
    recipe = asking(parts, tmp_path / "run", questions, training={"metric_for_best_model": "evaluation_CIDEr"})
    with pytest.raises(
        InputError, match=r"training.metric_for_best_model is evaluation_CIDEr, which is missing \(expected one of eval"
    ):
        train(recipe)
    train(replace(recipe, training=replace(recipe.training, metric_for_best_model=BEST)), resume=True)
    assert BEST in read_metrics(tmp_path / "run")[1]


def test_what_cannot_be_scored_is_found_before_the_training(parts, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"image": f"{i}.png", "caption": text} for i, text in enumerate(("a disc", "", "a square"))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = parts.recipe(tmp_path / "run", evaluation={"task": "retrieval", "data": str(file), "eval_steps": 1})
    with pytest.raises(InputError, match=r"1 of the 3 images of \S+ have no caption \(the first: \S+ row 1 "):
        train(recipe)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_without_java(parts, questions, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    recipe = parts.recipe(
        tmp_path / "run",
        stage="generation",
        language={"name": parts.llama},
        evaluation={"task": "captioning", "data": parts.images, "eval_steps": 1, "limit": 2, "num_beams": 1},
        training={"max_steps": 1},
    )
    train(recipe)
    assert (
        "evaluation_CIDEr is missing: the official metrics need Java, which is not installed" in capsys.readouterr().err
    )
    assert not [name for name in read_metrics(tmp_path / "run")[0] if name.startswith("evaluation_")]
    best = replace(
        recipe, output=f"{recipe.output}-2", training=replace(recipe.training, metric_for_best_model="evaluation_CIDEr")
    )
    with pytest.raises(
        InputError, match=r"evaluation_CIDEr, which is missing .* need Java, which is not installed.* --resume"
    ):
        train(best)


def test_the_loop_alone_does_not_evaluate(calm, tmp_path):
    with pytest.raises(InputError, match=r"has a section evaluation, but make_evaluator is None: call blip2.train"):
        trainer.train(replace(calm, output=str(tmp_path / "run")))


def test_data_that_are_not_there(calm, tmp_path):
    evaluation = replace(calm.evaluation, data=str(tmp_path / "nothing.jsonl"))
    with pytest.raises(InputError, match=r"no file .*nothing\.jsonl"):
        train(replace(calm, output=str(tmp_path / "run"), evaluation=evaluation))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

"""The check of a round of CapFilt: both corpora train stage 1, and the held-out recall decides."""

import json
from dataclasses import replace

import pytest

from blip2.cli import main
from blip2.config import DecodingOptions
from blip2.corpus import capfilt as module
from blip2.corpus.capfilt import CapFiltConfig, capfilt
from blip2.corpus.check import check_recipe, check_round, judge
from blip2.corpus.options import NUCLEUS_SAMPLING, Check, Engine
from blip2.errors import InputError
from blip2.evaluation.run import evaluate
from blip2.recipe import dump_config, load_recipe
from blip2.training.metrics import read_metrics
from conftest import COLORS, SHAPES
from fixtures.corpus import encoded, write_tar


@pytest.mark.parametrize(
    ("before", "after", "accepted"),
    [
        ([0.4, 0.5, 0.6], [0.5, 0.6, 0.7], True),  # better
        ([0.4, 0.5, 0.6], [0.35, 0.45, 0.55], True),  # worse by half of the spread
        ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4], False),  # worse by twice the spread
        ([0.109], [0.031], False),  # the result in docs/capfilt.md
        ([0.031], [0.109], True),
        ([0.5], [0.5], True),
        ([0.009, 0.011, 0.01], [0.01, 0.01, 0.01], False),  # both at chance: nothing can be told
        ([0.01, 0.01, 0.01], [0.5, 0.5, 0.4], True),  # captions without information before
    ],
)
def test_a_round_that_hurts_is_refused(before, after, accepted):
    found = judge(before, after, 0.01)
    assert found["accepted"] is accepted
    assert ("accepted" if accepted else "refused") in found["reason"]


def test_the_numbers_are_those_of_the_runs():
    found = judge([0.4, 0.6], [0.1, 0.1], 0.01)
    assert found["spread"] == pytest.approx((0.02 / 2) ** 0.5)  # the variances are 0.02 and 0
    assert found["reason"] == (
        "the round is refused: held-out R@1 is 10.0 % after the round and 50.0 % before it (spread 10.0, chance 1.0)"
    )
    assert (
        "no better than chance, so that the check cannot tell: train for more steps"
        in judge([0.0], [0.0], 0.01)["reason"]
    )


@pytest.fixture(scope="module")
def recipe(parts, tmp_path_factory):
    """A few steps of a tiny model."""
    folder = tmp_path_factory.mktemp("check")
    rate = {"vision.*": "frozen", "*": 3e-3}
    return parts.recipe(
        folder / "unused",
        data={"batch_size": 12, "horizontal_flip": False, "cached_views": 1, "features": str(folder / "features")},
        evaluation={"task": "retrieval", "data": parts.images, "rerank_k": 0},
        optimizer={"learning_rate": rate},
        training={"max_steps": 4, "save_steps": 4, "eval_steps": 4},
    )


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """The same images twice: with true captions, and with captions that fit every image."""
    folder = tmp_path_factory.mktemp("corpora")
    names = [(shape, color, shade) for shade in (0, 10) for shape in SHAPES for color in COLORS]
    for name in ("true", "empty"):
        members = {}
        for n, (shape, color, shade) in enumerate(names):
            members[f"{n:03}.png"] = encoded(shape, color, shade)
            captions = [f"a {color} {shape}", f"the {shape} is {color} here"] if name == "true" else ["image"]
            members[f"{n:03}.json"] = json.dumps({"captions": captions}).encode()
        write_tar(folder / f"{name}.tar", members)
    return {name: str(folder / f"{name}.tar") for name in ("true", "empty")}


@pytest.fixture(scope="module")
def checked(recipe, corpora, tmp_path_factory):
    output = tmp_path_factory.mktemp("checked")
    return output, check_round(recipe, corpora["true"], corpora["empty"], output, 1)


def test_the_recalls_are_those_of_runs_on_both_corpora(recipe, corpora, checked, tmp_path):
    output, found = checked
    assert found["held_out"] == recipe.evaluation.data and found["steps"] == 4
    for side, source in (("before", "true"), ("after", "empty")):
        last = read_metrics(output / f"{side}-0")[-1]
        assert last["step"] == 4
        stored = load_recipe(output / f"{side}-0" / "recipe.yaml")
        assert stored.data.train == corpora[source] and stored.training.seed == 0
        metrics = evaluate(output / f"{side}-0", recipe.evaluation, tmp_path / side, device="cpu")
        assert found[side] == [pytest.approx((metrics["itc"]["TR@1"] + metrics["itc"]["IR@1"]) / 2)]
        assert found["chance"] == metrics["chance"]["r1"]
    starts = [read_metrics(output / f"{side}-0")[0] for side in ("before", "after")]
    assert starts[0]["loss"] != starts[1]["loss"]  # other captions


def test_a_check_that_is_done_is_not_done_again(recipe, corpora, checked):
    output, found = checked
    steps = {path: path.read_bytes() for path in output.glob("*/metrics.jsonl")}
    assert check_round(recipe, corpora["true"], corpora["empty"], output, 1) == found
    assert {path: path.read_bytes() for path in output.glob("*/metrics.jsonl")} == steps and len(steps) == 2


def write_recipe(recipe, path):
    path.write_text(dump_config(recipe))
    return str(path)


def test_a_round_with_a_check(runs, shards, recipe, tmp_path, capsys):
    short = replace(recipe, training=replace(recipe.training, max_steps=2, save_steps=2, eval_steps=2))
    file = write_recipe(short, tmp_path / "check.yaml")
    output, data = tmp_path / "output", str(shards / "*.tar")
    decoding = NUCLEUS_SAMPLING.override(DecodingOptions(max_new_tokens=4))
    config = CapFiltConfig(num_captions=2, decoding=decoding, batch_size=4)
    models = str(runs["llama"]), str(runs["stage1"])
    metrics = capfilt(*models, data, output, config, engine=Engine(num_threads=1), check=Check(recipe=file, runs=1))
    check = metrics["check"]
    assert len(check["before"]) == len(check["after"]) == 1
    assert json.loads((output / "metrics.json").read_text())["check"] == check
    page = (output / "report.html").read_text()
    assert "Check on held-out pairs" in page and "run 1" in page and "Keep rates" in page
    # Nothing is left to do; the command prints the result, and fails if the round was refused.
    command = ["capfilt", *models, "--data", data, "--output", str(output), "--captions", "2", "--top-p", "0.9"]
    command += ["--max-new-tokens", "4", "--batch-size", "4", "--num-threads", "1", "--check", file]
    status = main([*command, "--check-runs", "1"])
    assert json.loads(capsys.readouterr().out.rpartition("report:")[0])["check"] == check
    assert status == (0 if check["accepted"] else 2)


def test_the_command_fails_if_the_round_is_refused(runs, shards, recipe, tmp_path, capsys, monkeypatch):
    """With the recalls in docs/capfilt.md."""
    found = {**judge([0.109], [0.031], 0.003), "held_out": "held out", "steps": 300}
    monkeypatch.setattr(module, "check_round", lambda *given: found)
    file = write_recipe(recipe, tmp_path / "check.yaml")
    command = ["capfilt", str(runs["llama"]), str(runs["stage1"]), "--data", str(shards / "00000.tar"), "--captions"]
    command += ["0", "--output", str(tmp_path / "output"), "--check", file, "--device", "cpu"]
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the round is refused: held-out R@1 is 3.1 % after the round and 10.9 % before it" in error
    assert "or repeat the round with better models" in error
    assert (tmp_path / "output" / "00000.tar").is_file()


def test_recipes_that_check_nothing(parts, recipe, runs, shards, tmp_path):
    with pytest.raises(
        InputError, match="has no evaluation, expected a recipe of stage representation with evaluation"
    ):
        check_recipe(replace(recipe, evaluation=None))
    questions = parts.recipe(
        tmp_path, stage="generation", language={"name": parts.llama},
        evaluation={"task": "captioning", "data": parts.images},
    )  # fmt: skip
    with pytest.raises(InputError, match=r"has evaluation\.task captioning, expected a recipe of stage representation"):
        check_recipe(questions)
    file = write_recipe(replace(recipe, evaluation=None), tmp_path / "check.yaml")
    with pytest.raises(InputError, match="has no evaluation"):  # before anything is computed
        capfilt("no model", "no model", str(shards / "*.tar"), tmp_path / "out", check=Check(recipe=file))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="runs is 0, expected at least 1"):
        Check(runs=0)

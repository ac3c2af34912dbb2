import importlib.util
import json
import math
import os
import signal
import tarfile
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from blip2 import checkpoint
from blip2.backbones.vision import ImageEncoder
from blip2.builder import build_image_encoder
from blip2.config import ObjectivesConfig
from blip2.data.images import preprocess, read_image
from blip2.data.sources import open_records
from blip2.errors import InputError
from blip2.feature_cache.cache import CachedFeatures
from blip2.model.losses import LossOutput
from blip2.model.representation import RepresentationModel
from blip2.pipelines import load
from blip2.recipe import dump_config
from blip2.training import trainer
from blip2.training.data_stats import DataStats
from blip2.training.interruption import TrainingInterrupted
from blip2.training.metrics import read_metrics
from blip2.training.trainer import train
from blip2.training.validation import best_metric, is_better
from conftest import draw
from fixtures.processes import finish, signal_in_step, start, start_two
from fixtures.runs import assert_same_run, cut_short, lines


def mean(rows, key):
    return sum(row[key] for row in rows) / len(rows)


def write_table(folder, rows):
    """A JSONL file of (image, captions)."""
    folder.mkdir(exist_ok=True)
    table = folder / "table.jsonl"
    with table.open("w") as file:
        for number, (image, captions) in enumerate(rows):
            image.save(folder / f"{number}.png")
            file.write(json.dumps({"image": f"{number}.png", "captions": captions}) + "\n")
    return str(table)


# -- learning ------------------------------------------------------------------------------------------------------


def test_stage_one_learns(parts, tmp_path):
    recipe = parts.recipe(
        tmp_path / "run",
        data={"batch_size": 8, "horizontal_flip": False},
        qformer={"dropout": 0.0},
        optimizer={"learning_rate": {"vision.*": "frozen", "*": 1e-2}, "warmup_steps": 5},
        training={"max_steps": 90, "save_steps": 90},
    )
    train(recipe)
    rows = read_metrics(tmp_path / "run")
    first, last = rows[:6], rows[-6:]
    assert mean(first, "itc") > 2.0 and mean(last, "itc") < 1.8
    assert mean(first, "itg") > 3.5 and mean(last, "itg") < 2.0
    assert mean(last, "itm") < mean(first, "itm")
    assert mean(last, "itc_r1") > mean(first, "itc_r1") + 0.1


def test_activation_checkpointing_changes_nothing(parts, tmp_path):
    for name, checkpointing in (("plain", False), ("lean", True)):
        train(
            parts.recipe(
                tmp_path / name,
                qformer={"dropout": 0.2},
                training={"max_steps": 3, "save_steps": 3, "gradient_checkpointing": checkpointing},
            )
        )
    assert_same_run(tmp_path / "plain", tmp_path / "lean")


def test_deterministic_operations_are_asked_for_while_a_run_is_under_way(parts, tmp_path, monkeypatch):
    seen = []
    step = trainer.Trainer.step

    def note(self):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return step(self)

    monkeypatch.setattr(trainer.Trainer, "step", note)
    for wanted in (True, False):
        train(
            parts.recipe(tmp_path / str(wanted), training={"max_steps": 2, "save_steps": 2, "full_determinism": wanted})
        )
        assert not torch.are_deterministic_algorithms_enabled()
    assert seen == [True, True, False, False]
    assert_same_run(tmp_path / "True", tmp_path / "False")  # on a CPU it changes nothing


@pytest.mark.parametrize(("name", "fall"), [("llama", 0.8), ("opt", 0.6), ("t5", 0.05)])
def test_stage_two_learns(parts, tmp_path, name, fall):
    recipe = parts.recipe(
        tmp_path / "run",
        stage="generation",
        language={"name": getattr(parts, name)},
        qformer={"dropout": 0.0},
        optimizer={"learning_rate": {"vision.*": "frozen", "language.*": "frozen", "*": 1e-2}},
        training={"max_steps": 40, "save_steps": 40},
    )
    train(recipe)
    rows = read_metrics(tmp_path / "run")
    assert mean(rows[-6:], "lm") < mean(rows[:6], "lm") - fall


def test_stage_two_starts_from_stage_one(parts, runs, tmp_path, capsys):
    recipe = parts.recipe(
        tmp_path / "run",
        stage="generation",
        language={"name": parts.llama},
        start_from=str(runs["stage1"]),
        optimizer={"learning_rate": {"projection.*": 1e-3, "*": "frozen"}},
        training={"max_steps": 1},
    )
    new = load_file(train(recipe) / "model.safetensors")
    old = load_file(checkpoint.latest_checkpoint(runs["stage1"]) / "model.safetensors")
    shared = set(new) & set(old)
    assert shared == {name for name in new if name.startswith(("qformer.", "image_norm."))}
    assert all(torch.equal(new[name], old[name]) for name in shared)
    assert "new weights, which no checkpoint contains: projection" in capsys.readouterr().err


def gradients(recipe):
    """First moments of AdamW after one step, which are a tenth of the gradients."""
    _, state = checkpoint.read_training_state(train(recipe))
    return [each["exp_avg"] for each in state["optimizer"].values() if each]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_accumulated_batches_are_one_batch(parts, tmp_path, name):
    captions = ["a", "a red square", "the disc is blue here and there", "a stripe on a white ground"]
    rows = [(draw("disc", color, i), [caption]) for i, (color, caption) in
            enumerate(zip(("red", "blue", "green", "yellow"), captions, strict=True))]  # fmt: skip
    table = write_table(tmp_path / "data", rows)

    def recipe(folder, batch_size, accumulate):
        return parts.recipe(
            tmp_path / folder,
            stage="generation",
            language={"name": getattr(parts, name), "prompt": "a photo of"},
            data={"train": table, "batch_size": batch_size, "max_length": 64},
            qformer={"dropout": 0.0},
            optimizer={"max_grad_norm": None},
            training={"max_steps": 1, "gradient_accumulation_steps": accumulate},
        )

    whole, halves = gradients(recipe("whole", 4, 1)), gradients(recipe("halves", 2, 2))
    assert len(whole) == len(halves) > 20
    largest = max(float(tensor.abs().max()) for tensor in whole)
    for one, other in zip(whole, halves, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * largest)
    (whole,), (halves,) = (read_metrics(tmp_path / name) for name in ("whole", "halves"))
    for name in ("lm", "lm_accuracy"):
        assert whole[name] == pytest.approx(halves[name], rel=1e-5)
    for row in (whole, halves):
        assert row["lm_perplexity"] == pytest.approx(math.exp(row["lm"]), rel=1e-5)


# -- going on ------------------------------------------------------------------------------------------------------


def shards(folder):
    """WebDataset shards of twelve images each."""
    folder.mkdir()
    shapes, colors = ("square", "disc", "stripe"), ("red", "green", "blue", "yellow")
    for shard in range(2):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for number, (shape, color) in enumerate((s, c) for s in shapes for c in colors):
                draw(shape, color, 5 * shard).save(folder / "image.png")
                (folder / "text.txt").write_text(f"a {color} {shape}")
                tar.add(folder / "image.png", f"{number}.png")
                tar.add(folder / "text.txt", f"{number}.txt")
    return str(folder / "{000..001}.tar")


VARIANTS = {
    "plain": {},
    "workers": {"data": {"num_workers": 2}},
    "stream": {"data": {"num_workers": 1}, "streaming": True},
    "cached": {"data": {"cached_views": 3}},
    "cached int8": {"data": {"cached_views": 1, "cached_dtype": "int8", "num_workers": 2}},
    "accumulate": {"training": {"gradient_accumulation_steps": 2}},
    "bf16": {"training": {"precision": "bf16"}},
    "trained encoder": {"optimizer": {"learning_rate": {"*": 1e-3}}},
    "stage 2": {"stage": "generation", "qformer": {"bert": None}},
}


@pytest.mark.parametrize(("variant", "step"), [("plain", 8), *((name, 4) for name in VARIANTS)])
def test_going_on_equals_never_stopping(parts, tmp_path, variant, step):
    changes = {key: dict(value) if isinstance(value, dict) else value for key, value in VARIANTS[variant].items()}
    changes["training"] = {"max_steps": 10, "save_steps": 4, "save_total_limit": 3, **changes.get("training", {})}
    if changes.pop("streaming", False):
        changes["data"]["train"] = shards(tmp_path / "shards")
    if variant == "stage 2":
        changes["language"] = {"name": parts.t5}
    recipe = parts.recipe(tmp_path / "run", **changes)
    assert recipe.qformer.dropout > 0
    train(recipe)
    copy = cut_short(tmp_path / "run", step)
    train(replace(recipe, output=str(copy)), resume=True)
    assert_same_run(tmp_path / "run", copy)
    assert [row["step"] for row in lines(copy)] == list(range(1, 11))


def test_a_run_is_not_overwritten(parts, tmp_path):
    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 1})
    train(recipe)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"already holds a run .* rerun with --resume, or give another output"):
        train(recipe)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_going_on_after_the_end_does_nothing(parts, tmp_path, capsys):
    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 2})
    first = train(recipe)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train(recipe, resume=True) == first
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert "no step is left: the run has 2, and training.max_steps is 2" in capsys.readouterr().err


def test_resume_without_a_run_begins_one(parts, tmp_path):
    train(parts.recipe(tmp_path / "run", training={"max_steps": 1}), resume=True)
    assert [row["step"] for row in lines(tmp_path / "run")] == [1]


# -- stopping ------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(parts, tmp_path):
    optimizer = {"learning_rate": {"vision.*": "frozen", "*": 1e30}, "warmup_steps": 0}
    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 1, "save_steps": 1}, optimizer=optimizer)
    train(recipe)
    good = checkpoint.latest_checkpoint(tmp_path / "run")
    with pytest.raises(InputError) as raised:
        train(replace(recipe, training=replace(recipe.training, max_steps=5)), resume=True)
    message = str(raised.value)
    assert "\n" not in message
    assert f"the last good checkpoint is {good}" in message
    assert message.startswith("the loss is nan at step 2, in the batch of")
    assert message.count("images.jsonl row ") == 4
    assert "lower optimizer.learning_rate" in message
    assert checkpoint.latest_checkpoint(tmp_path / "run") == good
    assert [row["step"] for row in lines(tmp_path / "run")] == [1]


class SteepEncoder(torch.nn.Module):
    """An encoder whose output is finite and whose gradient is not: that of a root at 0."""

    def __init__(self):
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(()))

    def forward(self, pixels):
        return pixels.mean(dim=1).unflatten(-1, (2, -1)).flatten(1, 2) + self.zero.sqrt()


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(parts, tmp_path, max_grad_norm):
    recipe = parts.recipe(
        tmp_path / "run",
        vision={"name": "module", "image_size": 32},
        optimizer={"learning_rate": {"*": 1e-3}, "max_grad_norm": max_grad_norm},
        training={"max_steps": 1, "save_steps": 1},
    )
    with pytest.raises(InputError, match=r"the gradient is (nan|inf) at step 1, .*; the weights are unchanged"):
        train(recipe, encoder=SteepEncoder())
    assert checkpoint.latest_checkpoint(tmp_path / "run") is None


def command(recipe, folder, *options):
    """Arguments of ``blip2`` for a run like `recipe` in another folder."""
    path = folder.with_suffix(".yaml")
    path.write_text(dump_config(replace(recipe, output=str(folder))))
    return ["train", str(path), *options]


@pytest.fixture(scope="module")
def uninterrupted(parts, tmp_path_factory):
    """A recipe and its run. A step takes more batches than lie ready when a signal comes."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    training = {"max_steps": 8, "save_steps": 1000, "gradient_accumulation_steps": 12}
    recipe = parts.recipe(run, data={"num_workers": 2, "batch_size": 2}, training=training)
    log = run.with_suffix(".log")
    status, printed = finish(start(command(recipe, run), log), log)
    assert status == 0, printed
    return recipe, run


@pytest.mark.parametrize(
    ("number", "everyone"),
    # A container ends its first process; schedulers and Ctrl-C in a terminal reach the data workers as well.
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGHUP, True)],
)
def test_a_signal_saves_a_checkpoint(uninterrupted, tmp_path, number, everyone):
    recipe, reference = uninterrupted
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(command(recipe, run), log, partial(signal_in_step, 3, everyone, number))
    status, printed = finish(process, log)
    assert status == 130, printed
    assert "Traceback" not in printed
    stopped = json.loads((checkpoint.latest_checkpoint(run) / "state.json").read_text())["step"]
    assert stopped == 3
    last = printed.splitlines()[-1]
    assert last.startswith(f"stopped at step {stopped} of 8; its checkpoint is {run}")
    assert last.endswith("rerun with --resume")

    status, printed = finish(start(command(recipe, run, "--resume"), log), log)
    assert status == 0, printed
    assert_same_run(run, reference)


def test_a_signal_within_this_process(parts, tmp_path, monkeypatch):
    """The signal comes in the middle of a step: that step is finished, and handlers are put back."""
    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 5, "save_steps": 100})
    before = signal.getsignal(signal.SIGTERM)
    step = torch.optim.AdamW.step

    def interrupted(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted, match="stopped at step 1 of 5"):
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        train(recipe)
    assert signal.getsignal(signal.SIGTERM) == before
    assert [row["step"] for row in lines(tmp_path / "run")] == [1]
    assert checkpoint.latest_checkpoint(tmp_path / "run").name == "step-00000001"


# -- what is written -----------------------------------------------------------------------------------------------


def test_metrics_have_every_step_once(parts, tmp_path):
    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 5})
    train(recipe)
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        assert row["loss"] == pytest.approx(row["itc"] + row["itm"] + row["itg"], rel=1e-6)
        assert 0 <= row["itm_accuracy"] <= 1 and 0 <= row["itc_r1"] <= 1
        assert row["itg_perplexity"] > 1
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"])
        assert row["gradient_norm"] > 0
        assert 0 < row["itc_temperature"] < 1
        assert row["rate"] == pytest.approx(1e-3 * row["rate_share"])
        assert 0 < row["data_seconds"] < row["seconds"]
        assert row["data_share"] == pytest.approx(row["data_seconds"] / row["seconds"])
        assert (row["skipped"], row["truncated"]) == (0, 0)
    assert [row["rate_share"] for row in rows][:2] == [0.5, 1.0]
    assert rows[-1]["rate_share"] == pytest.approx(0.1)


def test_weights_of_the_objectives(parts, tmp_path):
    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 1})
    train(replace(recipe, objectives=replace(recipe.objectives, itc=0.0, itm=2.0, itg=0.5)))
    (row,) = read_metrics(tmp_path / "run")
    assert "itc" not in row
    assert row["loss"] == pytest.approx(2 * row["itm"] + 0.5 * row["itg"], rel=1e-6)


def test_a_loss_without_a_weight_is_an_error(parts, tmp_path, monkeypatch):
    forward = RepresentationModel.forward

    def with_one_more(self, *args, **kwargs):
        losses, metrics = forward(self, *args, **kwargs)
        return LossOutput({**losses, "pixels": losses["itc"]}, metrics)

    monkeypatch.setattr(RepresentationModel, "forward", with_one_more)
    with pytest.raises(ValueError, match="a loss named pixels, which has no weight: add a field pixels to Objectives"):
        train(parts.recipe(tmp_path / "run", training={"max_steps": 1}))


@pytest.mark.parametrize("loss", ["loss", "itc", "itm", "itg", "lm", "query_diversity"])
def test_the_smallest_loss_is_the_best(tmp_path, loss):
    name = f"validation_{loss}"
    assert is_better(0.1, 0.2, name)
    assert not is_better(0.2, 0.1, name)
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": 1, "{name}": {value}}}\n' for value in (0.3, 0.1, 0.2)))
    assert best_metric(tmp_path, name) == 0.1


def test_every_weight_of_a_loss_has_a_direction():
    """The only field of the objectives that is not the weight of a loss is the label smoothing."""
    names = {field.name for field in fields(ObjectivesConfig)} - {"label_smoothing"}
    assert set(ObjectivesConfig().weights) == names | {"lm"}
    assert all(is_better(0.1, 0.2, f"validation_{name}") for name in names)
    for name in ("validation_itc_r1", "validation_itm_accuracy", "validation_lm_accuracy", "evaluation_accuracy"):
        assert is_better(0.2, 0.1, name)
    assert is_better(0.1, 0.2, "evaluation_ranked_expected_calibration_error")


def test_a_best_metric_that_is_not_measured_is_an_error(parts, tmp_path):
    """Otherwise the run would end without a best checkpoint."""
    recipe = parts.recipe(
        tmp_path / "run",
        data={"validation": parts.images},
        training={"max_steps": 1, "metric_for_best_model": "validation_accuracy"},
    )
    with pytest.raises(InputError, match="is validation_accuracy, expected one of validation_loss, validation_itc"):
        train(recipe)
    # The step is not lost, and is measured when the name is corrected.
    corrected = replace(recipe, training=replace(recipe.training, metric_for_best_model="validation_itm_accuracy"))
    train(corrected, resume=True)
    (row,) = read_metrics(tmp_path / "run")
    found = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    assert (row["step"], row["validation_itm_accuracy"]) == (found["step"], found["value"])


def test_skipped_records_are_compared_with_the_samples_of_all_sources(tmp_path):
    """Also with those of a source that is no longer in the recipe of a resumed run."""
    stats = DataStats(["new"], {"skipped_image": 90, "samples_seen": {"old": 2000}})
    stats.end_step([0] * len(stats.local_counts()))
    assert stats.metrics()["samples_seen"] == {"new": 0, "old": 2000}
    stats.check_bad_fraction(0.05, tmp_path / "skipped.jsonl")
    with pytest.raises(InputError, match="90 of 2000 samples are bad"):
        stats.check_bad_fraction(0.04, tmp_path / "skipped.jsonl")


def test_validation_is_the_same_whenever_it_is_measured(parts, tmp_path):
    """With a rate of zero nothing changes but the random numbers that training draws in between."""
    recipe = parts.recipe(
        tmp_path / "run",
        data={"validation": parts.images},
        optimizer={"learning_rate": {"vision.*": "frozen", "*": 0.0}},
        training={"max_steps": 5, "eval_steps": 2},
    )
    train(recipe)
    rows = read_metrics(tmp_path / "run")
    found = [{key: row[key] for key in row if key.startswith("validation_")} for row in rows]
    assert found[0] == found[2] == {}
    assert found[1] == found[3] == found[4]
    assert {"validation_itc", "validation_itm", "validation_itg", "validation_itm_accuracy"} <= set(found[1])
    assert len({row["itm"] for row in rows}) == 5


def test_validation_changes_nothing_in_training(parts, tmp_path):
    recipe = parts.recipe(tmp_path / "without")
    train(recipe)
    data = replace(recipe.data, validation=parts.images)
    training = replace(recipe.training, eval_steps=1)
    train(replace(recipe, output=str(tmp_path / "with"), data=data, training=training))
    with_validation = [
        {key: value for key, value in row.items() if not key.startswith("validation_")}
        for row in lines(tmp_path / "with")
    ]
    assert with_validation == lines(tmp_path / "without")


def test_a_validation_of_which_no_record_can_be_used(parts, tmp_path):
    """A loss of 0 would be the best of all."""
    table = tmp_path / "broken.jsonl"
    (tmp_path / "broken.png").write_text("no image")
    table.write_text('{"image": "broken.png", "caption": "a disc"}\n' * 3)
    recipe = parts.recipe(
        tmp_path / "run", data={"validation": str(table)}, training={"max_steps": 1, "eval_steps": 1, "device": "cpu"}
    )
    with pytest.raises(InputError, match=r"none of the 3 records of data\.validation can be used: .*broken\.png"):
        train(recipe)


def test_validation_weighs_every_record_equally(parts, tmp_path):
    """Also when the last batch is smaller: with ITG alone one pass over all is the mean of passes over each."""
    rows = [(draw("disc", "red", i), [caption]) for i, caption in enumerate(["a red disc", "a disc", "the red disc"])]
    table = write_table(tmp_path / "data", rows)
    found = []
    for size in (1, 2):
        recipe = parts.recipe(
            tmp_path / f"run-{size}",
            stage="generation",
            language={"name": parts.llama},
            qformer={"bert": None},
            data={"train": table, "validation": table, "batch_size": size},
            optimizer={"learning_rate": {"vision.*": "frozen", "language.*": "frozen", "*": 0.0}},
            training={"max_steps": 1},
        )
        train(recipe)
        found.append(lines(tmp_path / f"run-{size}")[0])
    for row in found:
        assert row["validation_lm_perplexity"] == pytest.approx(math.exp(row["validation_lm"]), rel=1e-5)
    # Rows of one batch are averaged over tokens, so the two only agree roughly.
    assert found[0]["validation_lm"] == pytest.approx(found[1]["validation_lm"], rel=0.02)


def test_skipped_and_cut_records_are_named_and_counted(parts, tmp_path, capsys):
    rows = [(draw("disc", "red", i), ["a red disc"]) for i in range(4)]
    rows[1] = (rows[1][0], ["a disc " * 40])
    rows[3] = (rows[3][0], ["  "])
    table = write_table(tmp_path / "data", rows)
    (tmp_path / "data" / "2.png").write_bytes(b"no image")
    recipe = parts.recipe(
        tmp_path / "run",
        data={"train": table, "validation": table},
        training={"max_steps": 2, "eval_steps": 2},
    )
    train(recipe)
    errors = capsys.readouterr().err
    for number, why in ((2, "is not an image"), (3, "it has no caption")):
        (line, again) = (line for line in errors.splitlines() if line.startswith(f"skipped {table} row {number} "))
        assert line == again  # once an epoch
        assert f"{number}.png" in line and why in line
    assert errors.count("a caption is longer than data.max_length (32 tokens) and was truncated") == 1
    assert f"skipped 2 records of data.validation; the first is {table} row 2" in errors
    assert errors.splitlines()[-1] == "4 records skipped, 4 captions truncated"
    # Two of four can be used; each is taken twice, so that the batch keeps its size.
    assert [(row["skipped"], row["truncated"]) for row in lines(tmp_path / "run")] == [(2, 2), (4, 4)]


def test_the_run_begins_with_what_is_frozen(parts, tmp_path, capsys):
    train(parts.recipe(tmp_path / "run", training={"max_steps": 1}))
    errors = capsys.readouterr().err
    (vision,) = (line for line in errors.splitlines() if "vision" in line)
    assert "frozen" in vision and "13,888" in vision
    assert "trains at 0.001" in next(line for line in errors.splitlines() if "qformer" in line)


def test_bf16_is_near_fp32(parts, tmp_path):
    """And two runs of one process may have different precisions."""
    for precision in ("fp32", "bf16"):
        recipe = parts.recipe(tmp_path / precision, qformer={"dropout": 0.0})
        train(replace(recipe, training=replace(recipe.training, precision=precision)))
    full, half = lines(tmp_path / "fp32"), lines(tmp_path / "bf16")
    assert full[0]["itg"] != half[0]["itg"]
    assert full[0]["itg"] == pytest.approx(half[0]["itg"], rel=0.01)
    weights = load_file(checkpoint.latest_checkpoint(tmp_path / "bf16") / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


# -- what a machine or a recipe cannot do --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"precision": "fp16"}}, "training.precision is fp16, which needs a GPU, but"),
        (
            {"data": {"cached_views": 2}, "optimizer": {"learning_rate": {"*": 1e-3}}},
            "data.cached_views needs a frozen image encoder",
        ),
    ],
)
def test_what_cannot_be_done(parts, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train(parts.recipe(tmp_path / "run", **changes))


@pytest.mark.parametrize(
    ("data", "message"),
    [({"cached_views": 2}, "data.cached_views needs a table"), ({}, "data.validation is a stream")],
)
def test_streams_cannot_be_cached_or_validated_on(parts, tmp_path, data, message):
    stream = shards(tmp_path / "shards")
    source = {"train": stream} if data else {"validation": stream}
    with pytest.raises(InputError, match=message):
        train(parts.recipe(tmp_path / "run", data={**data, **source}))


def test_outputs_that_cannot_be(parts, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match=r"cannot create the folder of the run, .* give another output"):
        train(parts.recipe(tmp_path / "run"))
    with pytest.raises(InputError, match=r"\\udcff/run is not UTF-8: give an output"):
        train(parts.recipe(tmp_path / "\udcff" / "run"))


def test_no_room_for_metrics(parts, small_disk):
    run = small_disk(4)  # the recipe takes all of it
    with pytest.raises(InputError, match=r"no space left on the disk while writing to .* from the start"):
        train(parts.recipe(run))


def test_a_tracker_that_is_not_installed(parts, tmp_path):
    absent = [name for name in ("trackio", "wandb", "tensorboard") if importlib.util.find_spec(name) is None]
    if not absent:
        pytest.skip("all trackers are installed here")
    with pytest.raises(InputError, match=f"training.report_to names {absent[0]}, which cannot be imported"):
        train(parts.recipe(tmp_path / "run", training={"report_to": absent[:1]}))


def test_tensorboard(parts, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(parts.recipe(tmp_path / "run", training={"report_to": ["tensorboard"]}))
    (events,) = (path for path in (tmp_path / "run").rglob("events.out.tfevents*") if path.parent.name == "blip2")
    written = EventAccumulator(str(events)).Reload()
    assert [event.step for event in written.Scalars("itc")] == [1, 2, 3, 4]


# -- cached features -----------------------------------------------------------------------------------------------


def test_training_reads_what_the_encoder_says(parts, tmp_path):
    """One view, unaugmented, is what training on the same images, never cropped or mirrored, would see."""
    still = {"min_crop_scale": 1.0, "horizontal_flip": False}
    recipe = parts.recipe(tmp_path / "plain", data={**still, "validation": parts.images})
    encoder = build_image_encoder(recipe.vision, torch.float32)
    cached = replace(recipe, output=str(tmp_path / "cached"), data=replace(recipe.data, cached_views=1))
    given = []
    compute = ImageEncoder.encode

    def note(self, images):
        given.append(images)
        return compute(self, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageEncoder, "encode", note)
        train(cached)
    seen = [images for images in given if images.ndim == 3]
    assert len(seen) == 4 + 6  # steps, and batches of validation
    assert sum(len(images) for images in given if images.ndim == 4) == 24 + 2  # and a probe of positions

    records = open_records(parts.images, recipe.data)
    every = torch.stack([preprocess(read_image(record.image), encoder.preprocessing) for record in records])
    exact = encoder.encode(every).bfloat16()
    for images in seen:
        assert images.dtype == torch.bfloat16
        assert all(any(torch.equal(image, one) for one in exact) for image in images)
    assert torch.equal(torch.cat(seen[4:]), exact)

    # The same as from the same features given directly.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CachedFeatures, "read", lambda self, index, random: exact[index])
        train(replace(cached, output=str(tmp_path / "directly")))
    assert_same_run(tmp_path / "cached", tmp_path / "directly")


# -- several processes ---------------------------------------------------------------------------------------------


def test_two_processes(parts, tmp_path):
    # One held-out image, so that a process has none of its own.
    held_out = write_table(tmp_path / "data", [(Image.new("RGB", (8, 8)), ["a black square"])])
    recipe = parts.recipe(
        tmp_path / "run",
        data={"validation": held_out, "batch_size": 3},
        training={"max_steps": 4, "save_steps": 2, "eval_steps": 2, "gradient_accumulation_steps": 2},
    )
    printed = "".join(start_two(command(recipe, tmp_path / "run"), tmp_path))
    assert printed.count("stage: representation") == 1
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert ["validation_itg" in row for row in rows] == [False, True, False, True]
    assert rows[0]["images_per_second"] == pytest.approx(12 / rows[0]["seconds"])
    state = json.loads((checkpoint.latest_checkpoint(tmp_path / "run") / "state.json").read_text())
    assert len(state["positions"]) == 2
    assert [path.name for path in (tmp_path / "run").glob("metrics*")] == ["metrics.jsonl"]

    # The same, going on from step 2.
    copy = cut_short(tmp_path / "run", 2)
    start_two(command(recipe, copy, "--resume"), tmp_path)
    assert_same_run(tmp_path / "run", copy)


def test_two_processes_share_the_encoding(parts, tmp_path):
    """Each image is encoded once, by one of them; both train on all."""
    # One held-out image, so that a process has none to encode; one cannot be decoded, and one is missing.
    held_out = write_table(tmp_path / "data", [(Image.new("RGB", (8, 8)), ["a black square"])] * 3)
    (tmp_path / "data" / "1.png").write_text("no image")
    (tmp_path / "data" / "2.png").unlink()
    changes = {"validation": held_out, "cached_views": 2, "cached_dtype": "int8"}
    recipe = parts.recipe(
        tmp_path / "run", data={**changes, "batch_size": 3}, training={"max_steps": 2, "save_steps": 2}
    )
    first, second = start_two(["features", *command(recipe, tmp_path / "run")[1:]], tmp_path)
    assert "24 images in 2 views, 24 encoded now and 0 found; 0 records" in first
    assert "1 image in 1 view, 1 encoded now and 0 found; 2 records" in first
    assert "1.png): it is not an image" in first and "2.png cannot be read" in first
    assert "images in" not in second

    store = next((tmp_path / "features").glob("int8-2-*"))
    rows = [
        [json.loads(line)["image"] for line in path.read_text().splitlines() if '"row"' in line]
        for path in store.glob("*.index.jsonl")
    ]
    assert len(rows) == 2 and min(map(len, rows)) > 0
    assert len({image for part in rows for image in part}) == sum(map(len, rows)) == 24

    kept = {path: path.stat().st_size for path in (tmp_path / "features").rglob("*")}
    start_two(command(recipe, tmp_path / "run"), tmp_path)
    assert {path: path.stat().st_size for path in (tmp_path / "features").rglob("*")} == kept


# -- queries and positions -----------------------------------------------------------------------------------------


IMAGE = draw("disc", "red", 0)


def test_collapsed_queries_are_said_once(parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "COLLAPSE_MIN_STEP", 2)
    monkeypatch.setattr(trainer, "COLLAPSE_THRESHOLD", -1.0)
    train(parts.recipe(tmp_path / "run", training={"max_steps": 4}))
    said = " ".join(capsys.readouterr().err.split())
    assert (
        said.count("the queries have collapsed: at step 2 the mean cosine similarity between the queries of an image")
        == 1
    )
    assert "raise objectives.query_diversity, which is 0, and start again" in said


def test_queries_that_differ_are_not_complained_of(parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "COLLAPSE_MIN_STEP", 2)
    train(parts.recipe(tmp_path / "run", training={"max_steps": 3}, objectives=ObjectivesConfig(query_diversity=1.0)))
    assert "collapsed" not in capsys.readouterr().err
    rows = read_metrics(tmp_path / "run")
    assert all(0 <= row["query_diversity"] <= 1 and -1 <= row["query_similarity"] <= 1 for row in rows)
    for row in rows:
        total = row["itc"] + row["itm"] + row["itg"] + row["query_diversity"]
        assert row["loss"] == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("wanted", ["auto", "sine2d"])
def test_a_checkpoint_says_what_positions_it_was_trained_with(parts, tmp_path, wanted):
    short = {"max_steps": 1, "device": "cpu", "precision": "fp32"}
    recipe = parts.recipe(tmp_path / "run", training=short)
    train(replace(recipe, vision=replace(recipe.vision, position_encoding=wanted)))
    loaded = load(tmp_path / "run", device="cpu")
    found = "none" if wanted == "auto" else wanted  # a ViT has its own
    assert loaded.config.vision.position_encoding == loaded.model.vision.position_encoding == found
    other = load(tmp_path / "run", device="cpu", overrides={"vision.position_encoding": "none"})
    same = torch.equal(loaded.embed_images(IMAGE), other.embed_images(IMAGE))
    assert same is (found == "none")


def test_a_run_that_is_resumed_keeps_the_positions_it_was_trained_with(parts, tmp_path):
    def recipe(wanted, steps):
        made = parts.recipe(tmp_path / "run", training={"max_steps": steps, "device": "cpu", "precision": "fp32"})
        return replace(made, vision=replace(made.vision, position_encoding=wanted))

    train(recipe("sine2d", 1))
    train(recipe("auto", 2), resume=True)  # a test of this encoder, a ViT, would find none
    assert load(tmp_path / "run", device="cpu").config.vision.position_encoding == "sine2d"


def test_a_group_column_that_no_source_has_is_refused(parts, tmp_path):
    with pytest.raises(InputError, match=r"data\.group_column is twins, which no source of data\.train has"):
        train(parts.recipe(tmp_path / "run", data={"group_column": "twins"}))

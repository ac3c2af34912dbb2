"""Going on with a recipe, or with files, that are not what they were."""

import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip2 import checkpoint
from blip2.builder import build, with_absolute_paths
from blip2.errors import InputError
from blip2.io import LOCK, lock_folder
from blip2.pipelines import load
from blip2.training import trainer
from blip2.training.metrics import read_metrics
from blip2.training.monitor import FrozenFiles
from blip2.training.trainer import train
from fixtures.processes import start_two


def changed(recipe, **sections):
    """A recipe with other values in some of its sections."""
    return replace(recipe, **{name: replace(getattr(recipe, name), **values) for name, values in sections.items()})


def message(raised):
    assert "\n" not in str(raised.value)
    return str(raised.value)


def moments(run):
    """The first moment of each parameter in a run's last checkpoint."""
    _, state = checkpoint.read_training_state(checkpoint.latest_checkpoint(run))
    return {name: state["exp_avg"] for name, state in state["optimizer"].items()}


# -- rates and parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rates",
    [
        {"vision.*": "frozen", "qformer.*": 0.0, "*": 0.0},
        {"qformer.blocks.1.*": 0.0, "temperature": 0.0, "vision.*": "frozen", "image_norm.*": 0.0, "*": 0.0},
    ],
)
def test_other_groups_of_rates_keep_every_moment(parts, tmp_path, capsys, rates):
    """With gradients that do not count, the moments after a step are those before it, a little smaller."""
    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 2})
    train(recipe)
    before = moments(tmp_path / "run")
    weights = load_file(checkpoint.latest_checkpoint(tmp_path / "run") / "model.safetensors")
    capsys.readouterr()
    train(
        changed(recipe, training={"max_steps": 3}, optimizer={"learning_rate": rates, "betas": (0.999999, 0.98)}),
        resume=True,
    )
    after = moments(tmp_path / "run")
    assert before.keys() == after.keys()
    for name, moment in before.items():
        torch.testing.assert_close(after[name], moment, rtol=1e-3, atol=1e-5)
    assert any(float(moment.abs().max()) > 1e-2 for moment in before.values())
    new = load_file(checkpoint.latest_checkpoint(tmp_path / "run") / "model.safetensors")
    assert all(torch.equal(new[name], weights[name]) for name in weights)
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "the recipe has changed since the checkpoint, and its new values are used: optimizer.learning_rate from {"
        in said
    )
    assert "training.max_steps from 2 to 3" in said and "optimizer's state" not in said


def test_an_encoder_that_trains_from_here_on(parts, tmp_path, capsys):
    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 1})
    train(recipe)
    trains = changed(recipe, training={"max_steps": 2}, optimizer={"learning_rate": {"*": 1e-3}})
    folder = train(trains, resume=True)
    said = capsys.readouterr().err
    assert "vision trains from this step on, and starts from its pretrained weights" in said
    assert re.search(r"the optimizer starts without a state for \d+ parameters \(vision\.", said)
    assert any(name.startswith("vision.") for name in load_file(folder / "model.safetensors"))
    # To freeze it again would lose what was learned; a rate of 0 does not.
    with pytest.raises(InputError) as raised:
        train(changed(recipe, training={"max_steps": 3}), resume=True)
    assert "contains trained weights of vision, which new checkpoints would not contain" in message(raised)
    assert "(a rate of 0 does not change the weights)" in message(raised)
    before = load_file(folder / "model.safetensors")
    after = load_file(
        train(
            changed(trains, training={"max_steps": 3}, optimizer={"learning_rate": {"vision.*": 0.0, "*": 1e-3}}),
            resume=True,
        )
        / "model.safetensors"
    )
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("vision."))
    assert not torch.equal(after["qformer.queries"], before["qformer.queries"])


def test_adapters_that_come_and_go(parts, tmp_path, capsys):
    pytest.importorskip("peft")
    from blip2.config import LoraConfig

    plain = parts.recipe(
        tmp_path / "run",
        stage="generation",
        language={"name": parts.llama},
        training={"max_steps": 1, "save_total_limit": 5},
    )
    train(plain)
    rates = {"language.*lora_*": 1e-3, "language.*": "frozen", "vision.*": "frozen", "*": 1e-3}
    adapted = changed(
        plain, language={"lora": LoraConfig(r=2)}, optimizer={"learning_rate": rates}, training={"max_steps": 2}
    )
    train(adapted, resume=True)
    said = capsys.readouterr().err
    assert "language trains from this step on" in said and "language.lora.r from None to 2" in said
    longer = changed(adapted, training={"max_steps": 3})
    with pytest.raises(InputError, match=r"which the model does not have: copy the section language of"):
        train(changed(plain, training={"max_steps": 3}), resume=True)
    with pytest.raises(InputError, match="other shapes: language"):
        train(changed(longer, language={"lora": LoraConfig(r=3)}), resume=True)
    train(longer, resume=True)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"qformer": {"num_attention_heads": 2}},
            r"qformer\.num_attention_heads is 2, but .* was trained with 4: leave out",
        ),
        ({"qformer": {"cross_attention_frequency": 1}}, r"qformer\.cross_attention_frequency is 1, but .*with 2"),
        (
            {"stage": "generation"},
            "is of stage representation, but the recipe is of stage generation: give another output",
        ),
    ],
)
def test_what_cannot_go_on(parts, tmp_path, changes, why):
    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 1})
    train(recipe)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    language = {"language": {"name": parts.llama}} if "stage" in changes else {}
    with pytest.raises(InputError, match=why) as raised:
        train(parts.recipe(tmp_path / "run", training={"max_steps": 2}, **changes, **language), resume=True)
    message(raised)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == files


def test_a_checkpoint_without_its_recipe(parts, tmp_path):
    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 1})
    folder = train(recipe)
    (folder / "recipe.yaml").unlink()
    with pytest.raises(InputError, match=r"has no recipe\.yaml, expected the recipe of its run: copy") as raised:
        train(changed(recipe, training={"max_steps": 2}), resume=True)
    assert str(folder) in message(raised)
    assert load(folder, device="cpu").config.qformer == recipe.qformer  # using the model needs none


# -- the place in the data -----------------------------------------------------------------------------------------


def noting(monkeypatch):
    """Rows of the table that training takes, in their order."""
    rows, take = [], trainer.Trainer.next_batch

    def note(self):
        taken = take(self)
        rows.extend(int(key.split(" row ")[1].split()[0]) for key in taken.keys)
        return taken

    monkeypatch.setattr(trainer.Trainer, "next_batch", note)
    return rows


def test_every_record_once_an_epoch_with_another_batch_size(parts, tmp_path, capsys, monkeypatch):
    """As somebody does who ran out of memory. There are 24 images."""
    rows = noting(monkeypatch)
    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 3, "save_steps": 3})
    train(recipe)
    recipe = changed(
        recipe, data={"batch_size": 2}, training={"max_steps": 6, "save_steps": 6, "gradient_accumulation_steps": 2}
    )
    train(recipe, resume=True)
    assert sorted(rows) == list(range(24))
    said = " ".join(capsys.readouterr().err.split())
    assert "continues with the remaining records of the epoch, which are redistributed (batch_size from 4 to 2)" in said
    train(changed(recipe, training={"max_steps": 8, "save_steps": 8, "gradient_accumulation_steps": 6}), resume=True)
    assert Counter(rows) == Counter(dict.fromkeys(range(24), 2))


def test_fewer_processes_go_on_within_the_epoch(parts, tmp_path, monkeypatch):
    from blip2.recipe import dump_config

    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 2, "save_steps": 2})
    (tmp_path / "recipe.yaml").write_text(dump_config(recipe))
    start_two(["train", str(tmp_path / "recipe.yaml")], tmp_path)
    state = json.loads((checkpoint.latest_checkpoint(tmp_path / "run") / "state.json").read_text())
    assert len(state["positions"]) == 2
    rows = noting(monkeypatch)
    train(changed(recipe, training={"max_steps": 8, "save_steps": 8}), resume=True)
    assert len(rows) == 24
    assert len(set(rows[:8])) == 8  # what was left of the epoch, then the next one
    assert len(set(rows[8:])) == 16


def test_losses_of_other_batches_are_not_compared(parts, tmp_path, capsys):
    """ITC is smaller in smaller batches, whatever the model has learned."""
    recipe = parts.recipe(
        tmp_path / "run",
        data={"validation": parts.images, "batch_size": 2},
        optimizer={"learning_rate": {"vision.*": "frozen", "*": 0.0}},
        training={"max_steps": 1, "metric_for_best_model": "validation_itc"},
    )
    best = tmp_path / "run" / "best" / "best.json"
    train(recipe)
    train(changed(recipe, training={"max_steps": 2, "eval_steps": 1}), resume=True)
    assert json.loads(best.read_text())["step"] == 1  # it was not better
    small = json.loads(best.read_text())["value"]
    said = "the best checkpoint is one of those after step 2 from now on"
    assert said not in capsys.readouterr().err
    recipe = changed(recipe, data={"batch_size": 8}, training={"max_steps": 3})
    train(recipe, resume=True)
    assert said in capsys.readouterr().err
    found = json.loads(best.read_text())
    assert found["step"] == 3 and found["value"] > small
    train(changed(recipe, training={"max_steps": 4}), resume=True)
    assert json.loads(best.read_text()) == found and said not in capsys.readouterr().err


# -- one run in a folder -------------------------------------------------------------------------------------------


def hold(folder):
    """A process that holds a folder, once it does."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with lock_folder(folder):
                os.write(writing, b"held")
                time.sleep(600)
        finally:
            os._exit(1)
    assert os.read(reading, 4) == b"held"
    os.close(reading)
    os.close(writing)
    return child


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_run_has_its_folder_alone(parts, tmp_path):
    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 1})
    child = hold(tmp_path / "run")
    try:
        before = sorted((tmp_path / "run").rglob("*"))
        with pytest.raises(
            InputError, match=rf"run is in use by process {child} on \S+ since .* another output"
        ) as raised:
            train(recipe)
        message(raised)
        assert sorted((tmp_path / "run").rglob("*")) == before == [tmp_path / "run" / LOCK]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (tmp_path / "run" / LOCK).exists()  # of the killed process, which stands in nobody's way
    train(recipe)
    assert not (tmp_path / "run" / LOCK).exists()
    with lock_folder(tmp_path / "run"), pytest.raises(InputError, match="in use by another job of this process"):
        train(recipe, resume=True)


# -- files that change ---------------------------------------------------------------------------------------------


def test_a_frozen_file_that_is_written_into_stops_the_run(parts, tmp_path, monkeypatch):
    shutil.copytree(parts.vision, tmp_path / "vit")
    recipe = parts.recipe(
        tmp_path / "run", vision={"name": str(tmp_path / "vit")}, training={"max_steps": 4, "save_steps": 1}
    )
    step, file = trainer.Trainer.step, tmp_path / "vit" / "model.safetensors"

    def overwriting(self):
        if self.global_step == 2:
            os.utime(file)
        return step(self)

    monkeypatch.setattr(trainer.Trainer, "step", overwriting)
    with pytest.raises(InputError, match=r"vit/model\.safetensors was changed while .* from .*step-00000002") as raised:
        train(recipe)
    message(raised)
    assert checkpoint.latest_checkpoint(tmp_path / "run").name == "step-00000002"


def test_a_file_that_is_replaced_stays_mapped_as_it_was(tmp_path):
    for name in ("a.safetensors", "config.json"):
        (tmp_path / name).write_text("old")
    files = FrozenFiles([str(tmp_path), "google/hub-name"])
    (tmp_path / "new").write_text("new one")
    (tmp_path / "new").replace(tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text("not mapped")
    assert files.changed_files() == []
    files = FrozenFiles([str(tmp_path / "a.safetensors")])
    with (tmp_path / "a.safetensors").open("a") as file:
        file.write("!")
    assert files.changed_files() == [str(tmp_path / "a.safetensors")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(parts, tmp_path, value):
    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 1})
    folder = train(recipe)
    weights = load_file(folder / "model.safetensors")
    weights["qformer.queries"][0, 0, 0] = value
    save_file(weights, folder / "model.safetensors")
    found = "NaN" if value != value else "infinite numbers"
    for use in (
        lambda: load(folder, device="cpu"),
        lambda: train(changed(recipe, training={"max_steps": 2}), resume=True),
    ):
        with pytest.raises(
            InputError, match=rf"qformer\.queries in '.*step-00000001' contains {found}: use another"
        ) as raised:
            use()
        message(raised)
    shutil.copytree(parts.vision, tmp_path / "vit")
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    name = next(name for name in weights if name.endswith("projection.weight"))
    weights[name].view(-1)[-1] = value
    save_file(weights, tmp_path / "vit" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="returns features that are not finite: copy or download its weights"):
        build(changed(recipe, vision={"name": str(tmp_path / "vit")}).model, torch.device("cpu"))


def test_a_folder_that_is_deleted_while_its_run_trains(parts, tmp_path, capsys, monkeypatch):
    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 4, "save_steps": 2})
    step = trainer.Trainer.step

    def deleting(self):
        if self.global_step == 2:
            shutil.rmtree(tmp_path / "run")
        return step(self)

    monkeypatch.setattr(trainer.Trainer, "step", deleting)
    folder = train(recipe)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("was deleted during the run and is recreated without earlier metrics") == 1
    assert load(folder, device="cpu").config == with_absolute_paths(load(folder, device="cpu").config)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [3, 4]
    train(changed(recipe, training={"max_steps": 5}), resume=True)


def change_source(state, **changes):
    """The position of the first process, with changes in that of its only source."""
    position = state["positions"][0]
    return {**position, "sources": {name: {**each, **changes} for name, each in position["sources"].items()}}


ODD = [
    lambda state: [],
    lambda state: {**state, "step": "3"},
    lambda state: {**state, "step": -1},
    lambda state: {**state, "step": True},
    lambda state: {**state, "positions": {}},
    lambda state: {**state, "positions": [None]},
    lambda state: {**state, "positions": [{**state["positions"][0], "num_batches": 1.5}]},
    lambda state: {**state, "positions": [{**state["positions"][0], "sources": {"x": {"consumed": "y"}}}]},
    lambda state: {**state, "positions": []},
    lambda state: {**state, "positions": [{**state["positions"][0], "gradient_accumulation_steps": 0}]},
    lambda state: {**state, "positions": [{**state["positions"][0], "num_batches": 10**30}]},
    lambda state: {**state, "positions": [change_source(state, consumed_mask="zz")]},
    lambda state: {**state, "counts": []},
    lambda state: {**state, "counts": {**state["counts"], "samples_seen": 5}},
    lambda state: {**state, "counts": {**state["counts"], "truncated": "x"}},
    lambda state: {**state, "unfinished": {"loss": "x"}},
    lambda state: {**state, "unfinished": 3},
    lambda state: {key: value for key, value in state.items() if key != "versions"},
]


def test_a_state_of_odd_kinds(parts, tmp_path):
    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 1})
    folder = train(recipe)
    good = json.loads((folder / "state.json").read_text())
    for change in ODD:
        (folder / "state.json").write_text(json.dumps(change(good)))
        with pytest.raises(
            InputError, match=r"state\.json cannot be read .* delete .* to resume from the previous checkpoint"
        ) as raised:
            checkpoint.read_training_state(folder)
        message(raised)
    (folder / "state.json").write_text(json.dumps(good))
    for odd in ([1, 2], {1: {}}, {"temperature": 3}):
        torch.save({"optimizer": odd, "scaler": None}, folder / "optimizer.pt")
        with pytest.raises(InputError, match=r"optimizer\.pt cannot be read"):
            checkpoint.read_training_state(folder)


# -- names ---------------------------------------------------------------------------------------------------------


def test_a_run_of_relative_names_is_loaded_from_anywhere(parts, tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    for source, name in ((parts.vision, "vit"), (parts.bert, "bert"), (str(Path(parts.images).parent), "images")):
        shutil.copytree(source, here / name)
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    recipe = parts.recipe(
        Path("~/run"),
        vision={"name": "vit"},
        qformer={"bert": "./bert"},
        data={"train": {"images/*.jsonl": None}, "validation": "images/images.jsonl"},
        training={"max_steps": 1},
    )
    folder = train(recipe)
    assert not (here / "~").exists() and folder.is_relative_to(home / "run")
    monkeypatch.chdir("/")
    found = load(home / "run", device="cpu").config
    assert (found.vision.name, found.qformer.bert) == (str(here / "vit"), str(here / "bert"))
    found = checkpoint.read_recipe(checkpoint.open_checkpoint(str(home / "run")))
    assert (found.vision.name, found.qformer.bert) == (str(here / "vit"), str(here / "bert"))
    assert found.data.sources == {str(here / "images" / "*.jsonl"): None}
    train(changed(found, training={"max_steps": 2}), resume=True)
    (here / "vit").rename(here / "moved")
    with pytest.raises(InputError, match=f"there is no folder '{here}/vit' to load the image encoder from") as raised:
        load(home / "run", device="cpu")
    assert "hub" not in message(raised) and "huggingface" not in message(raised)


def test_names_that_are_no_paths_stay_as_they_are(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco").mkdir()
    sources = {
        "hub:me/images": 1.0, "s3://bucket/{000..127}.tar": 1.0, "nowhere/*.tar": 1.0, "package:scenes/train": 1.0,
        "coco-karpathy:test:coco": 1.0, "coco/{000..127}.tar": 1.0,
    }  # fmt: skip
    recipe = parts.recipe(
        Path("run"), vision={"name": "google/vit"}, qformer={"bert": "package:minilm"}, data={"train": sources}
    )
    found = with_absolute_paths(recipe)
    assert (found.vision.name, found.qformer.bert, found.output) == (
        "google/vit",
        "package:minilm",
        str(tmp_path / "run"),
    )
    assert list(found.data.sources) == [
        *list(sources)[:4], f"coco-karpathy:test:{tmp_path}/coco", f"{tmp_path}/coco/{{000..127}}.tar"
    ]  # fmt: skip

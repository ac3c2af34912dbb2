import errno
import json
import os
import shutil
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip2 import checkpoint
from blip2.builder import build
from blip2.errors import InputError
from blip2.recipe import load_recipe
from blip2.training.optimizer import configure_trainable

CPU = torch.device("cpu")
POSITION = {"num_batches": 3, "gradient_accumulation_steps": 1, "sources": {}}
STATE = {"positions": [POSITION], "counts": {}, "unfinished": None}


@pytest.fixture
def recipe(parts, tmp_path):
    return parts.recipe(tmp_path / "run", qformer={"dropout": 0.0})


@pytest.fixture
def built(recipe):
    torch.manual_seed(1)
    return build(recipe.model, CPU)


@pytest.fixture
def save(recipe, built, tmp_path):
    """Saves the step that is asked for, in a run of this test."""
    run = tmp_path / "run"

    def save(step, keep=2, **state):
        optimizer = {"optimizer": {"temperature": {"momentum": torch.full((3,), float(step))}}, "scaler": None}
        state = {**STATE, **state}
        return checkpoint.save_checkpoint(run, step, built.model, recipe, built.tokenizer, optimizer, state, keep)

    save.run = run
    return save


def shift(model):
    """Other weights, the same on every call."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.25


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_round_trip_is_bit_identical(save, built, recipe):
    before = {name: tensor.clone() for name, tensor in checkpoint.trained_state_dict(built.model).items()}
    folder = save(7)
    shift(built.model)
    assert not torch.equal(built.model.qformer.queries, before["qformer.queries"])
    checkpoint.load_weights(checkpoint.open_native(folder), built.model)
    after = checkpoint.trained_state_dict(built.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert set(before) == set(after)


def test_holds_what_was_trained_and_nothing_frozen(save, built):
    names = set(load_file(save(7) / "model.safetensors"))
    assert names == {name for name, _ in built.model.named_parameters() if not name.startswith("vision.")}


def test_holds_recipe_versions_and_step(save, recipe):
    positions = [POSITION, {**POSITION, "num_batches": 4}]
    folder = save(7, positions=positions)
    assert folder.name == "step-00000007"
    assert load_recipe(folder / "recipe.yaml") == recipe
    saved = checkpoint.open_native(folder)
    assert (saved.config, checkpoint.read_recipe(saved)) == (recipe.model, recipe)
    state, optimizer = checkpoint.read_training_state(folder)
    assert state["step"] == 7
    assert state["positions"] == positions
    assert state["versions"]["torch"] == version("torch")
    assert set(state["versions"]) == {"python", "blip2", "torch", "transformers"}
    assert torch.equal(optimizer["optimizer"]["temperature"]["momentum"], torch.full((3,), 7.0))
    assert (folder / "tokenizer" / "tokenizer.json").is_file()


def test_older_ones_are_pruned(save):
    for step in (2, 4, 100_000, 6):
        save(step, keep=3)
    left = sorted(path.name for path in (save.run / "checkpoints").iterdir())
    assert left == ["step-00000004", "step-00000006", "step-00100000"]
    assert checkpoint.latest_checkpoint(save.run).name == "step-00100000"


def test_a_copy_under_another_name_is_no_checkpoint_of_the_run(save):
    """Eight letters are no number, though they sort behind one."""
    folder = save.run / "checkpoints"
    shutil.copytree(save(2), folder / "step-original")
    shutil.copytree(folder / "step-00000002", folder / "step-00000002-old")
    assert checkpoint.latest_checkpoint(save.run).name == "step-00000002"
    for step in (4, 6, 100_000_000, 8):
        save(step, keep=2)
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["step-00000002-old", "step-00000008", "step-100000000", "step-original"]
    assert checkpoint.latest_checkpoint(save.run).name == "step-100000000"


def test_a_step_can_be_saved_again(save, built):
    save(2)
    shift(built.model)
    folder = save(2)
    assert torch.equal(load_file(folder / "model.safetensors")["qformer.queries"], built.model.qformer.queries)


class Killed(BaseException):
    """Nothing in the package may catch this, as nothing can catch SIGKILL."""


@pytest.mark.parametrize("moment", ["model", "optimizer", "recipe", "flush", "rename"])
def test_is_complete_or_absent(save, built, monkeypatch, moment):
    save(2)
    kept = built.model.qformer.queries.clone()
    shift(built.model)

    def killed(*args, **kwargs):
        raise Killed

    target = {
        "model": (checkpoint, "write_tensors"),
        "optimizer": (torch, "save"),
        "recipe": (checkpoint, "dump_config"),
        "flush": (os, "fsync"),
        "rename": (type(save.run), "rename"),
    }[moment]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*target, killed)
        save(4)
    last = checkpoint.latest_checkpoint(save.run)
    assert last.name == "step-00000002"
    assert list((save.run / "checkpoints").glob("*.tmp"))  # a half-written one lies there, and does no harm
    checkpoint.load_weights(checkpoint.open_native(last), built.model)
    assert torch.equal(built.model.qformer.queries, kept)
    checkpoint.read_training_state(last)

    save(4)
    left = sorted(path.name for path in (save.run / "checkpoints").iterdir())
    assert left == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ((checkpoint, "write_tensors"), OSError(errno.ENOSPC, "No space left on device")),
        ((torch, "save"), OSError(errno.EDQUOT, "Disk quota exceeded")),
        ((os, "fsync"), OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_disk_full_names_the_last_good_checkpoint(save, built, monkeypatch, target, error):
    save(2)
    kept = built.model.qformer.queries.clone()
    shift(built.model)

    def full(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch, pytest.raises(InputError) as raised:
        patch.setattr(*target, full)
        save(4)
    message = one_line(raised)
    assert "no space left on the disk while saving the checkpoint of step 4" in message
    assert "rerun with --resume, which continues from step-00000002" in message
    assert [path.name for path in (save.run / "checkpoints").iterdir()] == ["step-00000002"]
    checkpoint.load_weights(checkpoint.open_native(checkpoint.latest_checkpoint(save.run)), built.model)
    assert torch.equal(built.model.qformer.queries, kept)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.95])
def test_really_full_disk(built, recipe, tmp_path, small_disk, share):
    """The second checkpoint does not fit, wherever in it the disk ends."""
    optimizer = {"optimizer": {"temperature": {"momentum": [torch.zeros(500_000), torch.zeros(500_000)]}}}

    def save(run, step):
        return checkpoint.save_checkpoint(run, step, built.model, recipe, built.tokenizer, optimizer, STATE, 2)

    files = [path for path in save(tmp_path / "roomy", 2).rglob("*") if path.is_file()]
    pages = sum(-(-path.stat().st_size // 4096) + 1 for path in files)
    run = small_disk(int(4 * pages * (1 + share)))
    good = save(run, 2)
    with pytest.raises(InputError, match=r"no space left .* step 4 .* from step-00000002"):
        save(run, 4)
    assert checkpoint.latest_checkpoint(run) == good
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    checkpoint.load_weights(checkpoint.open_native(good), built.model)
    checkpoint.read_training_state(good)


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.update({"qformer.queries": torch.zeros(1, 5, 32)}),
            "other shapes: qformer.queries is (1, 5, 32), expected (1, 4, 32)",
        ),
        (lambda weights: weights.pop("matching_head.bias"), "missing: matching_head.bias"),
        (lambda weights: weights.update({"qformer.extra": torch.zeros(2)}), "unknown: qformer.extra"),
    ],
)
def test_what_does_not_fit_is_listed(save, built, change, message):
    folder = save(2)
    rewrite(folder, change)
    before = built.model.qformer.embedding_norm.weight.clone()
    shift(built.model)
    with pytest.raises(InputError) as raised:
        checkpoint.load_weights(checkpoint.open_native(folder), built.model)
    assert message in one_line(raised)
    assert str(folder) in str(raised.value)
    # Nothing was loaded by halves.
    assert torch.equal(built.model.qformer.embedding_norm.weight, before + 0.25)


def test_long_lists_are_cut(save, built):
    folder = save(2)
    rewrite(folder, lambda weights: [weights.pop(name) for name in list(weights)[:10]])
    with pytest.raises(InputError, match="and 1 more"):
        checkpoint.load_weights(checkpoint.open_native(folder), built.model)


@pytest.mark.parametrize("size", [0, 4, 1000, 50_000])
def test_truncated_weights(save, built, size):
    folder = save(2)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"cannot be read .* copy it again, or use another checkpoint") as raised:
        checkpoint.load_weights(checkpoint.open_native(folder), built.model)
    assert str(folder) in one_line(raised)


class Payload:
    def __reduce__(self):
        return (os.system, ("touch ran",))


def test_code_in_a_checkpoint_is_refused(save, tmp_path, monkeypatch):
    folder = save(2)
    monkeypatch.chdir(tmp_path)
    torch.save({"optimizer": Payload()}, folder / "optimizer.pt")
    with pytest.raises(InputError, match=r"optimizer\.pt cannot be read") as raised:
        checkpoint.read_training_state(folder)
    one_line(raised)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["state.json", "optimizer.pt"])
@pytest.mark.parametrize("size", [0, 30])
def test_damaged_state(save, name, size):
    path = save(2) / name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=f"{name} cannot be read .* delete"):
        checkpoint.read_training_state(path.parent)


@pytest.mark.parametrize("found", [None, 0, 2])
def test_the_state_of_another_version(save, found):
    folder = save(2)
    state = {**json.loads((folder / "state.json").read_text()), "format": found}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=f"state of format {found}; this is blip2 .* format 3: .*start_from") as raised:
        checkpoint.read_training_state(folder)
    one_line(raised)


def test_find(save, tmp_path):
    first, last = save(2), save(4)
    assert checkpoint.find_checkpoint(save.run) == last
    assert checkpoint.find_checkpoint(first) == first
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="contains no checkpoint: give the folder of a run"):
        checkpoint.find_checkpoint(tmp_path / "empty")
    with pytest.raises(InputError, match="nothing is not a folder: give the folder of a run"):
        checkpoint.find_checkpoint(tmp_path / "nothing")


def test_a_recipe_is_not_needed(save, built):
    """The config is enough to use a model; what is in the recipe does not matter then."""
    folder = save(2)
    saved = checkpoint.open_checkpoint(str(folder))
    for text, found in (
        ("no recipe", "contains a value of type str"),
        ("", "is empty"),
        ("on: 1", "has a key that is not text"),
    ):
        (folder / "recipe.yaml").write_text(text)
        with pytest.raises(InputError, match=rf"recipe\.yaml: it {found}, expected keys with values"):
            checkpoint.read_recipe(saved)
    (folder / "recipe.yaml").unlink()
    assert checkpoint.read_recipe(saved) is None
    checkpoint.load_weights(saved, build(saved.config, CPU, saved).model)


def test_a_folder_of_before_configs(save):
    """The message says what is there, what is missing and what to write."""
    folder = save(2)
    (folder / "model.yaml").unlink()
    for name in (folder, save.run):
        with pytest.raises(
            InputError, match=r"has no model\.yaml \(it contains model\.safetensors, .*recipe\.yaml.*\)"
        ) as raised:
            checkpoint.open_checkpoint(str(name))
        assert str(folder) in one_line(raised) and "create model.yaml with the keys stage, vision," in str(raised.value)


def test_keys_of_a_recipe_in_a_config(save):
    folder = save(2)
    with (folder / "model.yaml").open("a") as file:
        file.write("output: runs/x\n")
    with pytest.raises(
        InputError, match=r"model\.yaml: there is no key 'output'; its keys are stage, vision, qformer,"
    ):
        checkpoint.open_native(folder)


def test_a_trained_encoder_is_kept(parts, recipe, tmp_path):
    """Also for a model in which it is frozen, as it is when a checkpoint is loaded to be used."""
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, learning_rate={"*": 1e-3}))
    built = build(recipe.model, CPU)
    configure_trainable(built.model, recipe.optimizer)
    shift(built.model)
    folder = checkpoint.save_checkpoint(tmp_path / "run", 1, built.model, recipe, built.tokenizer, {}, {}, 1)
    other = build(recipe.model, CPU, checkpoint.open_native(folder))
    checkpoint.load_weights(checkpoint.open_native(folder), other.model)
    own, new = built.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(own[name], new[name]) for name in own)


def test_tied_weights_of_a_trained_llm(parts, tmp_path):
    """OPT's and T5's output matrix is their embedding, which can be in a safetensors file once only."""
    rates = {"vision.*": "frozen", "*": 1e-3}
    recipe = parts.recipe(
        tmp_path / "run", stage="generation", language={"name": parts.opt}, optimizer={"learning_rate": rates}
    )
    built = build(recipe.model, CPU)
    configure_trainable(built.model, recipe.optimizer)
    shift(built.model)
    folder = checkpoint.save_checkpoint(tmp_path / "run", 1, built.model, recipe, None, {}, {}, 1)
    other = build(recipe.model, CPU, checkpoint.open_native(folder))
    checkpoint.load_weights(checkpoint.open_native(folder), other.model)
    own, new = built.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(own[name], new[name]) for name in own if not name.startswith("vision."))


@pytest.fixture
def second_stage(parts, tmp_path):
    recipe = parts.recipe(
        tmp_path / "second", stage="generation", language={"name": parts.llama}, qformer={"bert": None}
    )
    return build(recipe.model, CPU).model


def test_second_stage_takes_the_qformer_of_the_first(save, built, second_stage):
    shift(built.model)
    language = second_stage.language.network.lm_head.weight.clone()
    new = checkpoint.load_previous_stage(checkpoint.open_native(save(2)), second_stage)
    assert new == ["projection.bias", "projection.weight"]
    assert torch.equal(second_stage.qformer.queries, built.model.qformer.queries)
    assert torch.equal(second_stage.image_norm.weight, built.model.image_norm.weight)
    theirs = built.model.qformer.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in second_stage.qformer.state_dict().items())
    assert torch.equal(second_stage.language.network.lm_head.weight, language)


def test_previous_stage_of_other_shapes(save, second_stage):
    folder = save(2)
    rewrite(folder, lambda weights: weights.update({"image_norm.weight": torch.zeros(7)}))
    with pytest.raises(InputError, match=r"image_norm\.weight is \(7,\), expected \(24,\)"):
        checkpoint.load_previous_stage(checkpoint.open_native(folder), second_stage)


def test_previous_stage_without_qformer(save, second_stage):
    folder = save(2)
    save_file({"something": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"contains no weights of a Q-Former, but \['something'\]"):
        checkpoint.load_previous_stage(checkpoint.open_native(folder), second_stage)


def test_previous_stage_whose_encoder_would_be_lost(recipe, second_stage, tmp_path):
    """The second stage's checkpoints would name the encoder as it was before the first stage trained it."""
    trained = replace(recipe, optimizer=replace(recipe.optimizer, learning_rate={"*": 1e-3}))
    built = build(trained.model, CPU)
    configure_trainable(built.model, trained.optimizer)
    folder = checkpoint.save_checkpoint(tmp_path / "run", 1, built.model, trained, built.tokenizer, {}, {}, 1)
    with pytest.raises(InputError, match=r'trained weights of vision, .* give "vision\.\*" a rate'):
        checkpoint.load_previous_stage(checkpoint.open_native(folder), second_stage)

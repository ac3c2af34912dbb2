"""Several processes: what they learn, share, survive and say."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip2.recipe import dump_recipe
from blip2.training import checkpoint
from blip2.training.loop import train
from blip2.training.progress import read_metrics
from fixtures.processes import finish, share_global_batches, start, start_two

LOSSES = ("loss", "itc", "itm", "itg")


def command(recipe, folder, *options):
    """Arguments of ``blip2`` for a run like `recipe` in another folder."""
    path = folder.with_suffix(".yaml")
    path.write_text(dump_recipe(replace(recipe, output=str(folder))))
    return ["train", str(path), *options]


def trained(run):
    return load_file(checkpoint.latest(run) / "model.safetensors")


# -- learning ------------------------------------------------------------------------------------------------------


def randomised(recipe):
    """A recipe that starts from weights under which every part matters: with the usual ones all pictures look alike at
    first, and what rounding does to the little that sets them apart grows from step to step."""
    start = replace(recipe, output=f"{recipe.output}-start", training=replace(recipe.training, steps=1))
    weights = train(start) / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    drawn = load_file(weights)
    for name, tensor in drawn.items():
        if tensor.ndim > 1:
            tensor.normal_(std=0.3, generator=generator)
        elif name == "temperature":
            tensor.fill_(0.3)
    save_file(drawn, weights)
    return replace(recipe, start_from=start.output)


def test_two_processes_learn_as_one(parts, tmp_path):
    """Losses of 50 steps, with hard negatives drawn from the batch of both."""
    recipe = randomised(
        parts.recipe(
            tmp_path / "run",
            qformer={"dropout": 0.0},
            data={"batch_size": 6},
            training={"steps": 50, "save_every": 50},
        )
    )
    log = tmp_path / "log"
    whole = replace(recipe, data=replace(recipe.data, batch_size=12))
    status, printed = finish(start(command(whole, tmp_path / "one"), log), log)
    assert status == 0, printed
    start_two(command(recipe, tmp_path / "two"), tmp_path, share_global_batches)

    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert len(one) == len(two) == 50
    assert one[-1]["loss"] < one[0]["loss"] - 1
    for row, other in zip(one, two, strict=True):
        for name in LOSSES:
            assert other[name] == pytest.approx(row[name], abs=1e-4), (name, row["step"])

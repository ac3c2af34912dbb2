"""Several processes: what they learn, share, survive and say."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from blip2.recipe import dump_recipe
from blip2.training import checkpoint
from blip2.training.progress import read_metrics
from fixtures.processes import finish, share_global_batches, start, start_two

LEARNED = ("loss", "itc", "itm", "itg", "gradient_norm")


def command(recipe, folder, *options):
    """Arguments of ``blip2`` for a run like `recipe` in another folder."""
    path = folder.with_suffix(".yaml")
    path.write_text(dump_recipe(replace(recipe, output=str(folder))))
    return ["train", str(path), *options]


def trained(run):
    return load_file(checkpoint.latest(run) / "model.safetensors")


# -- learning ------------------------------------------------------------------------------------------------------


def test_two_processes_learn_as_one(parts, tmp_path):
    """Losses of 50 steps, with hard negatives drawn from the batch of both."""
    recipe = parts.recipe(
        tmp_path / "run",
        qformer={"dropout": 0.0},
        data={"batch_size": 6},
        training={"steps": 50, "save_every": 50},
    )
    log = tmp_path / "log"
    whole = replace(recipe, data=replace(recipe.data, batch_size=12))
    status, printed = finish(start(command(whole, tmp_path / "one"), log), log)
    assert status == 0, printed
    start_two(command(recipe, tmp_path / "two"), tmp_path, share_global_batches)

    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert len(one) == len(two) == 50
    assert one[-1]["loss"] < one[0]["loss"] - 0.5
    for row, other in zip(one, two, strict=True):
        for name in LEARNED:
            assert other[name] == pytest.approx(row[name], abs=1e-4), (name, row["step"])
    mine, theirs = trained(tmp_path / "one"), trained(tmp_path / "two")
    for name, tensor in mine.items():
        # A key's bias changes no attention: its gradient is rounding, which AdamW makes as large as any other.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(theirs[name], tensor, atol=1e-3, rtol=0, msg=name)

"""A run that is killed again and again ends as if nothing had happened."""

import random
import signal
from functools import partial

import torch
from safetensors.torch import load_file

from blip2 import checkpoint
from blip2.recipe import dump_config
from blip2.training.metrics import read_metrics
from fixtures.processes import finish, kill_after, kill_at, start
from fixtures.runs import TIMES

STEPS = 60
KILLS = 12


def exact(run):
    """Every number that a run measured as Python writes it, but for times."""
    return [{key: repr(value) for key, value in row.items() if key not in TIMES} for row in read_metrics(run)]


def inode(path):
    return path.stat().st_ino if path.exists() else None


def half_written(run):
    """Checkpoints that are being written, or that a kill left behind."""
    return {(path.name, path.stat().st_ctime_ns) for path in (run / "checkpoints").glob("*.tmp")}


def die_at_a_step(metrics, old, step, seconds, latest, everyone):
    """In a process of its own: kill it so long after a step, and before it completes the checkpoint `latest`."""
    # A new file: what the process before did after its last checkpoint is forgotten, this one's steps follow.
    kill_after(
        lambda: inode(metrics) not in (None, old) and metrics.read_bytes().count(b"\n") >= step, seconds, everyone
    )
    kill_at(writing(latest), 1, everyone)


def writing(step):
    """What the paths of a checkpoint that is being written have in common."""
    return f"step-{step:08d}.tmp/"


def test_killed_at_random_moments(parts, tmp_path):
    recipe = parts.recipe(tmp_path / "calm", data={"num_workers": 2}, training={"max_steps": STEPS, "save_steps": 3})
    assert recipe.qformer.dropout > 0
    path, log = tmp_path / "recipe.yaml", tmp_path / "log"
    path.write_text(dump_config(recipe))
    status, printed = finish(start(["train", str(path)], log), log)
    assert status == 0, printed

    run, moments = tmp_path / "killed", random.Random(5)
    metrics = run / "metrics.jsonl"
    arguments = ["train", str(path), "--output", str(run), "--resume"]
    resumed_from = []
    for number in range(KILLS):
        last = checkpoint.latest_checkpoint(run)
        step = int(last.name.removeprefix("step-")) if last else 0
        resumed_from.append(step)
        left_behind = half_written(run)
        everyone = number % 2 == 1  # or alone, so that its data workers are orphans
        if number % 3 == 0:
            before = partial(kill_at, writing(step + 3), 1 + 4 * (number // 3), everyone)
        else:
            step += moments.randint(2, 8)
            seconds, latest = moments.uniform(0, 0.02), (step // 3 + 2) * 3
            before = partial(die_at_a_step, metrics, inode(metrics), step, seconds, latest, everyone)
        process = start(arguments, log, before)
        status, printed = finish(process, log)
        assert status == -signal.SIGKILL, printed
        assert number % 3 or half_written(run) - left_behind
    assert len(set(resumed_from)) >= 4
    assert resumed_from[-1] < STEPS

    log = tmp_path / "last.log"  # orphaned workers of the others may still complain in theirs
    status, printed = finish(start(arguments, log), log)
    assert status == 0, printed
    assert "Traceback" not in printed
    calm, killed = exact(tmp_path / "calm"), exact(run)
    assert [row["step"] for row in killed] == [str(step) for step in range(1, STEPS + 1)]
    assert killed == calm
    one = load_file(checkpoint.latest_checkpoint(tmp_path / "calm") / "model.safetensors")
    other = load_file(checkpoint.latest_checkpoint(run) / "model.safetensors")
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert not half_written(run)

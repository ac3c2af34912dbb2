"""A run that is killed again and again ends as if nothing had happened."""

import os
import random
import signal
import time

import torch
from safetensors.torch import load_file

from blip2 import checkpoint
from blip2.recipe import dump_config
from blip2.training.metrics import read_metrics
from fixtures.processes import finish, start
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
    found = set()
    for path in (run / "checkpoints").glob("*.tmp"):
        try:
            found.add((path.name, path.stat().st_ctime_ns))
        except FileNotFoundError:  # it became a checkpoint in this moment
            continue
    return found


def wait_until(reached, process, log):
    while not reached():
        assert process.is_alive(), log.read_text()
        time.sleep(0.0005)


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
    resumed_from, halves = [], 0
    for number in range(KILLS):
        last = checkpoint.latest_checkpoint(run)
        resumed_from.append(int(last.name.removeprefix("step-")) if last else 0)
        before, left_behind = inode(metrics), half_written(run)
        process = start(arguments, log)
        # A new file: what the process before did after its last checkpoint is forgotten, this one's steps follow.
        wait_until(lambda old=before: inode(metrics) not in (None, old), process, log)
        if number % 3 == 0:
            wait_until(lambda old=left_behind: half_written(run) - old, process, log)
            time.sleep(moments.uniform(0, 0.008))
        else:
            target = resumed_from[-1] + moments.randint(2, 9)
            wait_until(lambda steps=target: metrics.read_bytes().count(b"\n") >= steps, process, log)
            time.sleep(moments.uniform(0, 0.02))
        # Alone, so that its data workers are orphans, or with them.
        (os.killpg if number % 2 else os.kill)(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        halves += bool(half_written(run) - left_behind)
    assert halves >= 2
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

"""Several processes: what they learn, share, survive and say."""

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip2 import checkpoint
from blip2.config import LoraConfig
from blip2.errors import InputError
from blip2.recipe import dump_config
from blip2.training.launch import make_accelerator
from blip2.training.metrics import read_metrics
from blip2.training.trainer import train
from fixtures.processes import begin_two, finish, share_global_batches, start, start_two, tell_traffic
from fixtures.runs import assert_same_run, lines

step_traffic = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "traffic.py"))["step_traffic"]
LOSSES = ("loss", "itc", "itm", "itg")


def command(recipe, folder, *options):
    """Arguments of ``blip2`` for a run like `recipe` in another folder."""
    path = folder.with_suffix(".yaml")
    path.write_text(dump_config(replace(recipe, output=str(folder))))
    return ["train", str(path), *options]


def trained(run):
    return load_file(checkpoint.latest_checkpoint(run) / "model.safetensors")


# -- learning ------------------------------------------------------------------------------------------------------


def randomized(recipe):
    """A recipe that starts from weights under which every part matters: with the usual ones all images look alike at
    first, and what rounding does to the little that sets them apart grows from step to step."""
    start = replace(recipe, output=f"{recipe.output}-start", training=replace(recipe.training, max_steps=1))
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
    recipe = randomized(
        parts.recipe(
            tmp_path / "run",
            qformer={"dropout": 0.0},
            data={"batch_size": 6},
            training={"max_steps": 50, "save_steps": 50},
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


# -- what travels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["representation", "generation"])
def test_what_travels_is_what_is_written_down(parts, tmp_path, stage):
    """Every byte that the last of three steps gives to a collective."""
    language = {"stage": stage, "language": {"name": parts.opt}} if stage == "generation" else {}
    recipe = parts.recipe(
        tmp_path / "run",
        data={"batch_size": 3, "max_length": 6},  # which all captions are longer than
        training={"max_steps": 3, "save_steps": 3, "gradient_accumulation_steps": 2},
        **language,
    )
    printed = start_two(command(recipe, tmp_path / "run"), tmp_path, tell_traffic)[0]
    step = printed.split("\nstep\n")[2]
    measured = Counter()
    for name, size in re.findall(r"travels (\w+) (\d+)", step):
        measured[name] += int(size)
    weights = sum(tensor.numel() for tensor in trained(tmp_path / "run").values())
    expected = Counter()
    for travel in step_traffic(recipe, weights, 16 + 1, 24, 6, 2):
        name = {"all-to-all": "all_to_all_single"}.get(travel.operation, travel.operation.replace("-", "_"))
        expected[name] += travel.bytes
    assert measured == expected


# -- sharding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("language", "adapts"), [(None, False), ("opt", True), ("t5", False)])
def test_sharding_changes_nothing(parts, tmp_path, language, adapts):
    # Three held-out images, of which one process has two and the other one, that cannot be read.
    images = Path(parts.images).parent
    held_out = tmp_path / "held_out.jsonl"
    names = [str(images / "red-disc-0.png"), "missing.png", str(images / "blue-disc-0.png")]
    held_out.write_text("".join(json.dumps({"image": name, "captions": ["a disc"]}) + "\n" for name in names))
    rates = {"vision.*": "frozen", "language.*": "frozen", "*": 1e-3}
    changes = {"optimizer": {"learning_rate": rates, "warmup_steps": 2}}
    if language:
        lora = LoraConfig(r=2) if adapts else None
        changes |= {"stage": "generation", "language": {"name": getattr(parts, language), "lora": lora}}
    if adapts:
        pytest.importorskip("peft")
        changes["optimizer"]["learning_rate"] = {"language.*lora_*": 1e-3, **rates}
    recipe = parts.recipe(
        tmp_path / "run",
        data={"validation": str(held_out), "batch_size": 1},
        training={"max_steps": 3, "save_steps": 3, "eval_steps": 3, "gradient_accumulation_steps": 2},
        **changes,
    )
    start_two(command(recipe, tmp_path / "whole"), tmp_path)
    # Blocks that compute a second time have to be whole a second time.
    lean = ["--training.gradient_checkpointing", "true"] if language else []
    printed = start_two(command(recipe, tmp_path / "dealt", "--training.shard_frozen", "true", *lean), tmp_path)
    assert "frozen weights are sharded across the processes of each machine" in printed[0]
    whole, dealt = lines(tmp_path / "whole"), lines(tmp_path / "dealt")
    assert {"validation_itc", "validation_lm"} & set(whole[-1])
    for row, other in zip(whole, dealt, strict=True):
        assert other.pop("samples_seen") == row.pop("samples_seen")
        assert other == pytest.approx(row, rel=1e-5, abs=1e-6)  # a mean of cosines may be next to 0
    mine, theirs = trained(tmp_path / "whole"), trained(tmp_path / "dealt")
    assert {name: t.shape for name, t in mine.items()} == {name: t.shape for name, t in theirs.items()}


def test_what_cannot_be_dealt_out(parts, tmp_path):
    language = {"stage": "generation", "language": {"name": parts.opt, "quantization": "4bit"}}
    with pytest.raises(InputError, match="a quantized LLM cannot be sharded"):
        parts.recipe(tmp_path, training={"shard_frozen": True}, **language)
    rates = {"optimizer": {"learning_rate": {"*": 1e-3}}}
    recipe = parts.recipe(tmp_path / "run", training={"shard_frozen": True}, **rates)
    (process, log), (other, _) = begin_two(command(recipe, tmp_path / "dealt"), tmp_path)
    status, printed = finish(process, log)
    other.join(60)
    assert status == 2
    said = "training.shard_frozen is true, but there are no frozen blocks to shard"
    assert f"error in process 0 of 2 on {socket.gethostname()}: {said}" in printed
    failures = (tmp_path / "dealt" / "failures.log").read_text()
    assert failures.count(said) == 2
    assert f"process 0 of 2 on {socket.gethostname()}\n" in failures and "process 1 of 2" in failures


# -- failing and going on ------------------------------------------------------------------------------------------


def children(parent):
    """Numbers of processes by their rank, of those that torchrun started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, environment = (folder / "status").read_text(), (folder / "environ").read_bytes()
        except OSError:  # it has ended
            continue
        rank = re.search(rb"\0RANK=(\d+)", environment)
        if rank and f"PPid:\t{parent}\n" in status:
            found[int(rank[1])] = int(folder.name)
    return found


def wait_for_steps(run, steps, process):
    metrics, end = run / "metrics.jsonl", time.monotonic() + 300
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < steps:
        assert process.poll() is None if hasattr(process, "poll") else process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(parts, tmp_path):
    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 40, "save_steps": 5})
    assert recipe.qformer.dropout > 0
    start_two(command(recipe, tmp_path / "calm"), tmp_path)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    arguments = [*torchrun, "-m", "blip2.cli", *command(recipe, tmp_path / "killed", "--resume")]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (tmp_path / "torchrun.log").open("w") as log:
        process = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=log, stderr=log)
        try:
            wait_for_steps(tmp_path / "killed", 1, process)
            other = children(process.pid)[1]  # early: it takes a while to find
            wait_for_steps(tmp_path / "killed", 7, process)
            os.kill(other, signal.SIGKILL)
            assert process.wait(300) == 0, (tmp_path / "torchrun.log").read_text()
        finally:
            process.terminate()
            process.wait()
    printed = (tmp_path / "torchrun.log").read_text()
    assert len(re.findall(r"resuming from .*step-000000[0-3]\d", printed)) == 1
    assert printed.count("stage: representation") == 2  # once by the processes of each start
    assert "Signal 9 (SIGKILL) received by PID" in printed or "exitcode: -9" in printed
    assert_same_run(tmp_path / "calm", tmp_path / "killed")


def test_restarts_that_would_hang_are_refused(parts, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(InputError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        make_accelerator(parts.recipe(tmp_path))


def test_a_process_gives_up_waiting_for_one_that_hangs(parts, tmp_path):
    recipe = parts.recipe(tmp_path / "run", training={"max_steps": 10_000, "save_steps": 10_000, "ddp_timeout": 6})
    (process, log), (hanging, _) = begin_two(command(recipe, tmp_path / "run"), tmp_path)
    wait_for_steps(tmp_path / "run", 2, process)
    os.kill(hanging.pid, signal.SIGSTOP)
    status, printed = finish(process, log)
    hanging.kill()
    hanging.join()
    assert status == 1
    assert f"process 0 of 2 on {socket.gethostname()} failed\nTraceback" in printed
    assert "process 0 of 2" in (tmp_path / "run" / "failures.log").read_text()
    assert "imed out" in printed

"""Both engines write the same bytes, and a worker that is killed takes nothing with it."""

import os
import signal
import time

import psutil
import pytest

from blip2.corpus.job import run_units
from blip2.corpus.options import Engine
from blip2.corpus.score import ScoreJob
from blip2.corpus.units import Unit
from blip2.errors import InputError
from fixtures.processes import finish, start

pytest.importorskip("ray")
OPTIONS = ["--captions", "3", "--max-new-tokens", "6", "--batch-size", "2", "--num-threads", "1", "--device", "cpu"]


def actors(process):
    """The processes of Ray that hold a worker."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "_Actor" in " ".join(child.cmdline()):
                found.append(child.pid)
        except psutil.Error:  # it ended in this moment
            continue
    return found


def test_ray_writes_what_one_process_writes_though_a_worker_is_killed(runs, shards, tmp_path):
    arguments = ["capfilt", str(runs["llama"]), str(runs["stage1"]), "--data", str(shards / "*.tar"), *OPTIONS]
    here, there, log = tmp_path / "here", tmp_path / "there", tmp_path / "log"
    environment = {"RAY_DEDUP_LOGS": "0", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    ray = start([*arguments, "--output", str(there), "--engine", "ray", "--num-workers", "2"], log, **environment)
    status, printed = finish(start([*arguments, "--output", str(here)], tmp_path / "other"), tmp_path / "other")
    assert status == 0, printed
    while not (victims := actors(ray)) or not list(there.glob("0*")):  # one has begun
        assert ray.is_alive(), log.read_text()
        time.sleep(0.01)
    os.kill(victims[0], signal.SIGKILL)
    ray.join(300)  # a cluster takes long to start and to stop where little of the machine is free
    status, printed = finish(ray, log)
    assert status == 0, printed
    assert "Traceback" not in printed
    for name in [path.name for path in here.glob("0*")]:
        assert (there / name).read_bytes() == (here / name).read_bytes(), name
    assert {path.name for path in here.iterdir()} == {path.name for path in there.iterdir()}


def test_ray_writes_the_scores_that_one_process_writes(runs, shards, tmp_path):
    arguments = ["score", str(shards / "*.tar"), "--model", str(runs["stage1"]), *OPTIONS[-4:]]
    here, there, log = tmp_path / "here", tmp_path / "there", tmp_path / "log"
    ray = start([*arguments, "--output", str(there), "--engine", "ray", "--num-workers", "2"], log)
    status, printed = finish(start([*arguments, "--output", str(here)], tmp_path / "other"), tmp_path / "other")
    assert status == 0, printed
    ray.join(300)
    status, printed = finish(ray, log)
    assert status == 0, printed
    assert {path.name for path in here.iterdir()} == {path.name for path in there.iterdir()}
    for path in here.iterdir():
        assert path.read_bytes() == (there / path.name).read_bytes(), path.name


def test_what_is_wrong_is_said_in_one_line(runs, shards, tmp_path):
    arguments = ["capfilt", str(runs["stage1"]), str(runs["stage1"]), "--data", str(shards / "00000.tar"), *OPTIONS]
    ray = start(
        [*arguments, "--output", str(tmp_path / "out"), "--engine", "ray", "--num-workers", "1"], tmp_path / "log"
    )
    ray.join(300)
    status, printed = finish(ray, tmp_path / "log")
    assert status == 2, printed
    assert printed.splitlines()[-1].startswith("error: ") and "load a model of stage generation" in printed
    assert "Traceback" not in printed


def test_a_cluster_that_is_not_there(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "head")
    with pytest.raises(InputError, match=r"Ray does not start .*head.*: check RAY_ADDRESS"):
        next(run_units(ScoreJob("model", "out", "itm"), [Unit("0", "0.tar")], Engine("ray")))

"""Run two programs on the same work in turns, and compare their times and peak memory.

Each runner is a process of its own, since LAVIS needs another version of transformers and peak memory is measured per
process. A runner is started with a folder of the shared inputs and does its work once for each line that it reads.
Runners take turns (A B A B ...), so that other load on the machine affects both.

Runners in other environments import this file too, so it depends on torch alone.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
GIB = 2**30


@dataclass(frozen=True)
class Result:
    """The measurements of a runner."""

    seconds: list[float]
    """Seconds of each round."""
    values: list[float]
    """Results to compare."""
    peak: int
    """Peak memory in bytes, of the process or of the GPU."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Runner:
    """A process that runs its work on request.

    Args:
        name: name in messages.
        command: Python and its arguments; the process calls :func:`serve` or :func:`serve_jobs`.
    """

    def __init__(self, name: str, command: Sequence[str | Path]) -> None:
        self.name = name
        environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        self._process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._read()

    def run(self) -> dict[str, Any]:
        return self._order("run")

    def close(self) -> None:
        self._process.communicate()

    def ask(self, work: str, **order: Any) -> dict[str, Any]:
        """Run a job of a process that calls :func:`serve_jobs`."""
        return self._order(json.dumps({"work": work, **order}))

    def _order(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.name} ended with status {self._process.wait()}: see its output above")


def serve(work: Callable[[], Sequence[float]], device: str = "cpu", warm_up: int = 1, settle: bool = False) -> None:
    """Run `work` for each line read from stdin and print the time and the values that it returns.

    Args:
        work: the work; returns values to compare.
        device: device of the work.
        warm_up: number of runs before the first measurement.
        settle: run the work once before each measurement. After waiting for the other process, a process is slower at
            first, by up to half a second on the machine of docs/performance.md, which matters for short work.
    """
    for _ in range(warm_up):
        work()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        if settle:
            work()
        started = time.perf_counter()
        values = list(work())
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "values": values, "peak": peak_bytes(device)}), flush=True)


def serve_jobs(jobs: Mapping[str, Callable[..., dict[str, Any]]], device: str) -> None:
    """Run the job that each line read from stdin names, and release GPU memory after each.

    Args:
        jobs: functions by name. A line is a JSON object: ``work`` is the name, the other keys are arguments.
        device: device of the jobs.
    """
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        reply = jobs[order.pop("work")](**order)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        print(json.dumps(reply), flush=True)


def measure(work: Callable[[], Sequence[float]], device: str, repeats: int, warm_up: int = 2) -> dict[str, Any]:
    """Return the mean seconds of a run, its values and the peak memory in bytes."""
    for _ in range(warm_up):
        values = list(work())
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(repeats):
        values = list(work())
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / repeats
    return {"seconds": seconds, "values": values, "peak": peak_bytes(device)}  # pyright: ignore


def profile_work(work: Callable[[], Any], device: str, kernels: int = 10) -> dict[str, Any]:
    """Profile a run: the slowest kernels, and the fraction of time in which the device is idle."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    for _ in range(2):
        work()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        started = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    spent: dict[str, list[float]] = {}
    for event in profiled.events():
        is_kernel = str(event.device_type).endswith("CUDA")
        if is_kernel == on_gpu:
            took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            total = spent.setdefault(event.name, [0.0, 0])
            total[0] += took / 1e6
            total[1] += 1
    busy = sum(total for total, _ in spent.values())
    longest = sorted(spent.items(), key=lambda item: -item[1][0])[:kernels]
    return {
        "seconds": seconds,
        "waiting": max(0.0, 1 - busy / seconds),
        "kernels": [{"name": name, "seconds": total, "calls": calls} for name, (total, calls) in longest],
        "launches": sum(calls for _, calls in spent.values()),
    }


def peak_bytes(device: str = "cpu") -> int:
    """Return the peak memory of this process in bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmHWM"].split()[0]) * 1024


def run_in_turns(runners: Sequence[tuple[str, Sequence[str | Path]]], rounds: int) -> dict[str, Result]:
    """Start all runners and run each `rounds` times, in turns."""
    started = [Runner(name, command) for name, command in runners]
    replies: dict[str, list[dict[str, Any]]] = {runner.name: [] for runner in started}
    for number in range(rounds):
        for runner in started:
            replies[runner.name].append(runner.run())
            note = ", ".join(f"{name} {said[-1]['seconds']:.2f} s" for name, said in replies.items() if said)
            print(f"  round {number + 1} of {rounds}: {note}", file=sys.stderr, flush=True)
    for runner in started:
        runner.close()
    return {
        name: Result([reply["seconds"] for reply in said], said[0]["values"], said[-1]["peak"])
        for name, said in replies.items()
    }


def ratios(ours: Result, peer: Result) -> tuple[float, float, float]:
    """Return the median, minimum and maximum over rounds of the peer's seconds divided by ours."""
    ratios = [theirs / mine for mine, theirs in zip(ours.seconds, peer.seconds, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def largest_difference(ours: Result, peer: Result) -> float:
    """Return the largest absolute difference between the values of both, which should agree."""
    return max(abs(a - b) for a, b in zip(ours.values, peer.values, strict=True))

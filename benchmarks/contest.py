"""Two programs at the same work, in turns: the ratio of their times, with its spread, and the peak memory of each.

A contender is a process of its own (LAVIS needs another transformers than this project, and peak memory is that of a
process). It is started with a folder that holds the inputs of both, makes itself ready, and does its work once for each
line it reads. Contenders take turns (A B A B ...), so that whatever else the machine does falls on both.

This file is imported by contenders of other environments too: it needs torch and nothing else.
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
    """What a contender did."""

    seconds: list[float]
    """Of each round."""
    values: list[float]
    """What came out, to be compared."""
    peak: int
    """Most bytes it held at once: of the process, or of the GPU."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Contender:
    """A process that does one piece of work when it is told to.

    Args:
        command: python and its arguments; the process calls :func:`serve`.
        name: for messages.
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
        """Have a contender that :func:`obey` serves do something."""
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
        raise SystemExit(f"{self.name} ended with status {self._process.wait()}: what it said is above")


def serve(work: Callable[[], Sequence[float]], device: str = "cpu", warm_up: int = 1, settle: bool = False) -> None:
    """In a contender: do `work` at each line read; what it returns are the values to compare.

    Args:
        warm_up: times that the work is done before it counts.
        settle: at each turn it is done once before it is timed. Whoever slept while the other worked is slower at
            first, by up to half a second on the machine of docs/performance.md, which matters where the work is short.
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


def obey(orders: Mapping[str, Callable[..., dict[str, Any]]], device: str) -> None:
    """In a contender that can do several things: do what each line read asks for, and give back the memory of the GPU.

    Args:
        orders: by the word ``work`` of a line, which is JSON; the rest of it are arguments.
    """
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        reply = orders[order.pop("work")](**order)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        print(json.dumps(reply), flush=True)


def measure(work: Callable[[], Sequence[float]], device: str, repeats: int, warm_up: int = 2) -> dict[str, Any]:
    """Seconds that work takes once, what came out, and the most bytes that were held."""
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


def profile_of(work: Callable[[], Any], device: str, kernels: int = 10) -> dict[str, Any]:
    """Where the time of work goes: the kernels that take longest, and the share of it in which the GPU waits."""
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
    """Most bytes this process has held at once."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmHWM"].split()[0]) * 1024


def compete(contenders: Sequence[tuple[str, Sequence[str | Path]]], rounds: int) -> dict[str, Result]:
    """Start all contenders, let them work in turns, `rounds` times each."""
    started = [Contender(name, command) for name, command in contenders]
    replies: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in started}
    for number in range(rounds):
        for contender in started:
            replies[contender.name].append(contender.run())
            note = ", ".join(f"{name} {said[-1]['seconds']:.2f} s" for name, said in replies.items() if said)
            print(f"  round {number + 1} of {rounds}: {note}", file=sys.stderr, flush=True)
    for contender in started:
        contender.close()
    return {
        name: Result([reply["seconds"] for reply in said], said[0]["values"], said[-1]["peak"])
        for name, said in replies.items()
    }


def ratios(ours: Result, peer: Result) -> tuple[float, float, float]:
    """Median, smallest and largest of (peer's seconds / ours), round by round."""
    each = [theirs / mine for mine, theirs in zip(ours.seconds, peer.seconds, strict=True)]
    return statistics.median(each), min(each), max(each)


def largest_difference(ours: Result, peer: Result) -> float:
    """Between the values of both, which have to be the same results of the same inputs."""
    return max(abs(a - b) for a, b in zip(ours.values, peer.values, strict=True))

"""Two programs at the same work, in turns: the ratio of their times, with its spread, and the peak memory of each.

A contender is a process of its own (LAVIS needs another transformers than this project, and peak memory is that of a
process). It is started with a folder that holds the inputs of both, makes itself ready, and does its work once for each
line it reads. Contenders take turns (A B A B ...), so that whatever else the machine does falls on both.

This file is imported by contenders of other environments too: it needs torch and nothing else.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.communicate()

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

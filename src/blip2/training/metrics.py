"""Logs of a training run: one JSON object per step in metrics.jsonl, one per skipped record in skipped.jsonl."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from blip2.config import ObjectivesConfig
from blip2.errors import InputError
from blip2.io import atomic_write, parse_json, resolve_target

METRICS_FILE = "metrics.jsonl"
"""File with one line for each step."""
SKIPPED_FILE = "skipped.jsonl"
"""File with one line for each skipped record."""


class JsonlLog:
    """A JSON Lines file to which objects with a ``step`` are appended.

    Args:
        path: the file.
        enabled: if False, nothing is written.

    Raises:
        InputError: `path` is a device, a pipe or a socket.
    """

    def __init__(self, path: Path, enabled: bool = True) -> None:
        self.path = path
        self._file = resolve_target(path).open("a", encoding="utf-8") if enabled else None

    @staticmethod
    def truncate(path: Path, step: int) -> None:
        """Delete the lines of the steps after `step`. A killed run has written them, and will repeat these steps."""
        if not path.exists():
            return
        kept = []
        for line in resolve_target(path).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(InputError, KeyError, TypeError):  # an incomplete last line
                if parse_json(line)["step"] <= step:
                    kept.append(line)
        with atomic_write(path) as file:
            file.write("".join(f"{line}\n" for line in kept).encode())

    def write(self, values: dict[str, Any]) -> None:
        """Append an object as a line."""
        if self._file is None:
            return
        if not self.path.exists():  # deleted during the run: recreate it, so that later lines are kept
            self._file.close()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def to_addend(name: str, value: Tensor) -> Tensor:
    """Return what is averaged in place of a metric: the logarithm of a perplexity, which is e to a mean, or `value`."""
    return value.log() if name.endswith("_perplexity") else value


def from_mean(name: str, mean: float) -> float:
    """Return a metric, given the mean of the results of :func:`to_addend`."""
    return math.exp(mean) if name.endswith("_perplexity") else mean


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the metrics file of the folder of a run: one mapping from names to values for each step."""
    return [parse_json(line) for line in (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()]


def format_progress(values: dict[str, float]) -> str:
    """Format the losses, some metrics and the speed of a step, which are shown next to the progress bar."""
    names = (*ObjectivesConfig().weights, "itc_r1", "itm_accuracy", "lm_accuracy")
    shown = [name for name in names if name in values]
    return "  ".join([*(f"{name} {values[name]:.3f}" for name in shown), f"{values['images_per_second']:.1f} images/s"])

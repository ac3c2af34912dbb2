"""The log of a training run: one JSON object per step in metrics.jsonl, one per skipped record in skipped.jsonl."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from blip2.errors import InputError
from blip2.io import parse_json, written

METRICS = "metrics.jsonl"
"""A line for every step."""
SKIPPED = "skipped.jsonl"
"""A line for every record that was left out."""


class StepFile:
    """A file of JSON objects, one a line, each with its step. A disabled one takes calls and writes nothing."""

    def __init__(self, path: Path, enabled: bool = True) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8") if enabled else None

    @staticmethod
    def truncate(path: Path, step: int) -> None:
        """Forget what was written after `step`, by a run that was killed and will do those steps again."""
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(InputError, KeyError, TypeError):  # torn by the kill
                if parse_json(line)["step"] <= step:
                    kept.append(line)
        with written(path) as file:
            file.write("".join(f"{line}\n" for line in kept).encode())

    def write(self, values: dict[str, Any]) -> None:
        if self._file is None:
            return
        if not self.path.exists():  # deleted while the run trains: what is written from here on shall be there
            self._file.close()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics file."""
    return [parse_json(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]


def note(values: dict[str, float]) -> str:
    """What of a line of metrics stands beside the progress bar."""
    shown = [name for name in ("itc", "itm", "itg", "lm", "itc_r1", "itm_accuracy", "lm_accuracy") if name in values]
    return "  ".join([*(f"{name} {values[name]:.3f}" for name in shown), f"{values['images_per_second']:.1f} images/s"])

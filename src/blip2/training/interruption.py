"""Stopping between two steps: SIGTERM or SIGINT is noted, the loop saves a checkpoint and leaves."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Interruption(Exception):  # noqa: N818
    """The run was asked to stop (SIGTERM or SIGINT) and has saved a checkpoint."""


@contextlib.contextmanager
def note_signals() -> Iterator[list[int]]:
    """The first SIGTERM or SIGINT is noted in the list, to be acted on after the step; a second one kills."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        pass
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

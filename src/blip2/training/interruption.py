"""Stopping between two steps: SIGTERM, SIGINT or SIGHUP is noted, the loop saves a checkpoint and leaves."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Interruption(Exception):  # noqa: N818
    """The run was asked to stop (SIGTERM, SIGINT or SIGHUP) and has saved a checkpoint."""


NOTED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
"""Of schedulers, of Ctrl-C, and of a terminal that is closed."""


@contextlib.contextmanager
def note_signals() -> Iterator[list[int]]:
    """The first of :data:`NOTED` is noted in the list, to be acted on after the step; a second one kills.

    One that is ignored, as SIGHUP under ``nohup``, stays ignored.
    """
    asked: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    try:
        for number in NOTED:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        pass
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

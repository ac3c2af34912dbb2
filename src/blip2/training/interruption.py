"""Stopping between two steps: a signal is recorded, and the trainer saves a checkpoint and exits after the step."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class TrainingInterrupted(Exception):  # noqa: N818
    """The run received SIGTERM, SIGINT or SIGHUP, and has saved a checkpoint."""


SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
"""The signals of schedulers, of Ctrl-C, and of a terminal that is closed."""


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Append the first of :data:`SIGNALS` that is received to a list; a second signal kills the process.

    An ignored signal, such as SIGHUP under ``nohup``, stays ignored.

    Yields:
        The list of received signals.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    try:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, handle)
    except ValueError:  # not in the main thread: signals are the caller's responsibility
        pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""Stopping between two steps: a signal is recorded, and the trainer saves a checkpoint and exits after the step."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class TrainingInterrupted(Exception):  # noqa: N818
    """The run received SIGTERM, SIGINT or SIGHUP, and has saved a checkpoint."""


SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
"""The signals that a scheduler, Ctrl-C and a closed terminal send."""


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Record the received signals of :data:`SIGNALS` in a list instead of ending the process.

    Only the first signal of each kind is recorded; a second signal of the same kind ends the process as usual. A signal
    that is ignored, such as SIGHUP under ``nohup``, stays ignored.

    Yields:
        The numbers of the received signals, in a list that grows when a signal arrives.
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

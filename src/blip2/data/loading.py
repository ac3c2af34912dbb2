"""Worker processes that make ready what the training process needs next."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import parent_process
from threading import Thread
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

Made = TypeVar("Made")


def load(items: Iterator[Any], dataset: Dataset[Made], workers: int) -> Iterator[Made]:
    """``dataset[item]`` of every item, in order, made in `workers` processes beside this one (0: within it)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are parallel already
    loader = DataLoader(
        dataset,
        sampler=_Items(items),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_outlive_signals,
    )
    return iter(loader)


def _outlive_signals(worker: int) -> None:
    """Leave it to the training process what SIGINT and SIGTERM do.

    Ctrl-C and schedulers signal every process of a run, but without its workers it could not finish a step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None and sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_obey, args=(parent.pid,), daemon=True).start()


def _obey(parent: int | None) -> None:
    """End this process at a SIGTERM of its parent; others are ignored."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class _Items:
    """An iterator where DataLoader expects a sampler."""

    def __init__(self, items: Iterator[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return self.items


def _as_is(made: Any) -> Any:
    return made

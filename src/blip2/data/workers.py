"""Worker processes that make ready what the training process needs next."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from multiprocessing import parent_process
from multiprocessing.reduction import ForkingPickler
from threading import Thread, current_thread, main_thread
from typing import Any, TypeVar

import torch
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from blip2.errors import InputError

Made = TypeVar("Made")


SHARED_MEMORY = "/dev/shm"
"""Where Linux keeps what processes share."""
DEATHS = 3
"""So many times in a row workers may be killed before a batch comes through."""


def load(items: Iterator[Any], dataset: Dataset[Made], workers: int) -> Iterator[Made]:
    """``dataset[item]`` of every item, in order, made in `workers` processes beside this one (0: within it).

    Workers that are killed are replaced, and what they had not delivered is made again: nothing is lost.

    Raises:
        InputError: while reading: they are killed again and again.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are parallel already
    under_way: deque[Any] = deque()

    def note() -> Iterator[Any]:
        for item in items:
            under_way.append(item)
            yield item

    new = note()
    return _replacing(
        _start(new, dataset, workers), lambda: _start(chain(list(under_way), new), dataset, workers), under_way
    )


def _replacing(made: Iterator[Made], start_anew: Callable[[], Iterator[Made]], under_way: deque[Any]) -> Iterator[Made]:
    deaths = 0
    while True:
        try:
            for one in made:
                under_way.popleft()
                deaths = 0
                yield one
            return
        except RuntimeError as error:
            if not _WORKER_DIED.search(str(error)):
                raise
            made = iter(())  # ends those that are left
            deaths += 1
            if deaths == DEATHS:
                raise InputError(
                    f"the processes that decode images were killed {DEATHS} times in a row ({error}): most often memory"
                    " runs out; lower data.num_workers or data.batch_size, and go on with --resume"
                ) from error
        made = start_anew()


_WORKER_DIED = re.compile(r"^DataLoader worker \(pid\(?s?\)? [\d, ]+\) (exited unexpectedly|is killed by signal)")


def _start(items: Iterator[Any], dataset: Dataset[Made], workers: int) -> Iterator[Made]:
    loader = DataLoader(
        dataset,
        sampler=_Items(items),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_begin,
        generator=torch.Generator(),  # or starting would draw from the one that dropout draws from
    )
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    made = iter(loader)
    # torch's own handler would raise wherever the training process is; without it a death shows when it is waited for.
    if handler is not None and current_thread() is main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return made


def _begin(worker: int) -> None:
    _outlive_signals(worker)
    ForkingPickler.register(torch.Tensor, _send)


def _send(tensor: torch.Tensor) -> Any:
    """Send a tensor to the training process: through shared memory, as torch does, or within the pipe where that has
    too little room.

    A container has 64 MB of shared memory unless it is told otherwise. A worker that finds it full cannot say so: it is
    killed, or its batch never arrives.
    """
    info = get_worker_info()
    try:
        room = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # another system
        return reduce_tensor(tensor)
    # All workers may look at the same time, before any of them writes.
    if info is None or 2 * info.num_workers * tensor.nbytes < room:
        return reduce_tensor(tensor)
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _receive, (content, tensor.dtype, tensor.shape)


def _receive(content: Any, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    return torch.from_numpy(content).view(dtype).reshape(shape)


def _outlive_signals(worker: int) -> None:
    """Leave it to the training process what SIGINT, SIGHUP and SIGTERM do.

    Ctrl-C, terminals that are closed and schedulers signal every process of a run, but without its workers it could not
    finish a step.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
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

"""Worker processes that load data ahead of the training process."""

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

T = TypeVar("T")

SHARED_MEMORY = "/dev/shm"
"""Folder of shared memory on Linux."""
MAX_WORKER_FAILURES = 3
"""Number of consecutive times that workers may be killed before loading fails."""


def prefetch(indices: Iterator[Any], dataset: Dataset[T], num_workers: int) -> Iterator[T]:
    """Yield ``dataset[index]`` for every index, in order.

    Workers that are killed are replaced, and the items that they had not delivered are loaded again.

    Args:
        num_workers: number of worker processes; 0 loads in this process.

    Raises:
        InputError: while iterating, if workers are killed :data:`MAX_WORKER_FAILURES` times in a row.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are parallel already
    in_flight: deque[Any] = deque()

    def track() -> Iterator[Any]:
        for index in indices:
            in_flight.append(index)
            yield index

    new = track()
    return _with_restarts(
        _start(new, dataset, num_workers), lambda: _start(chain(list(in_flight), new), dataset, num_workers), in_flight
    )


def _with_restarts(items: Iterator[T], restart: Callable[[], Iterator[T]], in_flight: deque[Any]) -> Iterator[T]:
    failures = 0
    while True:
        try:
            for item in items:
                in_flight.popleft()
                failures = 0
                yield item
            return
        except RuntimeError as error:
            if not _WORKER_KILLED.search(str(error)):
                raise
            items = iter(())  # ends the workers that are left
            failures += 1
            if failures == MAX_WORKER_FAILURES:
                raise InputError(
                    f"the processes that decode images were killed {MAX_WORKER_FAILURES} times in a row ({error}):"
                    " usually memory runs out; lower data.num_workers or data.batch_size, and rerun with --resume"
                ) from error
        items = restart()


_WORKER_KILLED = re.compile(r"^DataLoader worker \(pid\(?s?\)? [\d, ]+\) (exited unexpectedly|is killed by signal)")


def _start(indices: Iterator[Any], dataset: Dataset[T], num_workers: int) -> Iterator[T]:
    loader = DataLoader(
        dataset,
        sampler=indices,  # an iterator in the place of a sampler: DataLoader only iterates over it
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_identity,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_init_worker,
        generator=torch.Generator(),  # otherwise starting would advance the default generator, which dropout uses
    )
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    items = iter(loader)
    # PyTorch's handler would raise at any point of the training process. Without it the loader raises when it waits for
    # a worker that was killed.
    if handler is not None and current_thread() is main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return items


def _reduce_tensor(tensor: torch.Tensor) -> Any:
    """Pickle a tensor: through shared memory as PyTorch does, or through the pipe if shared memory is too small.

    A container has 64 MB of shared memory by default. A worker that exceeds it is killed without an error message, or
    its batch never arrives.
    """
    info = get_worker_info()
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # not Linux
        return reduce_tensor(tensor)
    # All workers may check at the same time, before any of them writes.
    if info is None or 2 * info.num_workers * tensor.nbytes < free:
        return reduce_tensor(tensor)
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _rebuild_tensor, (content, tensor.dtype, tensor.shape)


def _rebuild_tensor(content: Any, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    return torch.from_numpy(content).view(dtype).reshape(shape)


def _init_worker(worker_id: int) -> None:
    """Set how tensors are sent, and ignore SIGINT, SIGHUP and SIGTERM, which the training process handles.

    Ctrl-C, a closed terminal and schedulers signal every process of a run, but the training process needs its workers
    to finish a step.
    """
    ForkingPickler.register(torch.Tensor, _reduce_tensor)
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = parent_process()
    if parent is not None and sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_exit_on_sigterm_of, args=(parent.pid,), daemon=True).start()


def _exit_on_sigterm_of(parent: int | None) -> None:
    """Wait for SIGTERM from the parent process and exit; those from other processes are ignored."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _identity(item: Any) -> Any:
    return item

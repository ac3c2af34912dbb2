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
from traceback import walk_tb
from typing import Any, TypeVar

import torch
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from blip2.errors import InputError

T = TypeVar("T")

SHARED_MEMORY = "/dev/shm"
"""Folder of shared memory on Linux."""
MAX_WORKER_FAILURES = 3
"""Loading fails when workers are killed this many times in a row."""


def prefetch(indices: Iterator[Any], dataset: Dataset[T], num_workers: int) -> Iterator[T]:
    """Yield ``dataset[index]`` for every index, in order.

    If a worker is killed, all workers are restarted, and the items that were not delivered are loaded again.

    Args:
        indices: the indices, for example the :class:`~blip2.data.sampler.BatchSpec` of each batch. They are read a few
            items ahead of the items that were delivered.
        dataset: the data set; each worker has a copy.
        num_workers: number of worker processes; 0: load in this process.

    Raises:
        InputError: while iterating, if workers are killed :data:`MAX_WORKER_FAILURES` times in a row.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers already run in parallel
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
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
            if not _is_of_killed_worker(error):
                raise
            items = iter(())  # deletes the loader, which ends the workers that are still running
            failures += 1
            if failures == MAX_WORKER_FAILURES:
                raise InputError(
                    f"the processes that load data were killed {MAX_WORKER_FAILURES} times in a row"
                    f" ({str(error) or type(error).__name__}), usually because memory ran out: lower data.num_workers"
                    " or data.batch_size, and rerun (training: with --resume)"
                ) from error
        items = restart()


_WORKER_KILLED = re.compile(r"^DataLoader worker \(pid\(?s?\)? [\d, ]+\) (exited unexpectedly|is killed by signal)")


def _is_of_killed_worker(error: Exception) -> bool:
    """Return whether an error says that a worker was killed while the loader waited for it, or received its tensors."""
    if isinstance(error, RuntimeError):
        return _WORKER_KILLED.search(str(error)) is not None
    modules = [frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)]
    return "torch.multiprocessing.reductions" in modules


def _start(indices: Iterator[Any], dataset: Dataset[T], num_workers: int) -> Iterator[T]:
    loader = DataLoader(
        dataset,
        sampler=indices,  # an iterator is sufficient here, because DataLoader only iterates over its sampler
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_identity,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_init_worker,
        generator=torch.Generator(),  # otherwise DataLoader would advance the default generator, which dropout uses
    )
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    items = iter(loader)
    # PyTorch's handler of SIGCHLD would raise an exception anywhere in the training process. Without the handler, the
    # exception is raised by the loader, when it waits for a worker that was killed.
    if handler is not None and current_thread() is main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return items


def _reduce_tensor(tensor: torch.Tensor) -> Any:
    """Pickle a tensor: in shared memory, as PyTorch does, or by value if little shared memory is free.

    A container has 64 MB of shared memory by default. A worker that needs more is killed without an error message, or
    its batch never arrives.
    """
    info = get_worker_info()
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # not Linux
        return reduce_tensor(tensor)
    # All workers may check the free memory at the same time, before any of them writes.
    if info is None or 2 * info.num_workers * tensor.nbytes < free:
        return reduce_tensor(tensor)
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _rebuild_tensor, (content, tensor.dtype, tensor.shape)


def _rebuild_tensor(content: Any, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    return torch.from_numpy(content).view(dtype).reshape(shape)


def _init_worker(worker_id: int) -> None:
    """Set how a worker sends tensors, and let it ignore SIGINT and SIGHUP, and SIGTERM unless its parent sent it.

    Ctrl-C, a closed terminal and job schedulers send a signal to every process of a run. The training process handles
    the signal, and needs the workers until its current step is complete.
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
    """Wait for a SIGTERM that the parent process sent, and exit. Every SIGTERM of another process is ignored."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _identity(item: Any) -> Any:
    return item

"""How a process gets its memory, where it is one of Linux with the GNU C library."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of malloc.h."""


def keep_memory() -> None:
    """Large tensors in pages of 2 MB, and what is freed is kept for those that follow: it has its pages already.

    A training step, whose every activation is new, otherwise spends a sixth of its time in bf16 on page faults. The
    most that the process holds at once stays the same, but it holds it until it ends. ``MALLOC_MMAP_...`` and
    ``MALLOC_TRIM_...`` of the environment, where they are set, are left to decide. Call it before the first tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if any(name.startswith(("MALLOC_MMAP_", "MALLOC_TRIM_")) for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # another C library
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # never

"""Memory that is freed: kept, unless the environment says otherwise."""

import os
import platform
import subprocess
import sys

import pytest

FREED = """
import numpy as np
from pathlib import Path
from blip2.memory import tune_malloc

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

{call}
before = resident()
array = np.ones(2**24)  # 128 MiB
held = resident() - before
del array
print((resident() - before) / held)
"""


def left(call: str, **variables: str) -> float:
    """The share of a large array's memory that a process still has when the array is gone."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", FREED.format(call=call)]
    done = subprocess.run(command, env={**mine, **variables}, check=True, capture_output=True, text=True)
    return float(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the GNU C library alone")
def test_what_is_freed_is_kept() -> None:
    assert left("") < 0.1
    assert left("tune_malloc()") > 0.9
    assert left("tune_malloc()", MALLOC_ARENA_MAX="2") > 0.9
    assert left("tune_malloc()", MALLOC_MMAP_THRESHOLD_="1048576") < 0.1


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    from blip2.memory import tune_malloc

    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    tune_malloc()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"

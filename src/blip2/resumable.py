"""Work in parts that stay done: an evaluation that is killed goes on where it was, on any number of processes.

What is to be done is cut into parts of one size whatever the number of processes. Each process takes its share of those
that are not done, and what comes out of a part is a file of its own, written beside and renamed. So nothing is lost or
counted twice, and what comes out is the same to the last digit however many processes there were.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from blip2.backbones.pretrained import read_pickle
from blip2.console import Display
from blip2.distributed import gather_objects, process_count, process_index
from blip2.errors import InputError
from blip2.io import written

Result = TypeVar("Result")


class Parts:
    """The parts of an evaluation, in a folder that all processes share.

    Args:
        folder: made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def do(self, name: str, count: int, work: Callable[[int], Result]) -> list[Result]:
        """What `work` makes of each of `count` parts, in order, in all processes. All of them call this.

        Args:
            name: of the work; what was done under the same name is not done again.
            work: gives tensors, numbers, texts, and lists and dicts of them.

        Raises:
            InputError: processes on several machines do not share the folder.
        """
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{number:06}.pt" for number in range(count)]
        # All look before any goes on, so that all divide the same work.
        left = gather_objects([number for number in range(count) if not files[number].exists()])[0]
        display = Display(name, enabled=process_index() == 0)
        mine = left[process_index() :: process_count()]
        try:
            if left:
                display.start(count, count - len(left))
            for done, number in enumerate(mine, 1):
                _write(files[number], work(number))
                display.advance(min(count, count - len(left) + done * process_count()))
        finally:
            display.close()
        gather_objects(None)  # what the others wrote is on the disk when they come here
        missing = next((file for file in files if not file.exists()), None)
        if missing is not None:
            raise InputError(f"{missing} was made by another process but is not there: give an output that all share")
        return [read_pickle(file, mmap=False) for file in files]

    def forget(self) -> None:
        """Delete all that was done."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _write(file: Path, value: Any) -> None:
    content = io.BytesIO()  # or torch would have words of its own for a full disk
    torch.save(value, content)
    with written(file) as out:
        out.write(content.getbuffer())


def whose(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> str | None:
    """Why a folder is not one's own: it says something else of itself; None where it is.

    Args:
        found, wanted: what it says and what it would have to say, as JSON has it.
        what: the folder would hold, such as ``evaluation``.
    """
    other = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if not other:
        return None
    return (
        f"{folder} holds another {what}: its {other[0]} is {found.get(other[0])}, not {wanted.get(other[0])}: give"
        " another output"
    )

"""Resumable work: an evaluation that was killed resumes where it stopped, on any number of processes.

The work is divided into parts whose size does not depend on the number of processes. Each process takes its share of
the parts that are not done, and writes the result of each part to a file, atomically. Only the parts that were not
complete are computed again, and the results are bit-identical for any number of processes.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from blip2.backbones.pretrained import load_pickle
from blip2.console import Display
from blip2.distributed import all_gather_objects, rank, world_size
from blip2.errors import InputError
from blip2.io import atomic_write, read_json_object, to_plain, write_json

Result = TypeVar("Result")


class ResumableMap:
    """Applies functions to the parts of some work and stores the results in a folder.

    Args:
        folder: folder of the results, which all processes must share; created if necessary.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, name: str, num_parts: int, function: Callable[[int], Result]) -> list[Result]:
        """Apply a function to each part that is not done. All processes must call this method.

        Args:
            name: name of the work. Results that are stored under the same name are reused.
            num_parts: number of parts.
            function: returns the result of a part, given the index of the part. A result consists of tensors, numbers,
                strings, and lists and dicts of these.

        Returns:
            The results of all parts, in order, in all processes.

        Raises:
            InputError: the folder is not shared by all machines.
        """
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{number:06}.pt" for number in range(num_parts)]
        # All processes use the list of rank 0, so that they divide the same parts even if some files appear meanwhile.
        remaining = all_gather_objects([number for number in range(num_parts) if not files[number].exists()])[0]
        num_done = num_parts - len(remaining)
        display = Display(name, enabled=rank() == 0)
        try:
            if remaining:
                display.start(num_parts, num_done)
            for count, number in enumerate(remaining[rank() :: world_size()], 1):
                _write(files[number], function(number))
                display.update(min(num_parts, num_done + count * world_size()))
        finally:
            display.close()
        all_gather_objects(None)  # wait until all have written their results
        missing = next((file for file in files if not file.exists()), None)
        if missing is not None:
            raise InputError(
                f"{missing} was written by another process, but this process cannot see it: give an output in a folder"
                " that all machines share"
            )
        return [load_pickle(file, mmap=False) for file in files]

    def clear(self) -> None:
        """Delete all results."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _write(file: Path, value: Any) -> None:
    content = io.BytesIO()  # torch.save to a file would report a full disk as another error
    torch.save(value, content)
    with atomic_write(file) as out:
        out.write(content.getbuffer())


def claim_folder(file: Path, metadata: Mapping[str, Any], what: str) -> None:
    """Mark a folder as the output of a job, or check that an earlier call marked it as the output of the same job.

    Args:
        file: the file in the folder that contains the metadata of the job. File and folder are created if necessary.
        metadata: everything that determines the outputs of the job.
        what: what the job is, such as ``evaluation``, for error messages.

    Raises:
        InputError: the folder cannot be written, or contains the output of another job.
    """
    folder = file.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_json(file, metadata)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}): free disk space or check the permissions, or give another"
            " output"
        ) from error
    found, expected = read_json_object(file), to_plain(metadata)
    key = min((key for key in found | expected if found.get(key) != expected.get(key)), default=None)
    if key is not None:
        raise InputError(
            f"{folder} contains another {what}, whose {key} is {found.get(key)} instead of {expected.get(key)}: give"
            " another output"
        )

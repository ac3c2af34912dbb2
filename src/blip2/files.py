"""Files that are there whole or not at all, whenever the process that writes them is killed; folders of one writer."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from blip2.errors import InputError

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
"""None on Windows, where a folder is not locked."""

LOCK = ".lock"
"""File in a folder that a process is writing to; says which process."""


def output_path(name: str | Path) -> Path:
    """The path of an output, in which ``~`` is the home folder.

    Raises:
        InputError: the home folder is not known.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"output {name} begins with a home folder that is not known ({error}): write it out"
        ) from error


@contextmanager
def locked(folder: Path, enabled: bool = True) -> Iterator[None]:
    """Hold a folder for this process alone.

    The system ends the lock with the process, however it ends, so that one that was killed stands in nobody's way.
    Processes that it forks do not hold it. Where the file system knows no locks, nothing is locked.

    Args:
        folder: made if need be.
        enabled: False: do nothing, as another process of the same work holds it.

    Raises:
        InputError: another process holds it, or it cannot be written.
    """
    if not enabled or fcntl is None:
        yield
        return
    path = folder.resolve() / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _hold(path)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}): give another output") from error
    _held.add(path)
    try:
        with file:
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()
    finally:
        _held.discard(path)


_held: set[Path] = set()
"""Locks of this process: the system would give it one again, and take it away with the first file that is closed."""


def _hold(path: Path) -> IO[str]:
    """The locked file, open."""
    here = path.parent
    if path in _held:
        raise InputError(f"{here} is in use by this process: wait until it ends, or give another output")
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise InputError(
                f"{here} is in use by {holder}: wait until it ends, end it, or give another output"
            ) from error
        except OSError:  # no locks on this file system
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:  # noqa: PTH116
                break
        file.close()  # who held it has deleted it in the meantime
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file


@contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """The file to write, which takes its place at the end.

    Raises:
        OSError: it cannot be written.
    """
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """JSON, in UTF-8.

    Raises:
        OSError: it cannot be written.
    """
    with written(path) as file:
        # Half of a surrogate pair, as names of files may hold it, has no UTF-8; its escape in JSON looks like Python's.
        file.write(json.dumps(value, ensure_ascii=False, indent=indent).encode(errors="backslashreplace"))


def read_json(path: Path) -> dict[str, Any]:
    """The object of a file of :func:`write_json`.

    Raises:
        InputError: it is damaged, as by a disk that failed, or holds something else.
        OSError: it cannot be read.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(
            f"{path} is damaged: delete it to go on with what lies beside it, if that is of the same work, or give"
            " another output"
        )
    return value


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Says of an output that cannot be written why, for those who have nothing better to say.

    Raises:
        InputError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): make room, or give another output"
        ) from error

"""Files that are there whole or not at all, whenever the process that writes them is killed."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from blip2.errors import InputError


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

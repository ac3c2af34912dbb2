"""Files: read within limits as plain values, written whole or not at all, in folders of one writer.

Every recipe and every JSON file that this library reads itself is read here. What a file says is never executed: it
gives texts, numbers, lists and dictionaries, and no more of them than the limits allow (docs/security.md).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import socket
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from blip2.errors import InputError

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
"""None on Windows, where a folder is not locked."""

LOCK = ".lock"
"""File in a folder that a process is writing to; says which process."""
MAX_JSON = 256 << 20
"""Bytes of a JSON file."""
MAX_YAML = 1 << 18
"""Bytes of a YAML text."""
MAX_NODES = 10_000
"""Values in a YAML text, those that an alias stands for counted each time."""
MAX_DEPTH = 32
"""Lists and mappings of a YAML text within one another."""
PLAIN = ("map", "seq", "str", "int", "float", "bool", "null", "merge", "value")
"""Kinds of values in a YAML text."""
MAX_DIGITS = 100
"""Characters of a number in a YAML text."""


# -- reading -------------------------------------------------------------------------------------------------------


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """The bytes of a regular file: a pipe or a device, which may never end, is not read.

    Raises:
        OSError: it cannot be read.
        InputError: it is not a regular file, or has more than `limit` bytes.
    """
    # Opening a pipe waits for its other end, unless it is told not to.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        found = os.fstat(handle)
        check_regular(path, found, limit)
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(found.st_size)
    finally:
        os.close(handle)


def check_regular(path: str | os.PathLike[str], found: os.stat_result, limit: int | None = None) -> None:
    """Raise :class:`InputError` for what is not a regular file, or has more than `limit` bytes."""
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a socket or a device"
        raise InputError(f"{os.fspath(path)} is {kind}, expected a regular file: check its path")
    if limit is not None and found.st_size > limit:
        raise InputError(
            f"{os.fspath(path)} has {found.st_size:,} bytes, more than the {limit:,} allowed: give a smaller file"
        )


def _read_text(path: Path, limit: int) -> str:
    try:
        return read_regular(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("it is not UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check the path") from error


def read_json(path: str | os.PathLike[str], limit: int = MAX_JSON, advice: str = "copy or download it again") -> Any:
    """The value of a JSON file.

    Args:
        advice: what to do about a damaged one, for the message.

    Raises:
        InputError: it is no regular file, has more than `limit` bytes, or is not JSON.
    """
    path = Path(path)
    try:
        return parse_json(_read_text(path, limit))
    except InputError as error:
        if str(error).startswith(str(path)):
            raise
        raise InputError(f"{path} is damaged or no JSON ({error}): {advice}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object of a file of :func:`write_json`.

    Raises:
        InputError: it is damaged, as by a disk that failed, or holds something else.
    """
    advice = "delete it to go on with what lies beside it, if that is of the same work, or give another output"
    value = read_json(path, advice=advice)
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged (it holds a {type(value).__name__}): {advice}")
    return value


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        InputError: it is not JSON, or nested more deeply than Python reads.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or a number of too many digits
        raise InputError(
            "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        ) from error


def plain(value: Any) -> Any:
    """A value as it is after being written as JSON: tuples are lists, keys are texts."""
    return json.loads(json.dumps(value))


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The value of a YAML file.

    Raises:
        InputError: it is no regular file, is not YAML, or exceeds a limit; the message shows nothing of its content.
    """
    return parse_yaml(_read_text(Path(path), MAX_YAML))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        InputError: it is not YAML, or exceeds :data:`MAX_YAML`, :data:`MAX_NODES`, :data:`MAX_DEPTH` or
            :data:`MAX_DIGITS`.
    """
    if len(text) > MAX_YAML:
        raise InputError(f"it has more than the {MAX_YAML:,} characters allowed")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML has not, a number that is none
        mark = getattr(error, "problem_mark", None)
        where = f": there is a mistake in line {mark.line + 1}" if mark else ""
        raise InputError(f"it is not YAML{where}") from error
    finally:
        if loader is not None:
            loader.dispose()


class _Loader(yaml.SafeLoader):
    """Plain values alone; 1e-4 is a number, which YAML 1.1 takes for a text, and a date is a text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._nodes += 1
        self._depth += 1
        _check_limits(self._nodes, self._depth)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?"
        r"|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _check_limits(nodes: int, depth: int) -> None:
    if nodes > MAX_NODES:
        raise InputError(f"it stands for more than the {MAX_NODES:,} values allowed")
    if depth > MAX_DEPTH:
        raise InputError(f"it is nested more than {MAX_DEPTH} deep")


def _check_size(root: yaml.Node) -> None:
    """Walk what a text stands for before anything is made of it: a few aliases can stand for billions of values."""
    left = [(root, 1)]
    seen = 0
    while left:
        node, depth = left.pop()
        seen += 1
        _check_limits(seen, depth)
        if node.tag.rpartition(":")[2] not in PLAIN or not node.tag.startswith("tag:yaml.org,2002:"):
            raise InputError(f"it has a tag in line {node.start_mark.line + 1}, which would make an object")
        if isinstance(node, yaml.MappingNode):
            left += [(child, depth + 1) for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            left += [(child, depth + 1) for child in node.value]
        elif node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
            raise InputError(f"it has a number of more than {MAX_DIGITS} digits")


# -- writing -------------------------------------------------------------------------------------------------------


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


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file with the mode that the umask gives every other file: the library's own is for its owner alone.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=metadata)
    share(Path(path))


def share(path: Path) -> None:
    """Give a file, or the files of a folder, the mode that the umask gives new ones."""
    for file in [path] if path.is_file() else [each for each in path.rglob("*.safetensors") if each.is_file()]:
        beside = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
        try:
            beside.touch()  # the umask can only be asked for by setting it, which other threads would see
            file.chmod(stat.S_IMODE(beside.stat().st_mode))
        finally:
            beside.unlink(missing_ok=True)


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

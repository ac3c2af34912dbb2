"""Safe reading of files, atomic writing, and locks on folders.

All recipes and JSON files are read here. Nothing in a file is executed: reading gives strings, numbers, lists and
dictionaries, within limits of size and depth (docs/security.md).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import os
import re
import socket
import stat
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from blip2.errors import InputError

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
"""None on Windows, where folders are not locked."""

LOCK = ".lock"
"""Name of the lock file in a folder. The file contains the name of the process that writes to the folder."""
MAX_JSON = 256 << 20
"""Maximum size of a JSON file in bytes."""
MAX_YAML = 1 << 18
"""Maximum size of a YAML file in bytes, and of a YAML text in characters."""
MAX_NODES = 10_000
"""Maximum number of values in a YAML text after the expansion of aliases."""
MAX_DEPTH = 32
"""Maximum depth of nested lists and mappings in a YAML text."""
YAML_TAGS = ("map", "seq", "str", "int", "float", "bool", "null", "merge", "value")
"""Tags that are allowed in a YAML text."""
MAX_DIGITS = 100
"""Maximum number of characters of a number in a YAML text."""


# -- reading -------------------------------------------------------------------------------------------------------


def read_regular_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a regular file. Pipes and devices, which may never end, are refused.

    Raises:
        OSError: the file cannot be read.
        InputError: `path` is not a regular file, or the file has more than `limit` bytes.
    """
    try:  # opening a pipe would wait for its other end
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except ValueError as error:  # NUL or a lone surrogate, which no path can contain
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from error
    try:
        status = os.fstat(handle)
        check_regular_file(path, status, limit)
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(handle)


def describe_version(files: Iterable[str | os.PathLike[str]]) -> str:
    """Return a digest of the sizes and the times of modification of files, which changes if one of them is replaced.

    URLs and files that do not exist have no part in it.
    """
    stats = [path.stat() for path in map(Path, files) if path.is_file()]
    versions = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    return hashlib.blake2b(json.dumps(versions).encode(), digest_size=8).hexdigest()


def check_regular_file(path: str | os.PathLike[str], status: os.stat_result, limit: int | None = None) -> None:
    """Check that a file is a regular file of at most `limit` bytes.

    Args:
        path: path of the file, for error messages.
        status: the result of ``os.stat`` or ``os.fstat`` for the file.
        limit: maximum number of bytes. None: no limit.

    Raises:
        InputError: the file is not a regular file, or has more than `limit` bytes.
    """
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
        raise InputError(f"{os.fspath(path)} is {kind}, expected a regular file: check the path")
    if limit is not None and status.st_size > limit:
        raise InputError(
            f"{os.fspath(path)} has {status.st_size:,} bytes, more than the {limit:,} allowed: give a smaller file"
        )


def _read_text(path: Path, limit: int) -> str:
    try:
        return read_regular_file(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("it is not UTF-8") from error
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}): check the path and its permissions"
        ) from error


def read_json(path: str | os.PathLike[str], limit: int = MAX_JSON, advice: str = "copy or download it again") -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        limit: maximum number of bytes.
        advice: what the user can do about a damaged file, for the error message.

    Raises:
        InputError: the file cannot be read, is not a regular file, has more than `limit` bytes, or is not JSON.
    """
    path = Path(path)
    try:
        return parse_json(_read_text(path, limit))
    except InputError as error:
        if str(error).startswith(str(path)):
            raise
        raise InputError(f"{path} is damaged or not JSON ({error}): {advice}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file whose value is an object.

    Raises:
        InputError: the file cannot be read, is not JSON, or its top-level value is not an object.
    """
    advice = (
        "delete this file if the other files in its folder belong to the same job and you want to resume it; otherwise"
        " give another output"
    )
    value = read_json(path, advice=advice)
    if not isinstance(value, dict):
        raise InputError(f"{path} contains a JSON {type(value).__name__}, expected an object: {advice}")
    return value


def parse_json(text: str | bytes, unique_keys: bool = False) -> Any:
    """Parse a JSON text.

    Args:
        text: the text, in UTF-8 if it is bytes.
        unique_keys: refuse a key that occurs twice in an object, instead of taking its last value.

    Raises:
        InputError: the text is not JSON, is nested too deeply for Python's parser, contains a number that is too long,
            or is refused because of `unique_keys`.
    """
    try:
        return json.loads(text, object_pairs_hook=_make_unique if unique_keys else None)
    except json.JSONDecodeError as error:
        raise InputError(f"{error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or a number with too many digits
        raise InputError(
            "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        ) from error


def _make_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise InputError(f"the key {twice[:80]!r} occurs twice in an object")
    return made


def to_plain(value: Any) -> Any:
    """Return the copy of a value that JSON would store: tuples become lists, and keys become strings."""
    return json.loads(json.dumps(value))


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Read a YAML file.

    Raises:
        InputError: the file cannot be read, is not a regular file, or is refused by :func:`parse_yaml`. The message
            contains no part of the file's content.
    """
    return parse_yaml(_read_text(Path(path), MAX_YAML))


def parse_yaml(text: str) -> Any:
    """Parse a YAML text.

    Raises:
        InputError: the text is not YAML, contains a key twice in a mapping or a tag that is not in :data:`YAML_TAGS`,
            or exceeds :data:`MAX_YAML`, :data:`MAX_NODES`, :data:`MAX_DEPTH` or :data:`MAX_DIGITS`.
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
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML does not allow, a malformed number
        mark = getattr(error, "problem_mark", None)
        where = f": there is a mistake in line {mark.line + 1}" if mark else ""
        raise InputError(f"it is not YAML{where}") from error
    finally:
        if loader is not None:
            loader.dispose()


class _Loader(yaml.SafeLoader):
    """A SafeLoader with limits of size and depth. Unlike in YAML 1.1, 1e-4 is a number and a date is a string."""

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
        raise InputError(f"it expands to more than the {MAX_NODES:,} values allowed")
    if depth > MAX_DEPTH:
        raise InputError(f"it is nested more than {MAX_DEPTH} deep")


def _check_size(root: yaml.Node) -> None:
    """Check the limits before values are constructed: a few aliases can expand to billions of values."""
    stack = [(root, 1)]
    num_nodes = 0
    while stack:
        node, depth = stack.pop()
        num_nodes += 1
        _check_limits(num_nodes, depth)
        if node.tag.rpartition(":")[2] not in YAML_TAGS or not node.tag.startswith("tag:yaml.org,2002:"):
            raise InputError(
                f"it has a tag in line {node.start_mark.line + 1}, which would create an object: remove it"
            )
        if isinstance(node, yaml.MappingNode):
            stack += [(child, depth + 1) for pair in node.value for child in pair]
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                raise InputError(f"it has a key twice in the mapping of line {node.start_mark.line + 1}: remove one")
        elif isinstance(node, yaml.SequenceNode):
            stack += [(child, depth + 1) for child in node.value]
        elif node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
            raise InputError(f"it has a number of more than {MAX_DIGITS} digits")
        elif re.match(r"[+-]?0[\d_]", node.value) and node.tag.endswith(":int"):
            raise InputError(
                f"it has the number {node.value}, which YAML reads in base 8: leave out the zero, or quote it"
            )
        elif ":" in node.value and node.tag.endswith((":int", ":float")):
            raise InputError(f"it has the number {node.value}, which YAML reads in base 60: quote it")


# -- writing -------------------------------------------------------------------------------------------------------


def expand_home(name: str | Path) -> Path:
    """Return a path with ``~`` expanded.

    Raises:
        InputError: the home folder is unknown.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{name} begins with a home folder that is unknown ({error}): write the path without ~"
        ) from error


def check_utf8(folder: Path) -> None:
    """Check that the path of a folder is UTF-8: transformers saves no tokenizer in another one.

    Raises:
        InputError: it is not.
    """
    if re.search("[\ud800-\udfff]", str(folder.absolute())):
        raise InputError(f"the path {folder.absolute()} is not UTF-8: give an output with a name in UTF-8")


@contextmanager
def lock_folder(folder: Path, enabled: bool = True, name: str | None = None) -> Iterator[None]:
    """Lock a folder for this process.

    The operating system releases the lock when the process ends, even if the process is killed. Forked processes do not
    inherit the lock. On a file system without locks, nothing is locked.

    Args:
        folder: the folder; created if necessary.
        enabled: if False, do nothing. This is for the other processes of a job in which one process holds the lock.
        name: what is locked, for messages. None: the folder.

    Raises:
        InputError: another process, or this process, already holds the lock; or the folder cannot be written.
    """
    if not enabled or fcntl is None:
        yield
        return
    path = Path(os.path.realpath(folder)) / LOCK  # Path.resolve raises a RuntimeError for a link to itself
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _hold(path, name or str(path.parent))
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror or error}): free disk space or check the permissions, or give"
            " another output"
        ) from error
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
"""Lock files that this process has locked. POSIX would let the process lock a file a second time, and would release
both locks when the first of the two handles is closed."""


def _hold(path: Path, name: str) -> IO[str]:
    """Lock a file, and return the open file. `name` is for messages."""
    if path in _held:
        raise InputError(
            f"{name} is in use by another job of this process: wait until that job ends, or give another output"
        )
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise InputError(
                f"{name} is in use by {holder}: wait until that process ends, stop it, or give another output"
            ) from error
        except OSError:  # the file system has no locks
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:  # noqa: PTH116
                break
        file.close()  # its previous holder has deleted it in the meantime
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file


def resolve_target(path: str | os.PathLike[str]) -> Path:
    """Return the file to write for a path. Links are followed, so that writing replaces the file and not the link.

    Raises:
        InputError: `path` is a device, a pipe or a socket, which a rename would replace.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():
        raise InputError(f"{path} cannot be written (it is a device, a pipe or a socket): give another output")
    return target


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing under a temporary name, and rename the file when it is complete.

    Raises:
        OSError: the file cannot be written.
        InputError: `path` is a device, a pipe or a socket; see :func:`resolve_target`.
    """
    path = resolve_target(path)
    tmp = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with tmp.open("wb") as file:
            yield file
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write a value as JSON in UTF-8, atomically.

    Args:
        path: the file.
        value: the value.
        indent: number of spaces per level. None: a single line.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_write(path) as file:
        # File names can contain surrogates, which have no UTF-8; their escapes in JSON are the same as Python's.
        file.write(json.dumps(value, ensure_ascii=False, indent=indent).encode(errors="backslashreplace"))


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Any]) -> None:
    """Write a safetensors file with the permissions of the umask. The library's files are readable by the owner only.

    Args:
        path: the file.
        tensors: the tensors by name.

    Raises:
        OSError, SafetensorError: the file cannot be written.
        InputError: `path` is a device, a pipe or a socket; see :func:`resolve_target`.
    """
    from safetensors.torch import save_file

    target = resolve_target(path)
    save_file(dict(tensors), target)
    apply_umask(target)


def apply_umask(path: Path) -> None:
    """Give a file, or all safetensors files in a folder, the permissions of the umask."""
    for file in [path] if path.is_file() else [each for each in path.rglob("*.safetensors") if each.is_file()]:
        probe = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
        try:
            probe.touch()  # reading the umask requires setting it, which other threads would see
            file.chmod(stat.S_IMODE(probe.stat().st_mode))
        finally:
            probe.unlink(missing_ok=True)


@contextmanager
def convert_os_errors(path: Path) -> Iterator[None]:
    """Convert each OSError to an InputError that names the output.

    Args:
        path: the output, for the error message.

    Raises:
        InputError: the output cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): free disk space or check the permissions, or give"
            " another output"
        ) from error

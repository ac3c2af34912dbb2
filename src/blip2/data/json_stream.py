"""Read JSON files that are too large to load whole, one member at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from io import TextIOBase
from pathlib import Path
from typing import Any

from blip2.errors import InputError

MAX_VALUE_CHARACTERS = 1 << 28
"""Maximum number of characters of an element of an array, or of a member of an object."""


def stream_json(path: Path, chunk_size: int = 1 << 20) -> Iterator[tuple[str, Any]]:
    """Iterate over the elements of the array, or the members of the object, in a JSON file.

    Args:
        path: the JSON file.
        chunk_size: the minimum number of characters that are read at a time.

    Returns:
        Pairs of a name and a value. For an array: each element, with the name "". For an object: each member; if the
        value of a member is an array, each element of that array instead, with the name of the member.

    Raises:
        InputError: the file is not JSON.
    """
    with path.open(encoding="utf-8-sig") as file:
        try:
            yield from iter_members(file, json.JSONDecoder(), chunk_size)
        except json.JSONDecodeError as error:
            raise _damaged(path, error.msg) from error  # without error.pos, a position in the chunk
        except (_SyntaxError, UnicodeDecodeError, RecursionError) as error:
            raise _damaged(path, str(error)) from error


def stream_array(path: Path, name: str, subset: str | None = None) -> Iterator[Any]:
    """Iterate over the elements of one array of a JSON object.

    Args:
        path: the JSON file.
        name: the name of the array.
        subset: the expected value of the member ``data_subtype``, if the object has that member. None: any value.

    Raises:
        InputError: the file is not JSON, the array is missing or empty, or ``data_subtype`` is not `subset`.
    """
    others: dict[str, None] = {}
    empty = True
    for member, value in stream_json(path):
        if member == name:
            empty = False
            yield value
        elif member == "data_subtype" and subset not in (None, value):
            raise InputError(f"{path} holds {value}, expected {subset}: download the file of {subset}")
        elif len(others) < 9:
            others[member] = None
    if empty:
        raise InputError(
            f"{path} contains {_describe(others)}, expected entries under {_describe([name])}: download the file that"
            " docs/data.md names"
        )


def require_keys(path: Path, entry: Any, *names: str) -> tuple[Any, ...]:
    """Return the values of an object for some keys.

    Args:
        path: the file that contains the object, for the error message.
        entry: the object.
        names: the keys.

    Raises:
        InputError: the entry is not an object, or lacks a key.
    """
    if not isinstance(entry, dict) or any(name not in entry for name in names):
        found = f"with {_describe(entry)}" if isinstance(entry, dict) else f"of type {type(entry).__name__}"
        raise InputError(
            f"{path} contains an entry {found}, expected an object with {_describe(names)}: download the file that"
            " docs/data.md names"
        )
    return tuple(entry[name] for name in names)


def _describe(names: Collection[str]) -> str:
    """Describe the content of JSON for messages, from its names as in :func:`stream_json`."""
    if not names:
        return "no values"
    if "" in names:
        return "a list"
    shown = [*names][:8] + ["..."] * (len(names) > 8)
    return f"the key{'s' * (len(names) > 1)} {', '.join(shown)}"


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is damaged or not JSON ({reason}): download or unpack the file again")


class _SyntaxError(ValueError):
    """An unexpected character, or an unexpected end of the text."""


# -- parsing ---------------------------------------------------------------------------------------------------------


def iter_members(file: TextIOBase, decoder: json.JSONDecoder, chunk_size: int = 1 << 20) -> Iterator[tuple[str, Any]]:
    """Iterate over the members of an open JSON file, as :func:`stream_json` does.

    Args:
        file: the file, opened as text.
        decoder: decodes the values.
        chunk_size: the minimum number of characters that are read at a time.

    Raises:
        ValueError: the text is not JSON.
    """
    parser = _Parser(file, chunk_size, decoder)
    if parser.peek() == "[":
        yield from _iter_elements(parser, "")
    else:
        for _ in parser.separate("{}"):
            if parser.peek() != '"':
                raise _SyntaxError(f"{parser.peek()!r} instead of a name")
            name = parser.read_value()
            parser.expect(":")
            if parser.peek() == "[":
                yield from _iter_elements(parser, name)
            else:
                yield name, parser.read_value()
    if parser.peek():
        raise _SyntaxError(f"{parser.peek()!r} after its end")


def _iter_elements(parser: _Parser, name: str) -> Iterator[tuple[str, Any]]:
    for _ in parser.separate("[]"):
        yield name, parser.read_value()


class _Parser:
    """Reads the values and the punctuation of a JSON text, and holds one chunk of the text in memory."""

    def __init__(self, file: TextIOBase, chunk_size: int, decoder: json.JSONDecoder) -> None:
        self._file = file
        self._chunk_size = chunk_size
        self._text = ""
        self._position = 0
        self._ended = False
        self._decode = decoder.raw_decode
        self._skip_whitespace = re.compile(r"\s*").match

    def _read_more(self) -> None:
        # Double the text in memory, so that a long value is not decoded from its start too often.
        new = self._file.read(max(self._chunk_size, len(self._text) - self._position))
        self._text = self._text[self._position :] + new
        self._position = 0
        self._ended = not new

    def peek(self) -> str:
        """Return the next character that is not whitespace; the empty string at the end of the text."""
        while True:
            match = self._skip_whitespace(self._text, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._text):
                return self._text[self._position]
            if self._ended:
                return ""
            self._read_more()

    def expect(self, characters: str) -> None:
        """Skip the next character, which must be one of `characters`."""
        character = self.peek()
        if not character:
            raise _SyntaxError("it ends too early")
        if character not in characters:
            raise _SyntaxError(f"{character!r} instead of {' or '.join(map(repr, characters))}")
        self._position += 1

    def separate(self, brackets: str) -> Iterator[None]:
        """Skip the brackets and commas of an array or object, and yield at the start of each member."""
        start, end = brackets
        self.expect(start)
        more = self.peek() != end
        while more:
            yield
            more = self.peek() != end
            if more:
                self.expect(f",{end}")
        self.expect(end)

    def read_value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._position)
            except json.JSONDecodeError:
                if self._ended or len(self._text) - self._position > MAX_VALUE_CHARACTERS:
                    raise
            else:
                if self._ended or (
                    end < len(self._text) and self._text[end] not in ".eE+-"
                ):  # else a number may continue
                    self._position = end
                    return value
            self._read_more()

"""JSON files that are larger than one wants to hold, read entry by entry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import TextIOBase
from pathlib import Path
from typing import Any

from blip2.errors import InputError


def stream_json(path: Path, characters: int = 1 << 20) -> Iterator[tuple[str, Any]]:
    """The members of a JSON file, one by one.

    Args:
        characters: how much is read at once, at least.

    Returns:
        Of an array, each element with the name "". Of an object, each member with its name; where a member is itself an
        array, each of its elements with the name of the member.

    Raises:
        InputError: it is not JSON.
    """
    with path.open(encoding="utf-8-sig") as file:
        try:
            yield from read_members(file, json.JSONDecoder(), characters)
        except json.JSONDecodeError as error:
            raise _damaged(path, error.msg) from error  # its place is one in the part that is held
        except (_SyntaxError, UnicodeDecodeError, RecursionError) as error:
            raise _damaged(path, str(error)) from error


def read_members(file: TextIOBase, decoder: json.JSONDecoder, characters: int = 1 << 20) -> Iterator[tuple[str, Any]]:
    """The members of an open JSON file, as :func:`stream_json` gives them, with values as `decoder` makes them.

    Raises:
        ValueError: it is not JSON.
    """
    return _members(_Reader(file, characters, decoder))


def entries(path: Path, name: str, subset: str | None = None) -> Iterator[Any]:
    """The elements of one array of a JSON object.

    Args:
        subset: what ``data_subtype`` has to be where the file has one; None: anything.

    Raises:
        InputError: it is not JSON, there is no such array, it is empty, or the file is of another subset.
    """
    others: dict[str, None] = {}
    empty = True
    for member, value in stream_json(path):
        if member == name:
            empty = False
            yield value
        elif member == "data_subtype" and subset not in (None, value):
            raise InputError(f"{path} holds {value}, expected {subset}: it is a file of another split")
        elif len(others) < 9:
            others[member] = None
    if empty:
        raise InputError(f"{path} has {_some(others)}, expected {name}: it is a file of another kind")


def fields(path: Path, entry: Any, *names: str) -> tuple[Any, ...]:
    """Values of an entry.

    Raises:
        InputError: it does not have them all.
    """
    if not isinstance(entry, dict) or any(name not in entry for name in names):
        found = _some(entry) if isinstance(entry, dict) else f"a {type(entry).__name__}"
        raise InputError(
            f"{path} has an entry with {found}, expected {', '.join(names)}: it is a file of another kind or data set"
        )
    return tuple(entry[name] for name in names)


def _some(names: dict[str, Any]) -> str:
    shown = [name or "a list" for name in names]
    return ", ".join(shown[:8] + ["..."] * (len(shown) > 8)) or "nothing"


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is damaged or no JSON ({reason}): download or unpack it again")


class _SyntaxError(ValueError):
    """Something else than JSON follows."""


class _Reader:
    """The values and signs of a JSON text, of which a part is held."""

    def __init__(self, file: TextIOBase, characters: int, decoder: json.JSONDecoder) -> None:
        self._file = file
        self._characters = characters
        self._text = ""
        self._at = 0
        self._ended = False
        self._decode = decoder.raw_decode

    def _more(self) -> None:
        # As much again as is held, so that a long value is not decoded from its start too often.
        new = self._file.read(max(self._characters, len(self._text) - self._at))
        self._text = self._text[self._at :] + new
        self._at = 0
        self._ended = not new

    def peek(self) -> str:
        """The next sign that is no white space; empty behind the last."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._more()

    def take(self, signs: str) -> str:
        """Go over one of these signs."""
        sign = self.peek()
        if not sign:
            raise _SyntaxError("it ends too early")
        if sign not in signs:
            raise _SyntaxError(f"{sign!r} instead of {' or '.join(map(repr, signs))}")
        self._at += 1
        return sign

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError:
                if self._ended:
                    raise
            else:
                if self._ended or (end < len(self._text) and self._text[end] not in ".eE+-"):  # a number may go on
                    self._at = end
                    return value
            self._more()


def _members(reader: _Reader) -> Iterator[tuple[str, Any]]:
    if reader.peek() == "[":
        yield from _elements(reader, "")
    else:
        reader.take("{")
        going = reader.peek() != "}"
        while going:
            if reader.peek() != '"':
                raise _SyntaxError(f"{reader.peek()!r} instead of a name")
            name = reader.value()
            reader.take(":")
            if reader.peek() == "[":
                yield from _elements(reader, name)
            else:
                yield name, reader.value()
            going = reader.peek() != "}"
            if going:
                reader.take(",}")
        reader.take("}")
    if reader.peek():
        raise _SyntaxError(f"{reader.peek()!r} behind its end")


def _elements(reader: _Reader, name: str) -> Iterator[tuple[str, Any]]:
    reader.take("[")
    going = reader.peek() != "]"
    while going:
        yield name, reader.value()
        going = reader.peek() != "]"
        if going:
            reader.take(",]")
    reader.take("]")

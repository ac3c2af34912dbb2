"""The text or the image in a cell of a table, exactly as it is written there, or the reason why it cannot be used."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import datasets

from blip2.config import IMAGE_TOKEN
from blip2.data.images import describe_name
from blip2.errors import InputError

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_path", "file_name", "filename", "img", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "texts", "sentence", "sentences")
ANSWER_COLUMNS = ("answers", "answer")
QUESTION_COLUMNS = ("question",)
NAME_COLUMNS = ("image_key", "coco_id")
ABOUT_COLUMNS = ("image_id", "question_id", "question_type", "answer_type", "domain")
TEXT_KEYS = ("answer", "raw")
"""Keys of the text in an entry that is an object: VQAv2's answers and COCO's sentences on the Hugging Face hub."""


class CellError(InputError):
    """Why the value of a cell cannot be used. The message continues the name of the cell."""


# -- texts -----------------------------------------------------------------------------------------------------------


def find_encoding(start: bytes) -> str:
    """The encoding that the byte order mark at the start of a file names; UTF-8 where there is none."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def decode_text(data: bytes) -> str:
    """Decode a text file.

    Bytes that are no text become halves of surrogate pairs, as in Python's names of files, which :func:`read_text`
    refuses: so one undecodable text costs one record.
    """
    encoding = find_encoding(data[:4])
    if encoding == "utf-8-sig":
        return data.decode(encoding, "surrogateescape")
    try:
        return data.decode(encoding, "surrogatepass")
    except UnicodeDecodeError:  # it breaks off within a character
        return data.decode("utf-8", "surrogateescape")


def read_text(value: Any) -> str:
    """The text of a value, its whitespace collapsed; empty where there is none.

    Args:
        value: text, a number, bytes in UTF-8 (or with a byte order mark), or None.

    Raises:
        CellError: the value is of another kind, or holds what no text has.
    """
    if value is None:
        return ""
    if isinstance(value, bytes | bytearray | memoryview):
        value = decode_text(bytes(value))
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool) and math.isfinite(value)
    if not number and not isinstance(value, str):
        raise CellError(f"holds {describe(value)}, expected text")
    text = str(value)
    if found := _NO_TEXT.search(text):
        before = text[max(0, found.start() - 20) : found.start()]
        raise CellError(
            f"holds {_name_fault(found[0])} after {before!r}, expected text: correct it, or save it as UTF-8"
        )
    if IMAGE_TOKEN in text:
        raise CellError(f"holds {IMAGE_TOKEN}, expected words alone, as the image comes first by itself: take it out")
    return " ".join(text.split())


_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def _name_fault(character: str) -> str:
    if character == "\0":
        return "the character NUL"
    if "\udc80" <= character <= "\udcff":
        return f"the byte 0x{ord(character) - 0xDC00:02x}, which is not UTF-8,"
    return f"half of a surrogate pair (\\u{ord(character):04x})"


def read_texts(cell: Any) -> tuple[tuple[str, ...], int]:
    """The texts of a cell, and how many further entries of its list are blank.

    Args:
        cell: what :func:`read_text` takes, an object with one of :data:`TEXT_KEYS`, or a list of these.

    Raises:
        CellError: the cell holds something else.
    """
    cell = _text_within(cell)
    if not isinstance(cell, list | tuple):
        text = read_text(cell)
        return ((text,) if text else ()), 0
    given = [entry for entry in map(_text_within, cell) if entry is not None]
    texts = [read_text(entry) for entry in given]
    return tuple(filter(None, texts)), sum(not text for text in texts)


def _text_within(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    found = [key for key in TEXT_KEYS if key in value]
    if len(found) != 1:
        raise CellError(
            f"holds {describe(value)}, expected text, or an object with either {' or '.join(TEXT_KEYS)}: name another"
            " column, or write the text itself"
        )
    return value[found[0]]


def read_about(cell: Any) -> Any:
    """Return what identifies or classifies a record: a number or a text as it is.

    Raises:
        CellError: the cell holds something else.
    """
    return cell if isinstance(cell, int | float) and not isinstance(cell, bool) else read_text(cell)


def describe(value: Any) -> str:
    """Name the kind of value that a cell holds, for messages."""
    if isinstance(value, Mapping):
        keys = [str(key) for key in value]
        return f"an object with the keys {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}" if keys else "{}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    return str(value) if isinstance(value, float | Decimal) else f"a value of type {type(value).__name__}"


# -- classes ---------------------------------------------------------------------------------------------------------


def class_names(feature: Any) -> list[str] | None:
    """The names of the classes that a column holds as numbers (``datasets.ClassLabel``), alone or in lists."""
    feature = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def name_classes(cell: Any, names: list[str]) -> Any:
    """The names of the classes in a cell; None for -1, which stands for an unknown class.

    Raises:
        CellError: there is no such class.
    """
    if isinstance(cell, list | tuple):
        return [name_classes(each, names) for each in cell]
    if cell is None or cell == -1:
        return None
    if not isinstance(cell, int) or not 0 <= cell < len(names):
        raise CellError(f"holds the class {cell}, expected a number from 0 to {len(names) - 1}")
    return names[cell]


# -- images ----------------------------------------------------------------------------------------------------------


def read_image_cell(cell: Any) -> str | bytes | None:
    """The path or the encoded bytes of an image; None where there is none.

    Args:
        cell: a path, bytes, an object with ``bytes`` or ``path`` (Hugging Face's images), or a list of one of these.

    Raises:
        CellError: the cell holds something else, several images, or a URL.
    """
    if isinstance(cell, list | tuple):
        if len(cell) > 1:
            raise CellError(f"holds a list of {len(cell)} images, expected one: write a row for each")
        return read_image_cell(cell[0]) if cell else None
    if isinstance(cell, Mapping):
        if not {"bytes", "path"} & set(cell):
            raise CellError(f"holds {describe(cell)}, expected a path, or an object with bytes or path")
        return read_image_cell(cell.get("bytes") or cell.get("path"))
    if isinstance(cell, bytes | bytearray | memoryview):
        return bytes(cell) or None
    if cell is None or cell == "":
        return None
    if isinstance(cell, bool | float) or not isinstance(cell, str | int):
        raise CellError(f"holds {describe(cell)}, expected the path or the bytes of an image")
    if problem := describe_name(str(cell)):
        raise CellError(f"holds {problem}")
    return str(cell)

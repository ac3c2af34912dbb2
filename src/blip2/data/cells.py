"""Parse the cells of tables into texts and images. :class:`CellError` says why a cell cannot be used."""

from __future__ import annotations

import codecs
import io
import math
import re
from collections.abc import Container, Iterable, Mapping
from decimal import Decimal
from typing import Any

import datasets
import numpy as np

from blip2.config import IMAGE_TOKEN
from blip2.data.images import describe_invalid_path
from blip2.errors import InputError

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_path", "file_name", "filename", "img", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "texts", "sentence", "sentences")
ANSWER_COLUMNS = ("answers", "answer")
QUESTION_COLUMNS = ("question",)
CHOICE_COLUMNS = ("choices", "multiple_choices", "options")
"""Names of the column with the candidate answers of multiple-choice questions, in A-OKVQA and ScienceQA, in VQA v1 and
Visual7W, and in MMMU."""
IMAGE_ID_COLUMNS = ("image_key", "coco_id")
FEATURE_COLUMNS = ("features", "npy", "npz", "safetensors")
METADATA_COLUMNS = ("image_id", "question_id", "question_type", "answer_type", "domain")
TEXT_KEYS = ("answer", "raw")
"""Keys under which an object holds its text: ``answer`` in VQAv2's answers and ``raw`` in COCO's sentences, as they are
published on the Hugging Face Hub."""


class CellError(InputError):
    """A cell that cannot be used. The message continues a sentence that begins with the name of the column."""


def first_column(columns: Container[str], names: Iterable[str]) -> str | None:
    """Return the first of `names` that is a column; None if none is."""
    return next((name for name in names if name in columns), None)


# -- texts -----------------------------------------------------------------------------------------------------------


def detect_encoding(start: bytes) -> str:
    """Return the encoding according to the byte order mark in the first bytes of a file; UTF-8 if there is none."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def decode_text(data: bytes) -> str:
    """Decode the bytes of a text file, in the encoding of the byte order mark or else in UTF-8.

    Bytes that cannot be decoded become lone surrogates, as in Python's file names. :func:`read_text` refuses lone
    surrogates, so that such bytes make one record unusable and not the whole file.
    """
    encoding = detect_encoding(data[:4])
    if encoding == "utf-8-sig":
        return data.decode(encoding, "surrogateescape")
    try:
        return data.decode(encoding, "surrogatepass")
    except UnicodeDecodeError:  # the last character is incomplete
        return data.decode("utf-8", "surrogateescape")


def read_text(value: Any) -> str:
    """Return a value as text with whitespace collapsed; the empty string for None.

    Args:
        value: text, a number, bytes in UTF-8 (or with a byte order mark), or None.

    Raises:
        CellError: the value has another type or is not finite, or the text contains NUL, bytes that are not UTF-8, a
            lone surrogate or the placeholder of the image (:data:`~blip2.config.IMAGE_TOKEN`).
    """
    if value is None:
        return ""
    if isinstance(value, bytes | bytearray | memoryview):
        value = decode_text(bytes(value))
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool) and math.isfinite(value)
    if not number and not isinstance(value, str):
        raise CellError(f"holds {describe(value)}, expected text: correct the row, or name another column")
    text = str(value)
    if match := _INVALID_CHARACTERS.search(text):
        before = text[max(0, match.start() - 20) : match.start()]
        raise CellError(
            f"holds {_describe_character(match[0])} after {before!r}, expected text: correct the row, or save the file"
            " as UTF-8"
        )
    if IMAGE_TOKEN in text:
        raise CellError(
            f"holds {IMAGE_TOKEN}, expected text only, because the image always comes first: remove the placeholder"
        )
    return " ".join(text.split())


def read_question(value: Any) -> str:
    """Return a question as :func:`read_text` does.

    Raises:
        CellError: :func:`read_text` refuses the value, or it is blank.
    """
    question = read_text(value)
    if not question:
        raise CellError("is blank, expected a question: write the question, or remove the row")
    return question


_INVALID_CHARACTERS = re.compile("[\0\ud800-\udfff]")


def _describe_character(character: str) -> str:
    if character == "\0":
        return "the character NUL"
    if "\udc80" <= character <= "\udcff":
        return f"the byte 0x{ord(character) - 0xDC00:02x}, which is not UTF-8,"
    return f"half of a surrogate pair (\\u{ord(character):04x})"


def read_texts(cell: Any) -> tuple[tuple[str, ...], int]:
    """Return the texts of a cell, and the number of blank texts in a list that were left out.

    Args:
        cell: a value for :func:`read_text`, an object with one of :data:`TEXT_KEYS`, or a list of these.

    Raises:
        CellError: the cell has another type, or :func:`read_text` refuses a text.
    """
    cell = _unwrap_text(cell)
    if not isinstance(cell, list | tuple):
        text = read_text(cell)
        return ((text,) if text else ()), 0
    texts = [read_text(entry) for entry in map(_unwrap_text, cell) if entry is not None]
    return tuple(filter(None, texts)), sum(not text for text in texts)


def _unwrap_text(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    found = [key for key in TEXT_KEYS if key in value]
    if len(found) != 1:
        raise CellError(
            f"holds {describe(value)}, expected text, or an object with either {' or '.join(TEXT_KEYS)}: name another"
            " column, or write the text itself"
        )
    return value[found[0]]


def read_metadata(cell: Any) -> Any:
    """Return the value in a metadata column: a number unchanged, any other value as :func:`read_text` returns it.

    A float without a fraction becomes an integer, because pandas stores the integers of a column with an empty cell as
    floats.

    Raises:
        CellError: the cell holds neither a number nor text.
    """
    if isinstance(cell, float) and cell.is_integer():
        return int(cell)
    return cell if isinstance(cell, int | float) and not isinstance(cell, bool) else read_text(cell)


def is_empty(cell: Any) -> bool:
    """Return whether a cell has no value: None, the empty text, or NaN, the empty cell of pandas in a column of
    numbers."""
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def describe(value: Any) -> str:
    """Describe the type of a cell's value, for messages."""
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
    """Return the class names of a column of class labels (``datasets.ClassLabel``) or of lists of labels, else None."""
    feature = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def labels_to_names(cell: Any, names: list[str]) -> Any:
    """Replace the class labels in a cell by class names, and -1, which marks an unknown class, by None.

    Raises:
        CellError: a label has no class name.
    """
    if isinstance(cell, list | tuple):
        return [labels_to_names(label, names) for label in cell]
    if cell is None or cell == -1:
        return None
    if not isinstance(cell, int) or not 0 <= cell < len(names):
        raise CellError(f"holds the class {cell}, expected a number from 0 to {len(names) - 1}: correct the row")
    return names[cell]


# -- images ----------------------------------------------------------------------------------------------------------


def read_image_cell(cell: Any) -> str | bytes | None:
    """Return the path or the encoded bytes of the image in a cell; None if the cell is empty.

    Args:
        cell: a path, bytes, an object with ``bytes`` or ``path`` (Hugging Face's images), or a list with one of these.

    Raises:
        CellError: the cell holds another value, several images, or a URL.
    """
    if isinstance(cell, list | tuple):
        if len(cell) > 1:
            raise CellError(f"holds a list of {len(cell)} images, expected one image: write a row for each image")
        return read_image_cell(cell[0]) if cell else None
    if isinstance(cell, Mapping):
        if not {"bytes", "path"} & set(cell):
            raise CellError(
                f"holds {describe(cell)}, expected a path, or an object with bytes or path: name another column"
            )
        return read_image_cell(cell.get("bytes") or cell.get("path"))
    if isinstance(cell, bytes | bytearray | memoryview):
        return bytes(cell) or None
    if cell is None or cell == "":
        return None
    if isinstance(cell, bool | float) or not isinstance(cell, str | int):
        raise CellError(f"holds {describe(cell)}, expected the path or the bytes of an image: name another column")
    if problem := describe_invalid_path(str(cell)):
        raise CellError(f"holds {problem}")
    return str(cell)


def read_features_cell(cell: Any) -> str | bytes | None:
    """Return the path of an array of features, or the bytes of its file; None if the cell is empty.

    Args:
        cell: a path, which may have a key (``clips.npz#KEY``); bytes; or nested lists of numbers [P, E], which become
            the bytes of an .npy file in float32. The numbers may be texts, as JSON is read.

    Raises:
        CellError: the cell holds another value, a URL, or lists that are not an array of two dimensions.
    """
    if not isinstance(cell, list | tuple):
        return read_image_cell(cell)
    if not cell:
        return None
    try:
        with np.errstate(over="ignore"):  # infinity is refused when the array is read
            array = np.array(cell, dtype=np.float64).astype(np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise CellError(
            f"holds {describe(cell)} that is no array of numbers ({' '.join(str(error).split())[:100]}), expected P"
            " lists of E numbers: correct the row"
        ) from error
    if array.ndim != 2:
        raise CellError(f"holds an array of {array.ndim} dimensions, expected P lists of E numbers: correct the row")
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()

"""Columns of a data source as metadata of a library: names, types, and conversion of cells."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

import pyarrow

from blip2.data.cells import decode_text

TYPES = {"bool": pyarrow.bool_(), "int": pyarrow.int64(), "float": pyarrow.float64(), "text": pyarrow.string()}
"""Type of a metadata column by name."""
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]+)?([eE][-+]?[0-9]{1,3})?")


def infer_types(rows: Iterable[Mapping[str, Any]]) -> dict[str, pyarrow.DataType]:
    """Return the type of each metadata column.

    A column is of truth values or of numbers if all its cells are; numbers may be written as texts, as in a CSV, unless
    they have leading zeros. All other columns are texts.

    Args:
        rows: the cells of each record, by column.

    Returns:
        One of the types in :data:`TYPES` for each column, by name.
    """
    kinds: dict[str, str] = {}
    for row in rows:
        for name, cell in row.items():
            kind = _kind(cell)
            if kind is not None:
                kinds[name] = _common(kinds.get(name, kind), kind)
    return {name: TYPES[kind] for name, kind in kinds.items()}


def _kind(cell: Any) -> str | None:
    """Return the name of a cell's type in :data:`TYPES`; None for a number that is missing (NaN)."""
    if isinstance(cell, bool):
        return "bool"
    if isinstance(cell, int):
        return "int" if -(2**63) <= cell < 2**63 else "text"
    if isinstance(cell, float | Decimal):
        return "float" if math.isfinite(cell) else None
    if isinstance(cell, str):
        return "int" if _INTEGER.fullmatch(cell) else "float" if _DECIMAL.fullmatch(cell) else "text"
    return "text"


def _common(first: str, second: str) -> str:
    return first if first == second else "float" if {first, second} == {"int", "float"} else "text"


def convert_cell(cell: Any, kind: pyarrow.DataType) -> Any:
    """Convert a cell to the type of its column.

    Dates and times become ISO 8601 texts, and lists and objects become JSON.

    Raises:
        ValueError: the cell does not have the type.
    """
    found = _kind(cell)
    if cell is None or found is None:
        return None
    if kind == TYPES["text"]:
        return _to_text(cell)
    expected = next(name for name, known in TYPES.items() if known == kind)
    if found != expected and (found, expected) != ("int", "float"):
        raise ValueError(f"{_to_text(cell)[:80]!r}, expected {expected}")
    return cell if expected == "bool" else int(cell) if expected == "int" else float(cell)


def _to_text(cell: Any) -> str:
    if isinstance(cell, bytes | bytearray | memoryview):
        cell = decode_text(bytes(cell))
    elif isinstance(cell, date | datetime | time):
        cell = cell.isoformat()
    elif not isinstance(cell, str):
        cell = json.dumps(cell, ensure_ascii=False, default=str) if isinstance(cell, list | dict) else str(cell)
    return cell.encode(errors="backslashreplace").decode()  # Arrow stores no lone surrogates


def column_name(name: str, reserved: Iterable[str]) -> str:
    """Return the name of a metadata column in the library, which can be written in SQL without quotation marks.

    Characters outside [A-Za-z0-9_] become underscores. A name that is in `reserved`, or begins with a digit, gets the
    prefix ``source_``.
    """
    name = re.sub(r"\W", "_", name.encode(errors="replace").decode(), flags=re.ASCII)
    return f"source_{name}" if name.lower() in reserved or not re.match("[A-Za-z_]", name) else name

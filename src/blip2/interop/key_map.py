"""Rename weights with one table per format, which works in both directions.

A row is a pair (name in the other format, name in this project) of a module or a parameter. ``{}`` stands for a number
and ``{...}`` for the rest of a name. A row for a module renames its ``weight`` and its ``bias``. The first row that
matches a name applies.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from blip2.errors import InputError

KeyMap = tuple[tuple[str, str], ...]


def qformer_block_keys(block: str, attention: str) -> KeyMap:
    """Return the rows for a Q-Former block. Transformers and LAVIS both derive their names from BERT.

    Args:
        block: name of a block in the other format, with ``{}`` for the number of the block.
        attention: name of the submodule that holds the query, key and value projections.
    """
    ours = "qformer.blocks.{}"
    rows: list[tuple[str, str]] = []
    for name, own in (("attention", "self_attention"), ("crossattention", "cross_attention")):
        rows += [(f"{block}.{name}.{attention}.{part}", f"{ours}.{own}.{part}") for part in ("query", "key", "value")]
        rows += [(f"{block}.{name}.output.dense", f"{ours}.{own}.output")]
        rows += [(f"{block}.{name}.output.LayerNorm", f"{ours}.{own}.norm")]
    for suffix, own in (("_query", "query_feed_forward"), ("", "text_feed_forward")):
        rows += [(f"{block}.intermediate{suffix}.dense", f"{ours}.{own}.expand")]
        rows += [(f"{block}.output{suffix}.dense", f"{ours}.{own}.contract")]
        rows += [(f"{block}.output{suffix}.LayerNorm", f"{ours}.{own}.norm")]
    return tuple(rows)


def rename_keys(names: Iterable[str], key_map: KeyMap, source: str, inverse: bool = False) -> dict[str, str]:
    """Return a mapping from the names of weights to their new names.

    Args:
        names: names of weights.
        key_map: the table.
        source: name of the checkpoint with these weights, for the error message.
        inverse: whether to rename from this project's names to those of the other format. False: the other direction.

    Raises:
        InputError: the table does not contain some names, or maps two names to the same name.
    """
    rows = [_compile(*(row[::-1] if inverse else row)) for row in key_map]
    renamed: dict[str, str] = {}
    unknown = []
    for name in names:
        other = next((new for pattern, form in rows if (new := _apply(pattern, form, name)) is not None), None)
        if other is None:
            unknown.append(name)
        else:
            renamed[name] = other
    if unknown:
        raise InputError(
            f"{source} has {_format_count(unknown)} unknown in BLIP-2: {format_names(unknown)}; give a BLIP-2"
            " checkpoint without other weights"
        )
    counts = Counter(renamed.values())
    duplicates = [name for name, new in renamed.items() if counts[new] > 1]
    if duplicates:
        raise InputError(
            f"{source} has {_format_count(duplicates)} with several names for the same parameter:"
            f" {format_names(duplicates)}; keep one name of each"
        )
    return renamed


def _compile(source: str, target: str) -> tuple[re.Pattern[str], str]:
    pattern = re.escape(source).replace(r"\{\.\.\.\}", "(.+)").replace(r"\{\}", r"(\d+)")
    return re.compile(pattern + r"(\.weight|\.bias)?"), target


def _apply(pattern: re.Pattern[str], form: str, name: str) -> str | None:
    match = pattern.fullmatch(name)
    if match is None:
        return None
    *parts, suffix = match.groups()
    return form.replace("{...}", "{}").format(*parts) + (suffix or "")


def format_names(names: Iterable[str], limit: int = 4) -> str:
    """Return a text with the first `limit` names in alphabetical order and the number of the remaining names."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _format_count(names: Sequence[str]) -> str:
    return f"{len(names)} weight{'s' if len(names) != 1 else ''}"

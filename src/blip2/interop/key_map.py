"""One table of names a format, used in both directions.

A row is a pair (their name, our name) of a module or a parameter; ``{}`` stands for a number, ``{...}`` for any rest
of a name. A row of a module stands for its ``weight`` and its ``bias``. Of several rows that fit, the first is taken.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from blip2.errors import InputError

Table = tuple[tuple[str, str], ...]


def block_names(theirs: str, attention: str) -> Table:
    """The rows of a block of the Q-Former, which both formats have from BERT.

    Args:
        theirs: name of a block.
        attention: name within an attention of what makes queries, keys and values.
    """
    ours = "qformer.blocks.{}"
    rows: list[tuple[str, str]] = []
    for of, own in (("attention", "self_attention"), ("crossattention", "cross_attention")):
        rows += [(f"{theirs}.{of}.{attention}.{part}", f"{ours}.{own}.{part}") for part in ("query", "key", "value")]
        rows += [(f"{theirs}.{of}.output.dense", f"{ours}.{own}.output")]
        rows += [(f"{theirs}.{of}.output.LayerNorm", f"{ours}.{own}.norm")]
    for of, own in (("_query", "query_feed_forward"), ("", "text_feed_forward")):
        rows += [(f"{theirs}.intermediate{of}.dense", f"{ours}.{own}.expand")]
        rows += [(f"{theirs}.output{of}.dense", f"{ours}.{own}.contract")]
        rows += [(f"{theirs}.output{of}.LayerNorm", f"{ours}.{own}.norm")]
    return tuple(rows)


def rename(names: Iterable[str], table: Table, where: str, back: bool = False) -> dict[str, str]:
    """From each of `names` to its name in the other format.

    Args:
        where: the names are from, for the message.
        back: from our names to theirs.

    Raises:
        InputError: names that the table does not know, listed, or two names with one meaning.
    """
    rows = [_compile(*(row[::-1] if back else row)) for row in table]
    renamed: dict[str, str] = {}
    left = []
    for name in names:
        other = next((new for pattern, form in rows if (new := _apply(pattern, form, name)) is not None), None)
        if other is None:
            left.append(name)
        else:
            renamed[name] = other
    if left:
        raise InputError(
            f"{where} has {count(left)} that belong to no part of BLIP-2: {listing(left)}; is it another model?"
        )
    meanings = Counter(renamed.values())
    twice = [name for name, new in renamed.items() if meanings[new] > 1]
    if twice:
        raise InputError(f"{where} has {count(twice)} of the same meaning: {listing(twice)}; keep one of each")
    return renamed


def _compile(source: str, target: str) -> tuple[re.Pattern[str], str]:
    pattern = re.escape(source).replace(r"\{\.\.\.\}", "(.+)").replace(r"\{\}", r"(\d+)")
    return re.compile(pattern + r"(\.weight|\.bias)?"), target


def _apply(pattern: re.Pattern[str], form: str, name: str) -> str | None:
    match = pattern.fullmatch(name)
    if match is None:
        return None
    *holes, kind = match.groups()
    return form.replace("{...}", "{}").format(*holes) + (kind or "")


def listing(names: Iterable[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def count(names: Iterable[str]) -> str:
    number = len(list(names))
    return f"{number} weight{'s' if number != 1 else ''}"

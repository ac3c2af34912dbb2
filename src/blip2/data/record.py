"""What one example is, and how it is made of a row."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2.data.cells import CellError, name_classes, read_about, read_image_cell, read_text, read_texts
from blip2.data.shards import BEGINS, BROKEN, KEY


@dataclass(frozen=True)
class Record:
    """One image and what is said about it."""

    key: str
    """Names it in messages."""
    image: str | bytes | None
    """Path or encoded bytes; None where the data set has none, which is found out when it is decoded."""
    captions: tuple[str, ...]
    """Those that are not blank; of a question the answers, each as often as it was given. Whitespace is collapsed."""
    question: str | None = None
    """What is asked about the image; None where captions are to be written."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What its row says in the :data:`ABOUT_COLUMNS`, by which results are told apart and handed in."""
    blank: int = 0
    """So many further answers or captions were given and are blank."""
    unusable: tuple[str, str] | None = None
    """The cause, one of :data:`blip2.data.dataset.CAUSES`, and the reason why its row cannot be used."""
    broken: str | None = None
    """Why the rest of a shard could not be read, which this record stands for."""
    begins: bool = False
    """Whether a shard begins with it."""

    @property
    def image_id(self) -> int:
        """Equal for equal images (by path, or by content where there is no path), in 63 bits."""
        name = self.image if isinstance(self.image, bytes) else str(self.image).encode(errors="surrogatepass")
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Columns:
    """How to make records of a data set's rows."""

    source: str
    image: str
    caption: str | None
    """None for questions whose answers are not published."""
    question: str | None
    about: tuple[str, ...]
    root: Path
    """Where relative paths of images start."""
    classes: Mapping[str, list[str]] = field(default_factory=dict)
    """Names of the classes that a column holds as numbers."""
    within: tuple[str, ...] | None = None
    """Folders that a file which an image is named by has to lie in; None: any. An image of a shard is its own bytes."""
    group: str | None = None
    """Column whose equal values belong into one batch."""
    group_share: float = 1.0
    """Share of the groups that do."""

    @property
    def names(self) -> list[str]:
        """The columns that records are made of."""
        named = (self.image, self.caption, self.question, self.group, *self.about, KEY)
        return [name for name in named if name is not None]

    def record(self, row: dict[str, Any], number: int) -> Record:
        begins = row.get(BEGINS, False)
        if BROKEN in row:
            return Record(row[KEY], None, (), broken=row[BROKEN], begins=begins)
        faults: list[tuple[str, str]] = []

        def read(cause: str, name: str | None, how: Callable[[Any], Any], otherwise: Any) -> Any:
            if name is None:
                return otherwise
            try:
                return how(self._named(row.get(name), name))
            except CellError as error:
                faults.append((cause, f"{name} {error}"))
                return otherwise

        image = read("image", self.image, read_image_cell, None)
        refused = ""
        if isinstance(image, str):
            image = str(self.root / image)
            if self.within is not None and not _lies_in(image, self.within):
                image, refused = None, f", whose image is the name {image}, which is not read: expected the bytes"
        captions, blank = read("caption", self.caption, read_texts, ((), 0))
        question = read("question", self.question, read_text, "")
        given = [name for name in self.about if row.get(name) not in (None, "")]
        about = {name: read("caption", name, read_about, None) for name in given}
        key = row.get(KEY) or f"{self.source} row {number}" + (f" ({image})" if isinstance(image, str) else "")
        unusable = faults[0] if faults else None
        return Record(key + refused, image, captions, question or None, about, blank, unusable, begins=begins)

    def captions(self, cell: Any) -> tuple[str, ...]:
        """The captions of a record, of whose row this is the cell."""
        try:
            return read_texts(self._named(cell, self.caption or ""))[0]
        except CellError:
            return ()

    def _named(self, cell: Any, name: str) -> Any:
        return name_classes(cell, self.classes[name]) if name in self.classes else cell


def _lies_in(path: str, folders: tuple[str, ...]) -> bool:
    """Whether a file lies in one of some folders, links followed."""
    with contextlib.suppress(OSError, ValueError):
        real = os.path.realpath(path)
        return any(real.startswith(os.path.join(os.path.realpath(folder), "")) for folder in folders)  # noqa: PTH118
    return False

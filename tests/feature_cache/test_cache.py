import json
import os
import pickle
import re
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import ViTConfig

from blip2.backbones.vision import ImageEncoder, Preprocessing
from blip2.config import DataConfig
from blip2.data.collate import Stage1Collator
from blip2.data.dataset import BatchDataset
from blip2.data.images import ImageError, preprocess, read_image, train_transform
from blip2.data.records import Records
from blip2.data.sampler import sample_batches
from blip2.data.sources import open_records
from blip2.errors import InputError
from blip2.feature_cache.cache import Augmentation, CachedFeatures, cache_features
from blip2.feature_cache.store import RowFormat, StoredDtype, digest
from conftest import byte_tokenizer, draw

PREPROCESSING = Preprocessing(16)


class CountingEncoder(ImageEncoder):
    """A small CNN that knows how many images it has seen."""

    seen = 0

    def __init__(self, seed: int = 0, preprocessing: Preprocessing = PREPROCESSING, stride: int = 4) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Conv2d(3, 6, 4, stride), self.count, preprocessing)
        self.seen = 0

    def count(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        return self.network(pixels)


def images(folder: Path, count: int = 5, broken: int | None = None) -> Records:
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(count):
        draw("disc", "red", 20 * i).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": f"image {i}"})
    if broken is not None:
        (folder / f"{broken}.png").write_text("not an image")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = open_records(str(folder / "rows.jsonl"), DataConfig(train=""))
    assert isinstance(records, Records)
    return records


def cached(
    tmp_path: Path,
    records: Records,
    encoder: ImageEncoder,
    views: int = 3,
    min_crop_scale: float = 0.5,
    horizontal_flip: bool = True,
    dtype: StoredDtype = "bf16",
    **options: Any,
) -> CachedFeatures:
    augmentation = Augmentation(views, min_crop_scale, horizontal_flip)
    return cache_features(tmp_path / "cache", records, encoder, augmentation, dtype, torch.device("cpu"), **options)


def name(records: Records, index: int) -> str:
    """The digest of an image."""
    return digest(Path(str(records[index].image)).read_bytes())


def lines(cache: CachedFeatures, key: str = "row") -> list[dict[str, Any]]:
    """Lines of all indexes of a store."""
    texts = [path.read_text() for path in sorted(cache.folder.glob("*.index.jsonl"))]
    return [line for text in texts for line in map(json.loads, text.splitlines()) if key in line]


def drawing(view: int, views: int) -> np.random.Generator:
    """A generator that samples this view first."""
    seed = next(seed for seed in range(999) if np.random.default_rng(seed).integers(views) == view)
    return np.random.default_rng(seed)


def whole(records: Records, index: int, encoder: ImageEncoder) -> Tensor:
    """What the encoder makes of all of an image, as it is kept."""
    pixels = preprocess(read_image(records[index].image or ""), encoder.preprocessing)
    return encoder.encode(pixels[None])[0].bfloat16()


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_those_of_the_encoder(tmp_path: Path, workers: int) -> None:
    records, encoder = images(tmp_path / "images"), CountingEncoder()
    cache = cached(tmp_path, records, encoder, batch_size=6, num_workers=workers)
    assert (len(cache), cache.num_images, cache.num_encoded, cache.errors) == (5, 5, 5, {})
    assert cache.row_format == RowFormat(3, encoder.num_tokens, encoder.hidden_size, "bf16")
    assert cache.num_bytes == 5 * 3 * encoder.num_tokens * encoder.hidden_size * 2
    for i in range(5):
        assert torch.equal(cache.read(i, None), whole(records, i, encoder))
        assert torch.equal(cache.read(i, drawing(0, 3)), whole(records, i, encoder))
        image = read_image(records[i].image or "")
        for view in (1, 2):
            random = np.random.default_rng([view, int(name(records, i), 16)])
            pixels = train_transform(image, PREPROCESSING, random, 0.5, True)
            expected = encoder.encode(pixels[None])[0].bfloat16()
            assert torch.equal(cache.read(i, drawing(view, 3)), expected)
            assert not torch.equal(expected, whole(records, i, encoder))
    assert torch.equal(cache.read_all(), torch.stack([whole(records, i, encoder) for i in range(5)]).float())


# -- int8 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "least", "most"), [("bf16", 0.001, 0.003), ("int8", 0.003, 0.01)])
def test_the_error_is_the_one_reported(tmp_path: Path, dtype: StoredDtype, least: float, most: float) -> None:
    records, encoder = images(tmp_path / "images"), CountingEncoder()
    cache = cached(tmp_path, records, encoder, views=1, dtype=dtype)
    exact = torch.stack(
        [encoder.encode(preprocess(read_image(record.image or ""), PREPROCESSING)[None])[0] for record in records]
    )
    error = float((cache.read_all() - exact).norm() / exact.norm())
    assert cache.rms_error == pytest.approx(error, rel=1e-4)
    assert least < error < most
    assert cached(tmp_path, records, encoder, views=1, dtype=dtype).rms_error == cache.rms_error
    assert json.loads((cache.folder / "about.json").read_text())["error"] == cache.rms_error


def test_int8_has_a_scale_a_token() -> None:
    """A token a thousand times larger than another spoils nothing; one of zeros stays zeros."""
    features = torch.tensor([[1.0, -0.5, 0.25], [1000.0, 3.0, -500.0], [0.0, 0.0, 0.0]])[None, None]
    row_format = RowFormat(1, 3, 3, "int8")
    fields = row_format.pack(features)
    assert fields["values"].tolist() == [[[[127, -64, 32], [127, 0, -64], [0, 0, 0]]]]
    torch.testing.assert_close(fields["scales"], torch.tensor([[[1 / 127, 1000 / 127, 0.0]]]))
    largest = features.abs().amax(dim=-1, keepdim=True)
    assert ((row_format.unpack(fields).float() - features).abs() <= largest * (0.5 / 127 + 2**-8)).all()
    assert row_format.numpy_dtype.itemsize == 9 + 3 * 4


def test_what_is_not_finite_is_not_hidden() -> None:
    row_format = RowFormat(1, 2, 2, "int8")
    back = row_format.unpack(row_format.pack(torch.tensor([[[[1.0, float("nan")], [1.0, float("inf")]]]])))
    assert not back.isfinite().all(dim=-1).any()


# -- found again, or not ---------------------------------------------------------------------------------------------


def test_found_again(tmp_path: Path) -> None:
    first = cached(tmp_path, images(tmp_path / "images"), CountingEncoder())
    files = sorted(first.folder.iterdir())
    encoder, reported = CountingEncoder(), []
    again = cached(tmp_path, images(tmp_path / "images"), encoder, report=lambda *done: reported.append(done))
    assert (encoder.seen, reported, again.num_encoded, again.num_images) == (0, [], 0, 5)
    assert again.folder == first.folder
    assert torch.equal(again.read(3, None), first.read(3, None))
    # images() wrote the files anew, which only gave them another time.
    assert len(lines(again, "file")) == 10
    cached(tmp_path, images(tmp_path / "images"), encoder)
    assert [path for path in files if not path.exists()] == []


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, encoder = images(tmp_path / "images"), CountingEncoder()
    cached(tmp_path, records, encoder)
    monkeypatch.setattr(Path, "read_bytes", None)
    cache = cached(tmp_path, records, encoder)
    assert (cache.num_images, encoder.seen) == (5, 15)


def brighter(encoder: ImageEncoder) -> ImageEncoder:
    encoder.network.bias.data[5] += 1e-3
    return encoder


def configured(encoder: ImageEncoder, **config: Any) -> ImageEncoder:
    encoder.network.config = ViTConfig(**config)  # pyright: ignore[reportAttributeAccessIssue]
    return encoder


def of_layer(encoder: ImageEncoder, layer: str) -> ImageEncoder:
    encoder.layer = layer
    return encoder


@pytest.mark.parametrize(
    ("encoder", "settings"),
    [
        (lambda: brighter(CountingEncoder()), {}),
        (lambda: CountingEncoder().to(torch.bfloat16), {}),
        (lambda: CountingEncoder(preprocessing=replace(PREPROCESSING, image_size=32)), {}),
        (lambda: CountingEncoder(preprocessing=replace(PREPROCESSING, std=(1.0, 1.0, 1.0))), {}),
        # The same weights used otherwise, as another layer of one network would be.
        (lambda: CountingEncoder(stride=2), {}),
        (lambda: of_layer(CountingEncoder(), "second-last"), {}),
        (lambda: configured(CountingEncoder(), hidden_act="relu"), {}),
        (CountingEncoder, {"views": 2}),
        (CountingEncoder, {"min_crop_scale": 0.6}),
        (CountingEncoder, {"horizontal_flip": False}),
        (CountingEncoder, {"dtype": "int8"}),
    ],
    ids=["weight", "dtype", "size", "std", "shape", "layer", "configuration", "views", "crop", "flip", "int8"],
)
def test_made_anew_for_another(tmp_path: Path, encoder: Callable[[], ImageEncoder], settings: dict[str, Any]) -> None:
    records = images(tmp_path / "images", 2)
    first = cached(tmp_path, records, CountingEncoder())
    other = encoder()
    second = cached(tmp_path, records, other, **settings)
    assert second.folder != first.folder
    assert second.num_encoded == 2
    assert second.read(1, None).shape == (other.num_tokens, other.hidden_size)


def test_a_name_changes_nothing(tmp_path: Path) -> None:
    records = images(tmp_path / "images", 2)
    first, second = (
        cached(tmp_path, records, configured(CountingEncoder(), hidden_act="relu", name_or_path=name))
        for name in ("here", "there")
    )
    assert second.folder == first.folder
    assert second.num_encoded == 0


def test_one_view_does_not_ask_how_others_are_made(tmp_path: Path) -> None:
    records = images(tmp_path / "images", 2)
    first = cached(tmp_path, records, CountingEncoder(), views=1)
    assert (
        cached(tmp_path, records, CountingEncoder(), views=1, min_crop_scale=0.9, horizontal_flip=False).num_encoded
        == 0
    )
    assert first.num_encoded == 2


def test_only_a_changed_image_is_made_anew(tmp_path: Path) -> None:
    first = cached(tmp_path, images(tmp_path / "images"), CountingEncoder())
    records, encoder = images(tmp_path / "images"), CountingEncoder()
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "images" / "4.png")
    second = cached(tmp_path, records, encoder)
    assert (second.folder, second.num_encoded, encoder.seen) == (first.folder, 1, 3)
    assert torch.equal(second.read(4, None), whole(records, 4, encoder))
    assert not torch.equal(first.read(4, None), second.read(4, None))
    assert torch.equal(first.read(3, None), second.read(3, None))


def test_data_sets_share_what_they_share(tmp_path: Path) -> None:
    """The same images under other paths, in another order, and as bytes; twice within one data set."""
    records = images(tmp_path / "images")
    first = cached(tmp_path, records, CountingEncoder())
    folder = tmp_path / "copies"
    folder.mkdir()
    for i in range(5):
        shutil.copy(tmp_path / "images" / f"{i}.png", folder / f"copy-{i}.png")
    draw("stripe", "green", 0).save(folder / "new.png")
    draw("stripe", "green", 0).save(folder / "new again.png")
    names = ["copy-3.png", "new.png", "copy-1.png", "new again.png", "copy-3.png"]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"image": n, "caption": "x"}) + "\n" for n in names))
    others, encoder = open_records(str(folder / "rows.jsonl"), DataConfig(train="")), CountingEncoder()
    assert isinstance(others, Records)
    second = cached(tmp_path, others, encoder)
    assert (len(second), second.num_images, second.num_encoded, encoder.seen) == (5, 3, 1, 3)
    for view in range(3):
        for mine, theirs in ((0, 3), (2, 1), (4, 3)):
            assert torch.equal(second.read(mine, drawing(view, 3)), first.read(theirs, drawing(view, 3)))
        assert torch.equal(second.read(1, drawing(view, 3)), second.read(3, drawing(view, 3)))

    table = datasets.Dataset.from_list([{"image": (folder / n).read_bytes(), "caption": "x"} for n in names])
    table.to_parquet(folder / "rows.parquet")
    held = open_records(str(folder / "rows.parquet"), DataConfig(train=""))
    assert isinstance(held, Records) and isinstance(held[0].image, bytes)
    third = cached(tmp_path, held, encoder)
    assert (third.num_images, third.num_encoded, encoder.seen) == (3, 0, 3)
    assert torch.equal(third.read_all(), second.read_all())


# -- images that cannot be used ------------------------------------------------------------------------------------


def test_broken_images_are_remembered(tmp_path: Path) -> None:
    records, encoder = images(tmp_path / "images", 5, broken=2), CountingEncoder()
    for seen in (12, 12):
        cache = cached(tmp_path, records, encoder)
        assert (cache.num_images, encoder.seen, list(cache.errors)) == (4, seen, [2])
        with pytest.raises(ImageError, match=r"^it is not an image \(it begins with b'not an image'\)"):
            cache.read(2, None)
        # Those behind it keep their places.
        assert torch.equal(cache.read(3, None), whole(records, 3, CountingEncoder()))
        with pytest.raises(ImageError, match="it is not an image"):
            cache.read_all()


def test_a_missing_file_is_looked_for_again(tmp_path: Path) -> None:
    records, encoder = images(tmp_path / "images", 5), CountingEncoder()
    data = (tmp_path / "images" / "2.png").read_bytes()
    (tmp_path / "images" / "2.png").unlink()
    cache = cached(tmp_path, records, encoder)
    assert list(cache.errors) == [2]
    assert re.fullmatch(
        r"image .*2\.png cannot be read \(No such file or directory\): check its path and permissions", cache.errors[2]
    )
    (tmp_path / "images" / "2.png").write_bytes(data)
    cache = cached(tmp_path, records, encoder)
    assert (cache.errors, cache.num_encoded) == ({}, 1)
    assert torch.equal(cache.read(2, None), whole(records, 2, encoder))


def test_not_one_image_is_good(tmp_path: Path) -> None:
    cache = cached(tmp_path, images(tmp_path / "images", 1, broken=0), CountingEncoder())
    assert (cache.num_images, cache.num_encoded, cache.num_bytes, cache.rms_error, list(cache.errors)) == (
        0,
        0,
        0,
        None,
        [0],
    )


def test_an_image_that_changes_meanwhile(tmp_path: Path) -> None:
    """Its features must not get the name of what it was."""
    records, encoder = images(tmp_path / "images"), CountingEncoder()

    def change(done: int, total: int) -> None:
        if done == 0:
            draw("stripe", "blue", 0).save(tmp_path / "images" / "4.png")

    cache = cached(tmp_path, records, encoder, report=change)
    assert list(cache.errors) == [4]
    assert "4.png changed while its features were computed: run the command again" in cache.errors[4]
    again = cached(tmp_path, records, encoder)
    assert torch.equal(again.read(4, None), whole(records, 4, encoder))


# -- reading -------------------------------------------------------------------------------------------------------


def test_training_reads_features(tmp_path: Path) -> None:
    records, encoder = images(tmp_path / "images", 4, broken=1), CountingEncoder()
    cache = cached(tmp_path, records, encoder)
    encoder.seen = 0
    spec = next(sample_batches(records, 4, 0))
    for train in (True, False):
        preparation = BatchDataset(records, Stage1Collator(byte_tokenizer(), 16), PREPROCESSING, train, features=cache)
        loaded = preparation[spec]
        assert loaded.batch is not None
        assert loaded.batch.images.shape == (4 if train else 3, encoder.num_tokens, encoder.hidden_size)
        assert "1.png): it is not an image" in str(loaded.skipped[0])
    assert encoder.seen == 0
    good = [sample.record for sample in spec.samples if isinstance(sample.record, int) and sample.record != 1]
    assert torch.equal(loaded.batch.images, torch.stack([whole(records, i, encoder) for i in good]))


def test_readers_share_the_file(tmp_path: Path) -> None:
    """A copy of the features for each reader would fill the memory."""
    cache = cached(tmp_path, images(tmp_path / "images"), CountingEncoder(), views=8)
    cache.read(0, None)
    data = pickle.dumps(cache)
    assert len(data) < 1500 < cache.num_bytes
    copies = [pickle.loads(data) for _ in range(20)]
    for i in range(5):
        assert all(torch.equal(copy.read(i, None), cache.read(i, None)) for copy in copies)
    mapped = copies[0]._reader._mapped[0]
    assert isinstance(mapped, np.memmap) and not mapped.flags.writeable


def test_progress_is_reported(tmp_path: Path) -> None:
    reported: list[tuple[int, int]] = []
    records = images(tmp_path / "images", broken=1)
    options = {"report": lambda done, total: reported.append((done, total)), "batch_size": 6}
    cached(tmp_path, records, CountingEncoder(), **options)
    assert reported == [(0, 5), (2, 5), (4, 5), (5, 5)]


# -- disks, kills and other writers --------------------------------------------------------------------------------


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, encoder = images(tmp_path / "images"), CountingEncoder()
    needed = 5 * 3 * encoder.num_tokens * encoder.hidden_size * 2
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with pytest.raises(InputError, match=r"GB free: lower data\.cached_views, set data\.cached_dtype to int8"):
        cached(tmp_path, records, encoder)
    assert encoder.seen == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed))
    assert cached(tmp_path, records, encoder).num_encoded == 5
    # What is there already needs no room.
    draw("stripe", "green", 0).save(tmp_path / "images" / "4.png")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed // 5))
    assert cached(tmp_path, records, encoder).num_encoded == 1


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    records = images(tmp_path / "images")
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match=r"a folder for features in .*cache \(Not a directory\): set data\.features"):
        cached(tmp_path, records, CountingEncoder())


def test_what_is_stopped_keeps_what_was_done(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    records, encoder = images(tmp_path / "images"), CountingEncoder()
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, records, encoder, report=stop, batch_size=6)
    assert encoder.seen == 12
    assert cached(tmp_path, records, encoder).num_encoded == 1
    assert encoder.seen == 15


def test_what_others_made_is_not_there(tmp_path: Path) -> None:
    """As on two machines that do not share the folder."""

    def elsewhere(done: int, total: int) -> None:
        if done == total:
            for path in (tmp_path / "cache").glob("*/*.bin"):
                os.truncate(path, 0)

    records = images(tmp_path / "images")
    with pytest.raises(InputError, match=r"row 0 .* set data\.features to a folder that all machines share"):
        cached(tmp_path, records, CountingEncoder(), report=elsewhere)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("after", [0, 2, 4, 5])
def test_a_killed_build_is_gone_on_with(tmp_path: Path, after: int) -> None:
    """Nothing is cleaned up, as in a power cut; what was done is not done again."""
    records, encoder = images(tmp_path / "images"), CountingEncoder()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the threads of the parent are not there
            kill = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done == after else None  # noqa: E731
            cached(tmp_path, records, encoder, report=kill, batch_size=6)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    cache = cached(tmp_path, records, encoder)
    # A batch that was encoded but not yet written when it died is encoded again.
    assert cache.num_encoded * 3 == encoder.seen <= (5 - after) * 3
    assert sorted(line["image"] for line in lines(cache)) == sorted(name(records, i) for i in range(5))
    for i in range(5):
        assert torch.equal(cache.read(i, None), whole(records, i, encoder))
    assert cached(tmp_path, records, encoder).num_encoded == 0
    assert cache.rms_error is not None


@pytest.mark.parametrize(
    ("torn", "redone"),
    [
        (lambda data, index: os.truncate(index, index.stat().st_size - 1), 1),
        (lambda data, index: os.truncate(index, index.stat().st_size - 20), 1),
        (lambda data, index: os.truncate(data, data.stat().st_size - 1), 1),
        (lambda data, index: os.truncate(data, data.stat().st_size * 2 // 5), 3),
        (lambda data, index: os.truncate(data, 0), 5),
        (lambda data, index: data.unlink(), 5),
        (lambda data, index: index.write_bytes(b'5\n["file"]\n' + index.read_bytes()), 0),
        (lambda data, index: index.write_bytes(index.read_bytes() + b'{"image": "00'), 0),
    ],
    ids=[
        "line without its end",
        "half a line",
        "half a row",
        "rows",
        "all rows",
        "no file",
        "other JSON",
        "a line that is being written",
    ],
)
def test_what_is_not_whole_is_made_again(tmp_path: Path, torn: Callable[[Path, Path], object], redone: int) -> None:
    records, encoder = images(tmp_path / "images"), CountingEncoder()
    cache = cached(tmp_path, records, encoder)
    (data,), (index,) = cache.folder.glob("*.bin"), cache.folder.glob("*.index.jsonl")
    torn(data, index)
    encoder.seen = 0
    again = cached(tmp_path, records, encoder)
    assert (again.num_encoded, encoder.seen) == (redone, 3 * redone)
    for i in range(5):
        assert torch.equal(again.read(i, None), whole(records, i, encoder))
    assert cached(tmp_path, records, encoder).num_encoded == 0


def test_two_runs_at_once(tmp_path: Path) -> None:
    """Two runs that start together both make what is missing, and both go on."""
    records, encoder = images(tmp_path / "images"), CountingEncoder()
    others: list[CachedFeatures] = []

    def overtake(done: int, total: int) -> None:
        if not others:
            others.append(cached(tmp_path, records, CountingEncoder()))

    cache = cached(tmp_path, records, encoder, report=overtake)
    assert cache.num_images == others[0].num_images == 5
    assert len(list(cache.folder.glob("*.bin"))) == 2
    for i in range(5):
        assert torch.equal(cache.read(i, None), whole(records, i, encoder))
        assert torch.equal(others[0].read(i, None), whole(records, i, encoder))

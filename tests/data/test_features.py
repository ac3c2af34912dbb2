import json
import os
import pickle
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from blip2.config import DataConfig
from blip2.data.batches import Preparation, plan_batches
from blip2.data.features import FeatureCache, cache_features
from blip2.data.images import ImageError, augment_to_pixels, read_image, to_pixels
from blip2.data.records import Records, open_records
from blip2.data.texts import RepresentationTexts
from blip2.errors import InputError
from blip2.model.vision import ImageEncoder, Preprocessing
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


def pictures(folder: Path, count: int = 5, broken: int | None = None) -> Records:
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(count):
        draw("disc", "red", 20 * i).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": f"picture {i}"})
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
    smallest_crop: float = 0.5,
    flip: bool = True,
    **options: Any,
) -> FeatureCache:
    return cache_features(
        tmp_path / "cache", records, encoder, views, smallest_crop, flip, torch.device("cpu"), **options
    )


def drawing(view: int, views: int) -> np.random.Generator:
    """A generator that draws this view first."""
    seed = next(seed for seed in range(999) if np.random.default_rng(seed).integers(views) == view)
    return np.random.default_rng(seed)


def whole(records: Records, index: int, encoder: ImageEncoder) -> Tensor:
    """What the encoder makes of all of an image, as it is kept."""
    pixels = to_pixels(read_image(records[index].image or ""), encoder.preprocessing)
    return encoder.features(pixels[None])[0].bfloat16()


def test_features_are_those_of_the_encoder(tmp_path: Path) -> None:
    records, encoder = pictures(tmp_path / "pictures"), CountingEncoder()
    cache = cached(tmp_path, records, encoder, batch_size=2)
    assert cache.shape == (5, 3, encoder.tokens, encoder.width)
    for i in range(5):
        assert torch.equal(cache.read(i, None), whole(records, i, encoder))
        assert torch.equal(cache.read(i, drawing(0, 3)), whole(records, i, encoder))
        image = read_image(records[i].image or "")
        for view in (1, 2):
            pixels = augment_to_pixels(image, PREPROCESSING, np.random.default_rng([view, i]), 0.5, True)
            expected = encoder.features(pixels[None])[0].bfloat16()
            assert torch.equal(cache.read(i, drawing(view, 3)), expected)
            assert not torch.equal(expected, whole(records, i, encoder))


def test_found_again(tmp_path: Path) -> None:
    first = cached(tmp_path, pictures(tmp_path / "pictures"), CountingEncoder())
    encoder, reported = CountingEncoder(), []
    again = cached(tmp_path, pictures(tmp_path / "pictures"), encoder, report=lambda *done: reported.append(done))
    assert (encoder.seen, reported) == (0, [])
    assert again.folder == first.folder
    assert torch.equal(again.read(3, None), first.read(3, None))


def brighter(encoder: ImageEncoder) -> ImageEncoder:
    encoder.network.bias.data[5] += 1e-3
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
        (CountingEncoder, {"views": 2}),
        (CountingEncoder, {"smallest_crop": 0.6}),
        (CountingEncoder, {"flip": False}),
    ],
    ids=["weight", "dtype", "size", "std", "shape", "views", "crop", "flip"],
)
def test_made_anew_for_another(tmp_path: Path, encoder: Callable[[], ImageEncoder], settings: dict[str, Any]) -> None:
    records = pictures(tmp_path / "pictures", 2)
    first = cached(tmp_path, records, CountingEncoder())
    other = encoder()
    second = cached(tmp_path, records, other, **settings)
    assert second.folder != first.folder
    assert second.shape[2:] == (other.tokens, other.width)


def test_made_anew_for_another_image(tmp_path: Path) -> None:
    first = cached(tmp_path, pictures(tmp_path / "pictures"), CountingEncoder())
    records = pictures(tmp_path / "pictures")
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "pictures" / "4.png")
    second = cached(tmp_path, records, CountingEncoder())
    assert second.folder != first.folder
    assert not torch.equal(first.read(4, None), second.read(4, None))
    assert cached(tmp_path, pictures(tmp_path / "pictures", 4), CountingEncoder()).shape[0] == 4


def test_broken_images_are_remembered(tmp_path: Path) -> None:
    records, encoder = pictures(tmp_path / "pictures", 5, broken=2), CountingEncoder()
    for cache in (cached(tmp_path, records, encoder), cached(tmp_path, records, encoder)):
        with pytest.raises(ImageError, match=r"2\.png is not an image"):
            cache.read(2, None)
        assert torch.equal(cache.read(3, None), whole(records, 3, encoder))  # those behind it keep their places


def test_training_reads_features(tmp_path: Path) -> None:
    records, encoder = pictures(tmp_path / "pictures", 4, broken=1), CountingEncoder()
    cache = cached(tmp_path, records, encoder)
    encoder.seen = 0
    plan = next(plan_batches(records, 4, 0))
    for train in (True, False):
        preparation = Preparation(
            records, RepresentationTexts(byte_tokenizer(), 16), PREPROCESSING, train, features=cache
        )
        loaded = preparation[plan]
        assert loaded.batch is not None
        assert loaded.batch.images.shape == (4 if train else 3, encoder.tokens, encoder.width)
        assert "1.png is not an image" in loaded.skipped[0]
    assert encoder.seen == 0
    good = [draw.record for draw in plan.draws if isinstance(draw.record, int) and draw.record != 1]
    assert torch.equal(loaded.batch.images, torch.stack([whole(records, i, encoder) for i in good]))


def test_progress_is_reported(tmp_path: Path) -> None:
    reported: list[tuple[int, int]] = []
    cached(
        tmp_path,
        pictures(tmp_path / "pictures"),
        CountingEncoder(),
        report=lambda done, total: reported.append((done, total)),
        batch_size=2,
    )
    assert reported == [(2, 5), (4, 5), (5, 5)]


def test_workers_share_the_file(tmp_path: Path) -> None:
    """A copy of the features for each worker would fill the memory."""
    cache = cached(tmp_path, pictures(tmp_path / "pictures"), CountingEncoder(), views=8)
    data = pickle.dumps(cache)
    assert len(data) < 1000
    assert torch.equal(pickle.loads(data).read(3, None), cache.read(3, None))


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, encoder = pictures(tmp_path / "pictures"), CountingEncoder()
    needed = 5 * 3 * encoder.tokens * encoder.width * 2
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with pytest.raises(InputError, match=r"GB free: lower data\.cached_views"):
        cached(tmp_path, records, encoder)
    assert encoder.seen == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed))
    assert cached(tmp_path, records, encoder).shape == (5, 3, encoder.tokens, encoder.width)


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        if done > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, pictures(tmp_path / "pictures"), CountingEncoder(), report=fail, batch_size=2)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_killed_build_is_not_taken_for_complete(tmp_path: Path) -> None:
    records, encoder = pictures(tmp_path / "pictures"), CountingEncoder()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the threads of the parent are not there
            # Nothing is cleaned up, as in a power cut.
            cached(tmp_path, records, encoder, report=lambda *done: os.kill(os.getpid(), signal.SIGKILL), batch_size=2)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert list((tmp_path / "cache").iterdir()) != []
    cache = cached(tmp_path, records, encoder)
    assert encoder.seen == 15
    assert torch.equal(cache.read(4, None), whole(records, 4, encoder))


def test_another_process_was_faster(tmp_path: Path) -> None:
    """Two runs that start together make the same features, and both go on."""
    records = pictures(tmp_path / "pictures")

    def overtake(done: int, total: int) -> None:
        if done == total:
            folder = next((tmp_path / "cache").glob("*.tmp"))
            shutil.copytree(elsewhere.folder, folder.with_name(folder.name.split(".")[0]))

    elsewhere = cached(tmp_path / "elsewhere", records, CountingEncoder())
    cache = cached(tmp_path, records, CountingEncoder(), report=overtake)
    assert torch.equal(cache.read(4, None), elsewhere.read(4, None))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [cache.folder.name]

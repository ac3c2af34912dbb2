import gc
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from blip2.backbones.vision import Preprocessing
from blip2.config import DataConfig
from blip2.data import dataset as batches
from blip2.data import workers as loading
from blip2.data.collate import RepresentationTexts
from blip2.data.dataset import Draw, Plan, Preparation, plan_batches, plan_evaluation, to_device
from blip2.data.images import read_image, to_pixels
from blip2.data.records import Records, RecordStream, open_records
from blip2.data.workers import load
from blip2.errors import InputError
from blip2.model.representation import RepresentationBatch
from conftest import Parts

PREPROCESSING = Preprocessing(8)
END = 256  # of the byte tokenizers
LONG = " ".join(["word"] * 10_000)


# -- drawing ---------------------------------------------------------------------------------------------------------


def write_table(path: Path, count: int, captions: int = 1) -> Path:
    """Record i has the image i.png; captions are of 1 to 29 words."""
    rows = [
        {"image": f"{i}.png", "captions": [" ".join(["word"] * (1 + (7 * i + j) % 29)) for j in range(captions)]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


Opener = Callable[..., Records | RecordStream]


@pytest.fixture(params=["table", "stream"])
def open_numbered(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    def open_(count: int, captions: int = 1, process: int = 0, processes: int = 1) -> Records | RecordStream:
        path = tmp_path / f"{count}-{captions}.jsonl"
        if not path.exists():
            write_table(path, count, captions)
        config = DataConfig(train=str(path), streaming=request.param == "stream")
        return open_records(str(path), config, process, processes)

    return open_


@pytest.fixture(autouse=True)
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "WINDOW", 2)


def number(draw: Draw) -> int:
    return draw.record if isinstance(draw.record, int) else int(Path(str(draw.record.image)).stem)


def take_epochs(plans: Iterator[Plan], count: int) -> list[list[Draw]]:
    """All draws of the first epochs."""
    out: list[list[Draw]] = [[] for _ in range(count)]
    for plan in plans:
        epochs = [draw.seed[1] for draw in plan.draws]
        if min(epochs) >= count:
            return out
        for draw, epoch in zip(plan.draws, epochs, strict=True):
            if epoch < count:
                out[epoch].append(draw)
    raise AssertionError("plans ended")


def numbers(draws: Iterable[Draw]) -> list[int]:
    return [number(draw) for draw in draws]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("count", [24, 23, 17, 4])
def test_every_record_once_an_epoch(open_numbered: Opener, grouped: bool, count: int) -> None:
    plans = list(islice(plan_batches(open_numbered(count), 4, 0, grouped), 30))
    assert all(len(plan.draws) == 4 for plan in plans)
    epochs = take_epochs(iter(plans), 3)
    for draws in epochs:
        assert sorted(numbers(draws)) == list(range(count))
    if count > 4:
        assert numbers(epochs[0]) != numbers(epochs[1]) != numbers(epochs[2])


def test_an_epoch_ends_before_the_next_begins(open_numbered: Opener) -> None:
    """But for the one batch that has of both."""
    epochs = [{draw.seed[1] for draw in plan.draws} for plan in islice(plan_batches(open_numbered(23), 4, 0), 23)]
    assert [sorted(each) for each in epochs[:6]] == [[0]] * 5 + [[0, 1]]
    assert sum(len(each) == 2 for each in epochs) == 3  # 92 records are four epochs
    assert all(max(one) <= min(other) for one, other in pairwise(epochs))


def test_tables_are_shuffled_as_a_whole(tmp_path: Path) -> None:
    records = open_records(str(write_table(tmp_path / "rows.jsonl", 80)), DataConfig(train=""))
    first = next(plan_batches(records, 4, 0, group_by_length=False))
    assert max(number(draw) for draw in first.draws) > 8  # the first window of the file


def test_plans_follow_from_the_seed(open_numbered: Opener) -> None:
    first, again, other = (list(islice(plan_batches(open_numbered(23, captions=3), 4, seed), 20)) for seed in (5, 5, 6))
    assert first == again
    assert [plan.draws for plan in first] != [plan.draws for plan in other]
    assert len({draw.seed for plan in first for draw in plan.draws}) == 80  # every augmentation has its own


def test_batches_of_like_length(open_numbered: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "WINDOW", 8)

    def spread(grouped: bool) -> float:
        plans = islice(plan_batches(open_numbered(64), 4, 0, grouped), 32)
        lengths = [[1 + 7 * number(draw) % 29 for draw in plan.draws] for plan in plans]
        return sum(max(each) - min(each) for each in lengths) / len(lengths)

    assert spread(True) < spread(False) / 3


def test_records_without_captions_are_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of nothing else could not be trained on."""
    monkeypatch.setattr(batches, "WINDOW", 16)
    rows = [{"image": f"{i}.png", "caption": "word " * (i % 7) if i % 4 else None} for i in range(64)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plans = islice(plan_batches(open_records(str(path), DataConfig(train="")), 4, 0), 64)
    assert max(sum(draw.caption < 0 for draw in plan.draws) for plan in plans) < 4


def test_answers_are_never_grouped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By length, each batch would hold one of the two answers alone."""
    monkeypatch.setattr(batches, "WINDOW", 8)
    rows = [{"image": f"{i}.png", "question": "Is it?", "answer": ("no", "yes")[i % 2]} for i in range(256)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for streaming in (False, True):
        records = open_records(str(path), DataConfig(train=str(path), streaming=streaming))
        for plan in islice(plan_batches(records, 32, 0), 8):
            assert len({number(draw) % 2 for draw in plan.draws}) == 2


def test_order_of_lengths_is_random(open_numbered: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted batches must not come in the order of their lengths."""
    monkeypatch.setattr(batches, "WINDOW", 16)
    plans = islice(plan_batches(open_numbered(64), 4, 0), 16)
    lengths = [max(1 + 7 * number(draw) % 29 for draw in plan.draws) for plan in plans]
    assert lengths != sorted(lengths)
    assert lengths != sorted(lengths, reverse=True)


@pytest.mark.parametrize("count", [24, 31])
def test_processes_share_the_records(open_numbered: Opener, count: int) -> None:
    """Also those that cannot be dealt out evenly, in batches of one size."""
    shares = []
    for process in range(2):
        plans = list(islice(plan_batches(open_numbered(count, 1, process, 2), 4, 0, True, process, 2), 24))
        assert all(len(plan.draws) == 4 for plan in plans)
        shares.append(take_epochs(iter(plans), 4))
    for first, second in zip(*shares, strict=True):
        assert first and second
        assert sorted(numbers(first) + numbers(second)) == list(range(count))


@pytest.mark.parametrize("count", [24, 23, 3])
def test_going_on_from_any_position(open_numbered: Opener, count: int) -> None:
    plans = list(islice(plan_batches(open_numbered(count, 2), 4, 0), 20))
    for done, plan in enumerate(plans, 1):
        position = json.loads(json.dumps(plan.position))
        rest = list(islice(plan_batches(open_numbered(count, 2), 4, 0, position=position), len(plans) - done))
        assert rest == plans[done:]


def test_memory_is_flat(open_numbered: Opener) -> None:
    plans = plan_batches(open_numbered(2000), 4, 0)

    def take(count: int) -> int:
        for _ in islice(plans, count):
            pass
        gc.collect()  # type checks leave cycles behind
        return tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0

    tracemalloc.start()
    try:
        sizes = [take(50) for _ in range(6)]
    finally:
        tracemalloc.stop()
    # What is made once, here or by a thread of another test, can fall into any of the differences, but not into all.
    assert min(after - before for before, after in pairwise(sizes)) < 5_000  # 50 plans take four times as much


@pytest.mark.parametrize("process", [0, 1])
def test_going_on_in_one_of_two_processes(open_numbered: Opener, process: int) -> None:
    def plans(position: dict | None = None) -> Iterator[Plan]:
        return plan_batches(open_numbered(29, 1, process, 2), 4, 0, True, process, 2, position)

    first = list(islice(plans(), 8))
    for done, plan in enumerate(first, 1):
        assert list(islice(plans(plan.position), 8 - done)) == first[done:]


@pytest.mark.parametrize("open_numbered", ["table"], indirect=True)
def test_fewer_records_than_a_batch(open_numbered: Opener) -> None:
    for plan in islice(plan_batches(open_numbered(3), 8, 0), 4):
        assert sorted(numbers(plan.draws)) == [0, 1, 2]


@pytest.mark.parametrize("open_numbered", ["stream"], indirect=True)
def test_a_short_stream_fills_a_batch_by_going_round(open_numbered: Opener) -> None:
    """How many records it has it does not know."""
    plans = list(islice(plan_batches(open_numbered(3), 8, 0), 3))
    assert [len(plan.draws) for plan in plans] == [8, 8, 8]
    drawn = sorted((draw.seed[1], number(draw)) for plan in plans for draw in plan.draws)
    assert drawn == [(epoch, record) for epoch in range(8) for record in range(3)]


@pytest.mark.parametrize("open_numbered", ["stream"], indirect=True)
def test_a_stream_that_has_nothing_any_more(open_numbered: Opener, tmp_path: Path) -> None:
    records = open_numbered(5)
    (tmp_path / "5-1.jsonl").write_text("")
    with pytest.raises(InputError, match="the data gave this process no records"):
        next(plan_batches(records, 2, 0))


@pytest.mark.parametrize("open_numbered", ["table"], indirect=True)
def test_fewer_records_than_processes(open_numbered: Opener) -> None:
    with pytest.raises(InputError, match=r"too few for .*processes"):
        next(plan_batches(open_numbered(1, 1, 1, 2), 8, 0, process=1, processes=2))


def test_one_of_several_captions_is_drawn(open_numbered: Opener) -> None:
    epochs = take_epochs(plan_batches(open_numbered(4, captions=3), 4, 0), 90)
    for record in range(4):
        drawn = Counter(draw.caption for draws in epochs for draw in draws if number(draw) == record)
        assert sorted(drawn) == [0, 1, 2]
        assert min(drawn.values()) > 15


def test_evaluation_covers_every_record_once(tmp_path: Path) -> None:
    records = open_records(str(write_table(tmp_path / "rows.jsonl", 23, 2)), DataConfig(train=""))
    assert isinstance(records, Records)
    shares = [list(plan_evaluation(records, 4, process, 2)) for process in range(2)]
    draws = [draw for plans in shares for plan in plans for draw in plan.draws]
    assert sorted(numbers(draws)) == list(range(23))
    assert {draw.caption for draw in draws} == {0}
    assert max(len(plan.draws) for plans in shares for plan in plans) == 4


# -- loading ---------------------------------------------------------------------------------------------------------


def same(first: RepresentationBatch, second: RepresentationBatch) -> bool:
    return all(torch.equal(getattr(first, f.name), getattr(second, f.name)) for f in fields(first))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("streaming", [False, True])
def test_workers_change_nothing(parts: Parts, bert: PreTrainedTokenizerBase, streaming: bool) -> None:
    config = DataConfig(train=parts.pictures, streaming=streaming)

    def loaded(workers: int) -> list[batches.Loaded]:
        records = open_records(parts.pictures, config)
        preparation = Preparation(records, RepresentationTexts(bert, 12), PREPROCESSING, train=True)
        return list(islice(load(plan_batches(records, 4, 0), preparation, workers), 9))

    alone, helped = loaded(0), loaded(2)
    for first, second in zip(alone, helped, strict=True):
        assert isinstance(first.batch, RepresentationBatch)
        assert isinstance(second.batch, RepresentationBatch)
        assert same(first.batch, second.batch)
        assert (first.keys, first.cut, first.position) == (second.keys, second.cut, second.position)
    assert sum(each.cut for each in alone) > 0


class Large(Dataset[tuple[torch.Tensor, str]]):
    def __getitem__(self, item: int) -> tuple[torch.Tensor, str]:
        return torch.full((3, 64, 64), item, dtype=torch.bfloat16), str(item)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("scarce", [False, True])
def test_shared_memory_that_is_too_small(small_disk: Callable[[int], Path], scarce: bool) -> None:
    """Docker's is 64 MB. A batch of 24 KiB comes through the pipe where there are 64 KiB for two workers."""
    with pytest.MonkeyPatch.context() as patch:
        if scarce:
            patch.setattr(loading, "SHARED_MEMORY", str(small_disk(64)))
        made = list(load(iter(range(9)), Large(), 2))
    assert [(float(tensor[0, 0, 0]), name) for tensor, name in made] == [(float(i), str(i)) for i in range(9)]
    assert all(tensor.is_shared() is not scarce and tensor.shape == (3, 64, 64) for tensor, _ in made)


def rows_of(folder: Path, rows: list[dict]) -> Records:
    """A table beside the pictures of the parts."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = open_records(str(path), DataConfig(train=""))
    assert isinstance(records, Records)
    return records


def broken_rows(parts: Parts, folder: Path) -> list[dict]:
    (folder / "text.jpg").write_text("not an image")
    return [
        {"image": str(folder / "missing.png"), "caption": "a"},
        {"image": str(folder / "text.jpg"), "caption": "a"},
        {"image": None, "caption": "a"},
        {"image": str(Path(parts.pictures).parent / "blue-disc-0.png"), "caption": None},
        {"image": str(Path(parts.pictures).parent / "blue-disc-1.png"), "caption": " "},
    ]


def good_rows(parts: Parts) -> list[dict]:
    names = ("red-disc-0.png", "red-square-0.png", "green-stripe-1.png")
    return [{"image": str(Path(parts.pictures).parent / name), "caption": name[:3]} for name in names]


WHY = ("cannot be read", "is not an image", "has no image", "has no caption", "has no caption")


def test_broken_records_are_replaced(parts: Parts, bert: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    records = rows_of(tmp_path, broken_rows(parts, tmp_path) + good_rows(parts))
    preparation = Preparation(records, RepresentationTexts(bert, 12), PREPROCESSING, train=True)
    loaded = preparation[next(plan_batches(records, 8, 0))]
    skipped = sorted(loaded.skipped, key=str)
    assert len(skipped) == len(WHY)
    assert [one.cause for one in skipped] == ["image", "image", "image", "caption", "caption"]
    for row, (message, why) in enumerate(zip(map(str, skipped), WHY, strict=True)):
        assert f"row {row}" in message
        assert why in message
        assert "\n" not in message
    assert sorted(key.split("row ")[1][0] for key in loaded.keys) == ["5", "6", "7"]
    batch = loaded.batch
    assert isinstance(batch, RepresentationBatch)
    assert len(batch.images) == 8
    # Copies are known as copies, so that they are not each other's negatives.
    assert sorted(Counter(batch.image_ids.tolist()).values()) == [2, 3, 3]
    assert set(batch.image_ids.tolist()) == {records[i].image_id for i in (5, 6, 7)}
    for i in range(8):
        for j in range(8):
            equal = torch.equal(batch.images[i], batch.images[j]) and torch.equal(batch.ids[i], batch.ids[j])
            assert equal == (batch.image_ids[i] == batch.image_ids[j])


def test_evaluation_leaves_broken_records_out(parts: Parts, bert: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    records = rows_of(tmp_path, broken_rows(parts, tmp_path) + good_rows(parts))
    preparation = Preparation(records, RepresentationTexts(bert, 12), PREPROCESSING, train=False)
    (loaded,) = load(plan_evaluation(records, 8), preparation, 0)
    assert len(loaded.skipped) == 5
    assert isinstance(loaded.batch, RepresentationBatch)
    expected = torch.stack([to_pixels(read_image(str(records[i].image)), PREPROCESSING) for i in (5, 6, 7)])
    assert torch.equal(loaded.batch.images, expected)
    captions = bert.batch_decode(loaded.batch.ids, skip_special_tokens=True)
    assert [caption.replace(" ", "") for caption in captions] == ["red", "red", "gre"]


@pytest.mark.parametrize("train", [True, False])
def test_nothing_but_broken_records(parts: Parts, bert: PreTrainedTokenizerBase, tmp_path: Path, train: bool) -> None:
    records = rows_of(tmp_path, broken_rows(parts, tmp_path))
    preparation = Preparation(records, RepresentationTexts(bert, 12), PREPROCESSING, train)
    plan = next(plan_batches(records, 5, 0))
    loaded = preparation[plan]
    assert (loaded.batch, loaded.keys, loaded.cut, loaded.position) == (None, (), 0, plan.position)
    assert len(loaded.skipped) == 5


def test_every_epoch_augments_anew(parts: Parts, bert: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    records = rows_of(tmp_path, good_rows(parts)[:1])
    plans = list(islice(plan_batches(records, 1, 0), 2))

    def images(plan: Plan, smallest_crop: float) -> torch.Tensor:
        texts = RepresentationTexts(bert, 12)
        return Preparation(records, texts, PREPROCESSING, True, smallest_crop, flip=False)[plan].batch.images

    assert torch.equal(images(plans[0], 0.5), images(plans[0], 0.5))
    assert not torch.equal(images(plans[0], 0.5), images(plans[1], 0.5))
    whole = to_pixels(read_image(str(records[0].image)), PREPROCESSING)
    assert torch.equal(images(plans[0], 1.0)[0], whole)


def test_to_device(bert: PreTrainedTokenizerBase) -> None:
    texts = RepresentationTexts(bert, 6)
    batch, _ = texts(torch.rand(1, 3, 8, 8), ["ab"], [""], torch.arange(1), np.random.default_rng(0))
    moved = to_device(batch, torch.device("meta"))
    assert {getattr(moved, f.name).device.type for f in fields(moved)} == {"meta"}

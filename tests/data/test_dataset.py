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
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from blip2.backbones.vision import Preprocessing
from blip2.config import DataConfig
from blip2.data import sampler, workers
from blip2.data.collate import CausalLMCollator, Stage1Collator
from blip2.data.dataset import BatchDataset, LoadedBatch, to_device
from blip2.data.images import preprocess, read_image
from blip2.data.positions import SourcePosition
from blip2.data.records import Records, RecordStream
from blip2.data.sampler import BatchSpec, SampleSpec, sample_batches, sequential_batches
from blip2.data.sources import open_records
from blip2.data.workers import prefetch
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
    monkeypatch.setattr(sampler, "WINDOW", 2)


def number(sample: SampleSpec) -> int:
    return sample.record if isinstance(sample.record, int) else int(Path(str(sample.record.image)).stem)


def take_epochs(specs: Iterator[BatchSpec], count: int) -> list[list[SampleSpec]]:
    """All samples of the first epochs."""
    out: list[list[SampleSpec]] = [[] for _ in range(count)]
    for spec in specs:
        epochs = [sample.seed[1] for sample in spec.samples]
        if min(epochs) >= count:
            return out
        for sample, epoch in zip(spec.samples, epochs, strict=True):
            if epoch < count:
                out[epoch].append(sample)
    raise AssertionError("specs ended")


def numbers(samples: Iterable[SampleSpec]) -> list[int]:
    return [number(sample) for sample in samples]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("count", [24, 23, 17, 4])
def test_every_record_once_an_epoch(open_numbered: Opener, grouped: bool, count: int) -> None:
    specs = list(islice(sample_batches(open_numbered(count), 4, 0, grouped), 30))
    assert all(len(spec.samples) == 4 for spec in specs)
    epochs = take_epochs(iter(specs), 3)
    for samples in epochs:
        assert sorted(numbers(samples)) == list(range(count))
    if count > 4:
        assert numbers(epochs[0]) != numbers(epochs[1]) != numbers(epochs[2])


def test_an_epoch_ends_before_the_next_begins(open_numbered: Opener) -> None:
    """But for the one batch that has of both."""
    epochs = [
        {sample.seed[1] for sample in spec.samples} for spec in islice(sample_batches(open_numbered(23), 4, 0), 23)
    ]
    assert [sorted(each) for each in epochs[:6]] == [[0]] * 5 + [[0, 1]]
    assert sum(len(each) == 2 for each in epochs) == 3  # 92 records are four epochs
    assert all(max(one) <= min(other) for one, other in pairwise(epochs))


def test_tables_are_shuffled_as_a_whole(tmp_path: Path) -> None:
    records = open_records(str(write_table(tmp_path / "rows.jsonl", 80)), DataConfig(train=""))
    first = next(sample_batches(records, 4, 0, group_by_length=False))
    assert max(number(sample) for sample in first.samples) > 8  # the first window of the file


def test_plans_follow_from_the_seed(open_numbered: Opener) -> None:
    first, again, other = (
        list(islice(sample_batches(open_numbered(23, captions=3), 4, seed), 20)) for seed in (5, 5, 6)
    )
    assert first == again
    assert [spec.samples for spec in first] != [spec.samples for spec in other]
    assert len({sample.seed for spec in first for sample in spec.samples}) == 80  # every augmentation has its own


def test_batches_of_like_length(open_numbered: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "WINDOW", 8)

    def spread(grouped: bool) -> float:
        specs = islice(sample_batches(open_numbered(64), 4, 0, grouped), 32)
        lengths = [[1 + 7 * number(sample) % 29 for sample in spec.samples] for spec in specs]
        return sum(max(each) - min(each) for each in lengths) / len(lengths)

    assert spread(True) < spread(False) / 3


def test_records_without_captions_are_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of nothing else could not be trained on."""
    monkeypatch.setattr(sampler, "WINDOW", 16)
    rows = [{"image": f"{i}.png", "caption": "word " * (i % 7) if i % 4 else None} for i in range(64)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    specs = islice(sample_batches(open_records(str(path), DataConfig(train="")), 4, 0), 64)
    assert max(sum(sample.caption_index < 0 for sample in spec.samples) for spec in specs) < 4


def test_answers_are_never_grouped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By length, each batch would hold one of the two answers alone."""
    monkeypatch.setattr(sampler, "WINDOW", 8)
    rows = [{"image": f"{i}.png", "question": "Is it?", "answer": ("no", "yes")[i % 2]} for i in range(256)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for streaming in (False, True):
        records = open_records(str(path), DataConfig(train=str(path), streaming=streaming))
        for spec in islice(sample_batches(records, 32, 0), 8):
            assert len({number(sample) % 2 for sample in spec.samples}) == 2


def test_order_of_lengths_is_random(open_numbered: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted batches must not come in the order of their lengths."""
    monkeypatch.setattr(sampler, "WINDOW", 16)
    specs = islice(sample_batches(open_numbered(64), 4, 0), 16)
    lengths = [max(1 + 7 * number(sample) % 29 for sample in spec.samples) for spec in specs]
    assert lengths != sorted(lengths)
    assert lengths != sorted(lengths, reverse=True)


@pytest.mark.parametrize("count", [24, 31])
def test_processes_share_the_records(open_numbered: Opener, count: int) -> None:
    """Also those that cannot be dealt out evenly, in batches of one size."""
    shares = []
    for process in range(2):
        specs = list(islice(sample_batches(open_numbered(count, 1, process, 2), 4, 0, True, process, 2), 24))
        assert all(len(spec.samples) == 4 for spec in specs)
        shares.append(take_epochs(iter(specs), 4))
    for first, second in zip(*shares, strict=True):
        assert first and second
        assert sorted(numbers(first) + numbers(second)) == list(range(count))


@pytest.mark.parametrize("count", [24, 23, 3])
def test_going_on_from_any_position(open_numbered: Opener, count: int) -> None:
    specs = list(islice(sample_batches(open_numbered(count, 2), 4, 0), 20))
    for done, spec in enumerate(specs, 1):
        position = json.loads(json.dumps(spec.position))
        rest = list(islice(sample_batches(open_numbered(count, 2), 4, 0, position=position), len(specs) - done))
        assert rest == specs[done:]


def test_memory_is_flat(open_numbered: Opener) -> None:
    specs = sample_batches(open_numbered(2000), 4, 0)

    def take(count: int) -> int:
        for _ in islice(specs, count):
            pass
        gc.collect()  # type checks leave cycles behind
        return tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0

    tracemalloc.start()
    try:
        sizes = [take(25) for _ in range(5)]
    finally:
        tracemalloc.stop()
    # What is made once, here or by a thread of another test, can fall into any of the differences, but not into all.
    assert min(after - before for before, after in pairwise(sizes)) < 2_500  # 25 specs take four times as much


@pytest.mark.parametrize("process", [0, 1])
def test_going_on_in_one_of_two_processes(open_numbered: Opener, process: int) -> None:
    def specs(position: SourcePosition | None = None) -> Iterator[BatchSpec]:
        return sample_batches(open_numbered(29, 1, process, 2), 4, 0, True, process, 2, position)

    first = list(islice(specs(), 8))
    for done, spec in enumerate(first, 1):
        assert list(islice(specs(spec.position), 8 - done)) == first[done:]


@pytest.mark.parametrize("open_numbered", ["table"], indirect=True)
def test_fewer_records_than_a_batch(open_numbered: Opener) -> None:
    for spec in islice(sample_batches(open_numbered(3), 8, 0), 4):
        assert sorted(numbers(spec.samples)) == [0, 1, 2]


@pytest.mark.parametrize("open_numbered", ["stream"], indirect=True)
def test_a_short_stream_fills_a_batch_by_going_round(open_numbered: Opener) -> None:
    """How many records it has it does not know."""
    specs = list(islice(sample_batches(open_numbered(3), 8, 0), 3))
    assert [len(spec.samples) for spec in specs] == [8, 8, 8]
    drawn = sorted((sample.seed[1], number(sample)) for spec in specs for sample in spec.samples)
    assert drawn == [(epoch, record) for epoch in range(8) for record in range(3)]


@pytest.mark.parametrize("open_numbered", ["stream"], indirect=True)
def test_a_stream_that_has_nothing_any_more(open_numbered: Opener, tmp_path: Path) -> None:
    records = open_numbered(5)
    (tmp_path / "5-1.jsonl").write_text("")
    with pytest.raises(InputError, match="the shards of this process have no records"):
        next(sample_batches(records, 2, 0))


@pytest.mark.parametrize("open_numbered", ["table"], indirect=True)
def test_fewer_records_than_processes(open_numbered: Opener) -> None:
    with pytest.raises(InputError, match=r"expected at least one for each process"):
        next(sample_batches(open_numbered(1, 1, 1, 2), 8, 0, rank=1, world_size=2))


def test_one_of_several_captions_is_drawn(open_numbered: Opener) -> None:
    epochs = take_epochs(sample_batches(open_numbered(4, captions=3), 4, 0), 90)
    for record in range(4):
        drawn = Counter(sample.caption_index for samples in epochs for sample in samples if number(sample) == record)
        assert sorted(drawn) == [0, 1, 2]
        assert min(drawn.values()) > 15


def test_evaluation_covers_every_record_once(tmp_path: Path) -> None:
    records = open_records(str(write_table(tmp_path / "rows.jsonl", 23, 2)), DataConfig(train=""))
    assert isinstance(records, Records)
    shares = [list(sequential_batches(records, 4, process, 2)) for process in range(2)]
    samples = [sample for specs in shares for spec in specs for sample in spec.samples]
    assert sorted(numbers(samples)) == list(range(23))
    assert {sample.caption_index for sample in samples} == {0}
    assert max(len(spec.samples) for specs in shares for spec in specs) == 4


# -- loading ---------------------------------------------------------------------------------------------------------


def same(first: RepresentationBatch, second: RepresentationBatch) -> bool:
    return all(torch.equal(getattr(first, f.name), getattr(second, f.name)) for f in fields(first))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("streaming", [False, True])
def test_workers_change_nothing(parts: Parts, bert: PreTrainedTokenizerBase, streaming: bool) -> None:
    config = DataConfig(train=parts.images, streaming=streaming)

    def loaded(num_workers: int) -> list[LoadedBatch]:
        records = open_records(parts.images, config)
        dataset = BatchDataset(records, Stage1Collator(bert, 12), PREPROCESSING, train=True)
        return list(islice(prefetch(sample_batches(records, 4, 0), dataset, num_workers), 9))

    alone, helped = loaded(0), loaded(2)
    for first, second in zip(alone, helped, strict=True):
        assert isinstance(first.batch, RepresentationBatch)
        assert isinstance(second.batch, RepresentationBatch)
        assert same(first.batch, second.batch)
        assert (first.keys, first.num_truncated, first.position) == (second.keys, second.num_truncated, second.position)
    assert sum(each.num_truncated for each in alone) > 0


class Large(Dataset[tuple[torch.Tensor, str]]):
    def __getitem__(self, item: int) -> tuple[torch.Tensor, str]:
        return torch.full((3, 64, 64), item, dtype=torch.bfloat16), str(item)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("scarce", [False, True])
def test_shared_memory_that_is_too_small(small_disk: Callable[[int], Path], scarce: bool) -> None:
    """Docker's is 64 MB. A batch of 24 KiB comes through the pipe where there are 64 KiB for two workers."""
    with pytest.MonkeyPatch.context() as patch:
        if scarce:
            patch.setattr(workers, "SHARED_MEMORY", str(small_disk(64)))
        made = list(prefetch(iter(range(9)), Large(), 2))
    assert [(float(tensor[0, 0, 0]), name) for tensor, name in made] == [(float(i), str(i)) for i in range(9)]
    assert all(tensor.is_shared() is not scarce and tensor.shape == (3, 64, 64) for tensor, _ in made)


def rows_of(folder: Path, rows: list[dict]) -> Records:
    """A table beside the images of the parts."""
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
        {"image": str(Path(parts.images).parent / "blue-disc-0.png"), "caption": None},
        {"image": str(Path(parts.images).parent / "blue-disc-1.png"), "caption": " "},
    ]


def good_rows(parts: Parts) -> list[dict]:
    names = ("red-disc-0.png", "red-square-0.png", "green-stripe-1.png")
    return [{"image": str(Path(parts.images).parent / name), "caption": name[:3]} for name in names]


WHY = ("cannot be read", "is not an image", "has no image", "has no caption", "has no caption")


def test_broken_records_are_replaced(parts: Parts, bert: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    records = rows_of(tmp_path, broken_rows(parts, tmp_path) + good_rows(parts))
    dataset = BatchDataset(records, Stage1Collator(bert, 12), PREPROCESSING, train=True)
    loaded = dataset[next(sample_batches(records, 8, 0))]
    skipped = sorted(loaded.skipped, key=str)
    assert len(skipped) == len(WHY)
    assert [one.reason for one in skipped] == ["image", "image", "image", "caption", "caption"]
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
    dataset = BatchDataset(records, Stage1Collator(bert, 12), PREPROCESSING, train=False)
    (loaded,) = prefetch(sequential_batches(records, 8), dataset, 0)
    assert len(loaded.skipped) == 5
    assert isinstance(loaded.batch, RepresentationBatch)
    expected = torch.stack([preprocess(read_image(str(records[i].image)), PREPROCESSING) for i in (5, 6, 7)])
    assert torch.equal(loaded.batch.images, expected)
    captions = bert.batch_decode(loaded.batch.ids, skip_special_tokens=True)
    assert [caption.replace(" ", "") for caption in captions] == ["red", "red", "gre"]


@pytest.mark.parametrize("stage", ["representation", "generation"])
def test_blank_texts_are_skipped_in_both_stages(
    parts: Parts, bert: PreTrainedTokenizerBase, tmp_path: Path, stage: str
) -> None:
    collator = Stage1Collator(bert, 12, "lavis")
    if stage == "generation":
        collator = CausalLMCollator(AutoTokenizer.from_pretrained(parts.llama), 12, "", END, normalization="lavis")
    image = good_rows(parts)[0]["image"]
    questions = [("which?", "red"), (" ", "red"), ("which?", " "), ("which?", ["", "red"])]
    pairs = ["red", "", " ", "...", ["*", "..."]]
    for rows, expected in (
        (
            [{"question": question, "answers": answer} for question, answer in questions],
            [(1, "question"), (2, "caption")],
        ),
        ([{"caption": text} for text in pairs], [(n, "caption") for n in range(1, 5)]),
    ):
        (tmp_path / stage).mkdir(exist_ok=True)
        records = rows_of(tmp_path / stage, [{"image": image, **row} for row in rows])
        loaded = BatchDataset(records, collator, PREPROCESSING, train=False)[next(sequential_batches(records, 8))]
        assert [(record.key, record.reason) for record in loaded.skipped] == [
            (records[n].key, reason) for n, reason in expected
        ]
        assert len(loaded.keys) == len(rows) - len(expected)


@pytest.mark.parametrize("train", [True, False])
def test_nothing_but_broken_records(parts: Parts, bert: PreTrainedTokenizerBase, tmp_path: Path, train: bool) -> None:
    records = rows_of(tmp_path, broken_rows(parts, tmp_path))
    dataset = BatchDataset(records, Stage1Collator(bert, 12), PREPROCESSING, train)
    spec = next(sample_batches(records, 5, 0))
    loaded = dataset[spec]
    assert (loaded.batch, loaded.keys, loaded.num_truncated, loaded.position) == (None, (), 0, spec.position)
    assert len(loaded.skipped) == 5


def test_every_epoch_augments_anew(parts: Parts, bert: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    records = rows_of(tmp_path, good_rows(parts)[:1])
    specs = list(islice(sample_batches(records, 1, 0), 2))

    def images(spec: BatchSpec, min_crop_scale: float) -> torch.Tensor:
        texts = Stage1Collator(bert, 12)
        return BatchDataset(records, texts, PREPROCESSING, True, min_crop_scale, horizontal_flip=False)[
            spec
        ].batch.images

    assert torch.equal(images(specs[0], 0.5), images(specs[0], 0.5))
    assert not torch.equal(images(specs[0], 0.5), images(specs[1], 0.5))
    whole = preprocess(read_image(str(records[0].image)), PREPROCESSING)
    assert torch.equal(images(specs[0], 1.0)[0], whole)


def test_to_device(bert: PreTrainedTokenizerBase) -> None:
    texts = Stage1Collator(bert, 6)
    batch, _ = texts(torch.rand(1, 3, 8, 8), ["ab"], [""], torch.arange(1), np.random.default_rng(0))
    moved = to_device(batch, torch.device("meta"))
    assert {getattr(moved, f.name).device.type for f in fields(moved)} == {"meta"}

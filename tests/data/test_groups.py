"""Records of a group come in one batch (``data.group_column``)."""

import json
from collections import Counter
from itertools import islice

import pytest

from blip2.config import DataConfig
from blip2.data.records import Records
from blip2.data.sampler import sample_batches
from blip2.data.sources import open_records
from blip2.errors import InputError

SIZE = 4


def grouped(folder, count: int, share: float = 1.0) -> Records:
    path = folder / "grouped.jsonl"
    rows = [{"image": f"{i}.png", "caption": "word " * (1 + i % 7), "group": f"g{i // SIZE}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = open_records(str(path), DataConfig(train=str(path), group_column="group", group_share=share))
    assert isinstance(records, Records)
    return records


def batches(records: Records, size: int, count: int, **settings) -> list[list[int]]:
    specs = islice(sample_batches(records, size, 0, **settings), count)
    return [[sample.record for sample in spec.samples] for spec in specs]  # pyright: ignore


def test_groups_stay_together_and_every_record_comes_once_an_epoch(tmp_path):
    found = batches(grouped(tmp_path, 64), 8, 16)
    for batch in found:
        assert set(Counter(record // SIZE for record in batch).values()) == {SIZE}
    for epoch in (found[:8], found[8:]):
        assert sorted(record for batch in epoch for record in batch) == list(range(64))
    partners = [{frozenset(record // SIZE for record in batch) for batch in epoch} for epoch in (found[:8], found[8:])]
    assert partners[0] != partners[1]  # other groups meet in the next epoch


def test_records_with_an_empty_cell_are_no_group(tmp_path):
    path = tmp_path / "grouped.csv"
    path.write_text("image,caption,group\n" + "".join(f"{i}.png,a,{'' if i % 2 else i // 4}\n" for i in range(8)))
    records = open_records(str(path), DataConfig(train=str(path), group_column="group"))
    ids = records.group_ids.tolist()  # pyright: ignore
    assert ids[0] == ids[2] != ids[4] == ids[6]
    assert len(set(ids)) == 2 + 4


def test_processes_share_groups(tmp_path):
    records = grouped(tmp_path, 64)
    both = [batches(records, 4, 8, rank=process, world_size=2) for process in (0, 1)]
    for ours, theirs in zip(*both, strict=True):
        assert set(Counter(record // SIZE for record in ours + theirs).values()) == {SIZE}


def test_batches_are_entered_anywhere(tmp_path):
    records = grouped(tmp_path, 64)
    specs = list(islice(sample_batches(records, 8, 0), 12))
    again = list(islice(sample_batches(records, 8, 0, position=specs[4].position), 7))
    assert [spec.samples for spec in again] == [spec.samples for spec in specs[5:]]


def test_a_share_of_the_groups_stays_together(tmp_path):
    records = grouped(tmp_path, 400, share=0.5)
    found = batches(records, 400, 2)
    kept = []
    for order in found:
        assert sorted(order) == list(range(400))
        blocks = [order[i : i + SIZE] for i in range(len(order) - SIZE + 1)]
        kept.append({block[0] // SIZE for block in blocks if len({record // SIZE for record in block}) == 1})
    assert all(35 <= len(each) <= 65 for each in kept) and kept[0] != kept[1]


def test_a_stream_cannot_be_grouped(tmp_path):
    grouped(tmp_path, 8)
    with pytest.raises(InputError, match=r"group_column is group.* is read as a stream"):
        open_records(
            str(tmp_path / "grouped.jsonl"),
            DataConfig(train="x", group_column="group", streaming=True),
        )

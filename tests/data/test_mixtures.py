"""Several sources as one."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from blip2.config import DataConfig
from blip2.data import sampler
from blip2.data.mixtures import MixtureSource, build_mixture, resume_mixture, sample_mixture
from blip2.data.positions import MixturePosition, is_position
from blip2.data.records import Records, RecordStream
from blip2.data.sampler import BatchSpec
from blip2.data.sources import open_records
from blip2.errors import InputError

SIZES = {"a": 23, "b": 10, "c": 41}
STREAMED = "c"


@pytest.fixture(autouse=True)
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "WINDOW", 2)


def open_all(folder: Path, process: int = 0, processes: int = 1) -> list[Records | RecordStream]:
    """Two tables and a stream in two files; record i of a source has the caption NAME i."""
    opened = []
    for name, size in SIZES.items():
        source = folder / name / "*.jsonl"
        if not source.parent.exists():
            source.parent.mkdir()
            rows = [json.dumps({"image": "x.png", "caption": f"{name} {i}"}) + "\n" for i in range(size)]
            (source.parent / "0.jsonl").write_text("".join(rows[:20]))
            (source.parent / "1.jsonl").write_text("".join(rows[20:]))
        config = DataConfig(train="", streaming=name == STREAMED)
        opened.append(open_records(str(source), config, process, processes))
    return opened


WEIGHTS: dict[str, float | None] = {"a": 3.0, "b": 1.0, "c": 2.0}


def specs(folder: Path, process: int = 0, processes: int = 1, **settings: Any) -> Iterator[BatchSpec]:
    sources = build_mixture(WEIGHTS, open_all(folder, process, processes))
    return sample_mixture(sources, 4, 7, rank=process, world_size=processes, **settings)


def drawn(folder: Path, some: list[BatchSpec]) -> Counter[tuple[int, int, str]]:
    """How often each (source, epoch, caption) is drawn."""
    tables = open_all(folder)
    found: Counter[tuple[int, int, str]] = Counter()
    for spec in some:
        records = tables[spec.source_index]
        for sample in spec.samples:
            record = records[sample.record] if isinstance(records, Records) else sample.record
            found[spec.source_index, sample.seed[1], record.captions[0]] += 1
    return found


def test_a_batch_is_of_one_source_and_sources_as_often_as_their_weights(tmp_path: Path) -> None:
    some = list(islice(specs(tmp_path), 600))
    for (source, _, caption), times in drawn(tmp_path, some).items():
        assert caption[0] == "abc"[source]
        assert times == 1  # not twice in an epoch
    shares = Counter(spec.source_index for spec in some)
    # Three standard deviations of 600 samples.
    for source, share in enumerate((3 / 6, 1 / 6, 2 / 6)):
        assert shares[source] == pytest.approx(600 * share, abs=3 * (600 * share * (1 - share)) ** 0.5)


@pytest.mark.parametrize("processes", [1, 2])
def test_each_source_goes_through_its_own_epochs(tmp_path: Path, processes: int) -> None:
    found: Counter[tuple[int, int, str]] = Counter()
    for process in range(processes):
        found += drawn(tmp_path, list(islice(specs(tmp_path, process, processes), 90)))
    epochs = [max(epoch for source, epoch, _ in found if source == which) for which in range(3)]
    assert min(epochs) > 1 and len(set(epochs)) > 1
    assert set(found.values()) == {1}
    for which, (name, size) in enumerate(SIZES.items()):
        for epoch in range(epochs[which] - 1):  # the last may not be through, in one of the processes
            assert {c for source, e, c in found if (source, e) == (which, epoch)} == {
                f"{name} {i}" for i in range(size)
            }


def test_sources_of_one_size_have_orders_of_their_own(tmp_path: Path) -> None:
    """Otherwise views of the same images, one after the other, would give batch after batch of the same images."""
    records, *_ = open_all(tmp_path)
    first, second = orders = ([], [])
    for spec in islice(sample_mixture(build_mixture({"x": 1.0, "y": 1.0}, [records] * 2), 4, 7, False), 60):
        orders[spec.source_index].extend(sample.record for sample in spec.samples if sample.seed[1] == 0)
    assert sorted(first) == sorted(second) == list(range(len(records)))
    assert first != second


def test_all_processes_draw_from_one_source(tmp_path: Path) -> None:
    first, second = ([p.source_index for p in islice(specs(tmp_path, process, 2), 60)] for process in range(2))
    assert first == second
    assert set(first) == {0, 1, 2}


def test_the_batches_of_a_step_are_of_one_source(tmp_path: Path) -> None:
    of = [spec.source_index for spec in islice(specs(tmp_path, gradient_accumulation_steps=3), 60)]
    assert of[0::3] == of[1::3] == of[2::3]
    assert of[0::3] == [spec.source_index for spec in islice(specs(tmp_path), 20)]


@pytest.mark.parametrize(("process", "processes"), [(0, 1), (1, 2)])
def test_going_on_from_any_position(tmp_path: Path, process: int, processes: int) -> None:
    def samples(some: list[BatchSpec]) -> list[Any]:
        return [(spec.source_index, spec.samples) for spec in some]

    def resume(spec: BatchSpec, number: int) -> list[BatchSpec]:
        position = json.loads(json.dumps(spec.position))
        return list(islice(specs(tmp_path, process, processes, position=position), number))

    every = list(islice(specs(tmp_path, process, processes), 32))
    for done in range(1, 28, 9):
        rest = resume(every[done - 1], 32 - done)
        assert samples(rest) == samples(every[done:])
        again = resume(rest[2], 32 - done - 3)  # the library writes one place down in more than one way
        assert samples(again) == samples(rest[3:])


# -- going on in another way -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How some batches are taken."""

    steps: int
    processes: int = 1
    batch_size: int = 4
    accumulate: int = 1
    group_by_length: bool = True


def take(folder: Path, ways: list[Way], weights: dict[str, float | None]) -> tuple[list[BatchSpec], list[list[str]]]:
    """All specs of one way after the other, and what each says when it goes on where the one before ended."""
    ends: list[MixturePosition] = []
    taken: list[BatchSpec] = []
    said: list[list[str]] = []
    for way in ways:
        before, ends = json.loads(json.dumps(ends)), []
        for process in range(way.processes):
            named = dict(zip(SIZES, open_all(folder, process, way.processes), strict=True))
            sources = build_mixture(weights, [named[name] for name in weights])
            settings = (way.batch_size, 7, way.group_by_length, process, way.processes, way.accumulate)
            position, lines = resume_mixture(before, sources, *settings) if before else (None, [])
            specs = list(islice(sample_mixture(sources, *settings, position), way.steps * way.accumulate))
            taken += specs
            ends.append(specs[-1].position)
            assert is_position(ends[-1])
        said.append(lines)
    return taken, said


WAYS = {
    "another batch": [Way(3), Way(2, batch_size=3), Way(30, batch_size=5)],
    "fewer processes": [Way(3, 3), Way(4, 2), Way(24)],
    "more processes": [Way(5), Way(1, 2), Way(12, 3, batch_size=2)],
    "both, again and again": [Way(2, 2, 2), Way(1, 3, 1), Way(2, 1, 3), Way(1, 4, 1), Way(1, 3, 2), Way(9, 2, 3)],
    "across an epoch": [Way(9, 2), Way(7, 1, 3), Way(8, 3, 2), Way(15, 2)],
    "other batches of one size": [Way(3), Way(20, group_by_length=False)],
    "other steps": [Way(3, accumulate=3), Way(5, accumulate=2), Way(20)],
}


@pytest.mark.parametrize("source", ["a", "c"])  # a table and a stream
@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
def test_every_record_once_an_epoch_whatever_changes(tmp_path: Path, source: str, ways: list[Way]) -> None:
    taken, said = take(tmp_path, ways, {source: 1.0})
    found: Counter[tuple[int, str]] = Counter()
    records = dict(zip(SIZES, open_all(tmp_path), strict=True))[source]
    for spec in taken:
        for sample in spec.samples:
            record = records[sample.record] if isinstance(records, Records) else sample.record
            found[sample.seed[1], record.captions[0]] += 1
    assert set(found.values()) == {1}
    last = max(epoch for epoch, _ in found)
    assert last >= 1
    for epoch in range(last):  # the last is not through
        # A process of a stream that has less of an epoch than others is ahead of them.
        missing = SIZES[source] - sum(e == epoch for e, _ in found)
        assert missing == 0 or (source == STREAMED and epoch == last - 1)
    for before, way, lines in zip(ways, ways[1:], said[1:], strict=False):
        dealt = replace(before, steps=0, accumulate=0) != replace(way, steps=0, accumulate=0)
        assert bool(lines) == dealt
        if dealt:
            assert lines[0].startswith(
                f"{source}: continues with the remaining records of the epoch, which are redistributed ("
            )
            assert len(lines) == 1 and "\n" not in lines[0]


def test_what_has_changed_is_said(tmp_path: Path) -> None:
    _, said = take(tmp_path, [Way(9, 2, 4), Way(1, 1, 3)], {"a": 1.0, "b": 1.0})
    assert said[1] == [
        "a, b: continues with the remaining records of the epoch, which are redistributed"
        " (batch_size from 4 to 3, processes from 2 to 1)"
    ]


def test_a_mixture_is_dealt_out_anew_source_by_source(tmp_path: Path) -> None:
    taken, _ = take(tmp_path, [Way(9, 2), Way(7, 3, 3, 2), Way(40, 1, 5, 3)], WEIGHTS)
    found = drawn(tmp_path, taken)
    assert set(found.values()) == {1}
    for which, (name, size) in enumerate(SIZES.items()):
        epochs = max(epoch for source, epoch, _ in found if source == which)
        assert epochs >= 2
        for epoch in range(epochs - 1):
            assert sum((source, e) == (which, epoch) for source, e, _ in found) == size, name
    # All batches of a step are of one source, in every process.
    for specs, accumulate in ((taken[18 + 14 * p : 32 + 14 * p] for p in range(3)), 2), ((taken[60:],), 3):
        steps = [[spec.source_index for spec in each] for each in specs]
        assert all(step == steps[0] for step in steps)
        assert all(len(set(steps[0][i : i + accumulate])) == 1 for i in range(0, len(steps[0]), accumulate))


def test_a_source_without_a_batch_between_two_changes(tmp_path: Path) -> None:
    """Redistributed twice, with a save in between from which the settings of the first change must be known."""
    ways = [Way(9, 2), Way(1, 3, 2), Way(1, 2, 3), Way(40, 1, 5)]
    taken, said = take(tmp_path, ways, WEIGHTS)
    assert all(lines[0].startswith("a, b, c: ") for lines in said[1:])
    found = drawn(tmp_path, taken)
    assert set(found.values()) == {1}
    assert {source for source, _, _ in drawn(tmp_path, taken[18:22])} < {0, 1, 2}
    for which, (name, size) in enumerate(SIZES.items()):
        epochs = max(epoch for source, epoch, _ in found if source == which)
        for epoch in range(epochs - 1):
            assert sum((source, e) == (which, epoch) for source, e, _ in found) == size, name


def test_going_on_from_a_dealing_anew_is_exact(tmp_path: Path) -> None:
    """A kill after the change costs nothing."""
    for weights in ({"a": 1.0}, {"c": 1.0}):
        whole, _ = take(tmp_path, [Way(3, 3), Way(12, 2, 3)], weights)
        for cut in (1, 7):
            parts, said = take(tmp_path, [Way(3, 3), Way(cut, 2, 3), Way(12 - cut, 2, 3)], weights)
            assert said[2] == []
            first, second = (parts[9 + p * cut : 9 + (p + 1) * cut] for p in range(2))
            rest = parts[9 + 2 * cut :]
            assert first + rest[: 12 - cut] == whole[9:21]
            assert second + rest[12 - cut :] == whole[21:]


def test_another_order_begins_the_next_epoch(tmp_path: Path) -> None:
    opened = open_all(tmp_path)
    sources = build_mixture(WEIGHTS, opened)
    before = list(islice(sample_mixture(sources, 4, 7), 40))
    position, lines = resume_mixture([before[-1].position], sources, 4, 8)
    assert lines == ["a, b, c: continues with the next epoch, because the order of the records changed (another seed)"]
    after = list(islice(sample_mixture(sources, 4, 8, position=position), 30))
    for which in range(3):
        last = max(sample.seed[1] for spec in before if spec.source_index == which for sample in spec.samples)
        assert (
            min(sample.seed[1] for spec in after if spec.source_index == which for sample in spec.samples) == last + 1
        )


def test_rows_that_were_moved_begin_the_next_epoch(tmp_path: Path) -> None:
    """There are as many records and shards as before, but their numbers mean others."""
    before = list(islice(sample_mixture(build_mixture(WEIGHTS, open_all(tmp_path)), 4, 7), 40))
    position = json.loads(json.dumps(before[-1].position))
    for name in ("a", "c"):  # a table and a stream
        (tmp_path / name / "1.jsonl").rename(tmp_path / name / "-1.jsonl")
    sources = build_mixture(WEIGHTS, open_all(tmp_path))
    _, lines = resume_mixture([position], sources, 4, 7)
    assert lines == ["a, c: continues with the next epoch, because the order of the records changed (other records)"]
    for each in position["sources"].values():  # as an older version stored it
        del each["order_settings"]["digest"]
    assert resume_mixture([position], sources, 4, 7)[1] == []


def test_a_source_that_is_gone_is_said(tmp_path: Path) -> None:
    opened = open_all(tmp_path)
    before = list(islice(sample_mixture(build_mixture(WEIGHTS, opened), 4, 7), 20))
    position, lines = resume_mixture([before[-1].position], build_mixture({"a": 1.0}, opened[:1]), 4, 7)
    assert lines == ["b, c: no longer in data.train, so the saved position is dropped"]
    assert set(position["sources"]) == {"a"}


def test_another_source_joins(tmp_path: Path) -> None:
    """What the position does not know begins at its start."""
    opened = open_all(tmp_path)
    before = list(islice(sample_mixture(build_mixture({"a": 1.0}, opened[:1]), 4, 7), 9))
    after = list(islice(sample_mixture(build_mixture(WEIGHTS, opened), 4, 7, position=before[-1].position), 40))
    assert set(drawn(tmp_path, before + after).values()) == {1}
    assert {spec.source_index for spec in after} == {0, 1, 2}


# -- weights -----------------------------------------------------------------------------------------------------------


def shares(sources: list[MixtureSource]) -> list[float]:
    return [round(source.probability, 6) for source in sources]


@pytest.mark.parametrize(
    ("weights", "temperature", "expected"),
    [
        ({"a": None, "b": None}, 1.0, [23 / 33, 10 / 33]),
        ({"a": None, "b": 23.0}, 1.0, [0.5, 0.5]),
        ({"a": 3.0, "b": 1.0}, 1.0, [0.75, 0.25]),
        ({"a": 9.0, "b": 1.0}, 2.0, [0.75, 0.25]),
        ({"a": 115e6, "b": 1e-3}, float("inf"), [0.5, 0.5]),
        ({"a": 9.0, "b": 0.0}, 2.0, [1.0, 0.0]),
        ({"c": None}, 1.0, [1.0]),
    ],
)
def test_shares(tmp_path: Path, weights: dict[str, float | None], temperature: float, expected: list[float]) -> None:
    named = dict(zip(SIZES, open_all(tmp_path), strict=True))
    found = build_mixture(weights, [named[name] for name in weights], temperature)
    assert shares(found) == [round(share, 6) for share in expected]
    assert [source.name for source in found] == list(weights)


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        ({"a": None, "c": None}, "no weight for c, which is a stream, .*: write its number of records as the weight"),
        ({"a": 0.0, "c": 0.0}, "expected at least one weight above 0"),
    ],
)
def test_weights_that_say_nothing(tmp_path: Path, weights: dict[str, float | None], why: str) -> None:
    named = dict(zip(SIZES, open_all(tmp_path), strict=True))
    with pytest.raises(InputError, match=why):
        build_mixture(weights, [named[name] for name in weights])

"""Several sources as one."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from blip2.config import DataConfig
from blip2.data import batches
from blip2.data.batches import Plan
from blip2.data.mixtures import Source, mix, plan_mixture, start_anew
from blip2.data.records import Records, RecordStream, open_records
from blip2.errors import InputError

SIZES = {"a": 23, "b": 10, "c": 41}
STREAMED = "c"


@pytest.fixture(autouse=True)
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "WINDOW", 2)


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


def plans(folder: Path, process: int = 0, processes: int = 1, **settings: Any) -> Iterator[Plan]:
    sources = mix(WEIGHTS, open_all(folder, process, processes))
    return plan_mixture(sources, 4, 7, process=process, processes=processes, **settings)


def drawn(folder: Path, some: list[Plan]) -> Counter[tuple[int, int, str]]:
    """How often each (source, epoch, caption) is drawn."""
    tables = open_all(folder)
    found: Counter[tuple[int, int, str]] = Counter()
    for plan in some:
        records = tables[plan.source]
        for draw in plan.draws:
            record = records[draw.record] if isinstance(records, Records) else draw.record
            found[plan.source, draw.seed[1], record.captions[0]] += 1
    return found


def test_a_batch_is_of_one_source_and_sources_as_often_as_their_weights(tmp_path: Path) -> None:
    some = list(islice(plans(tmp_path), 600))
    for (source, _, caption), times in drawn(tmp_path, some).items():
        assert caption[0] == "abc"[source]
        assert times == 1  # not twice in an epoch
    shares = Counter(plan.source for plan in some)
    # Three standard deviations of 600 draws.
    for source, share in enumerate((3 / 6, 1 / 6, 2 / 6)):
        assert shares[source] == pytest.approx(600 * share, abs=3 * (600 * share * (1 - share)) ** 0.5)


@pytest.mark.parametrize("processes", [1, 2])
def test_each_source_goes_through_its_own_epochs(tmp_path: Path, processes: int) -> None:
    found: Counter[tuple[int, int, str]] = Counter()
    for process in range(processes):
        found += drawn(tmp_path, list(islice(plans(tmp_path, process, processes), 90)))
    epochs = [max(epoch for source, epoch, _ in found if source == which) for which in range(3)]
    assert min(epochs) > 1 and len(set(epochs)) > 1
    assert set(found.values()) == {1}
    for which, (name, size) in enumerate(SIZES.items()):
        for epoch in range(epochs[which] - 1):  # the last may not be through, in one of the processes
            assert {c for source, e, c in found if (source, e) == (which, epoch)} == {
                f"{name} {i}" for i in range(size)
            }


def test_all_processes_draw_from_one_source(tmp_path: Path) -> None:
    first, second = ([p.source for p in islice(plans(tmp_path, process, 2), 60)] for process in range(2))
    assert first == second
    assert set(first) == {0, 1, 2}


def test_the_batches_of_a_step_are_of_one_source(tmp_path: Path) -> None:
    of = [plan.source for plan in islice(plans(tmp_path, accumulate=3), 60)]
    assert of[0::3] == of[1::3] == of[2::3]
    assert of[0::3] == [plan.source for plan in islice(plans(tmp_path), 20)]


@pytest.mark.parametrize(("process", "processes"), [(0, 1), (1, 2)])
def test_going_on_from_any_position(tmp_path: Path, process: int, processes: int) -> None:
    def draws(some: list[Plan]) -> list[Any]:
        return [(plan.source, plan.draws) for plan in some]

    def go_on(plan: Plan, number: int) -> list[Plan]:
        position = json.loads(json.dumps(plan.position))
        return list(islice(plans(tmp_path, process, processes, position=position), number))

    every = list(islice(plans(tmp_path, process, processes), 32))
    for done in range(1, 28, 9):
        rest = go_on(every[done - 1], 32 - done)
        assert draws(rest) == draws(every[done:])
        again = go_on(rest[2], 32 - done - 3)  # the library writes one place down in more than one way
        assert draws(again) == draws(rest[3:])


def test_another_number_of_processes_begins_new_epochs(tmp_path: Path) -> None:
    shares = [list(islice(plans(tmp_path, process, 2), 40)) for process in range(2)]
    seen = drawn(tmp_path, shares[0]) + drawn(tmp_path, shares[1])
    new = start_anew([share[-1].position for share in shares])
    assert new["number"] == 40
    went_on = drawn(tmp_path, list(islice(plans(tmp_path, position=new), 30)))
    for which in range(3):
        last = max(epoch for source, epoch, _ in seen if source == which)
        assert min(epoch for source, epoch, _ in went_on if source == which) == last + 1
    assert set((seen + went_on).values()) == {1}


def test_another_source_joins(tmp_path: Path) -> None:
    """What the position does not know begins at its start."""
    opened = open_all(tmp_path)
    before = list(islice(plan_mixture(mix({"a": 1.0}, opened[:1]), 4, 7), 9))
    after = list(islice(plan_mixture(mix(WEIGHTS, opened), 4, 7, position=before[-1].position), 40))
    assert set(drawn(tmp_path, before + after).values()) == {1}
    assert {plan.source for plan in after} == {0, 1, 2}


# -- weights -----------------------------------------------------------------------------------------------------------


def shares(sources: list[Source]) -> list[float]:
    return [round(source.share, 6) for source in sources]


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
    found = mix(weights, [named[name] for name in weights], temperature)
    assert shares(found) == [round(share, 6) for share in expected]
    assert [source.name for source in found] == list(weights)


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        ({"a": None, "c": None}, "gives c no weight, and a stream is not counted: write how many records it has"),
        ({"a": 0.0, "c": 0.0}, "no source a weight above 0"),
    ],
)
def test_weights_that_say_nothing(tmp_path: Path, weights: dict[str, float | None], why: str) -> None:
    named = dict(zip(SIZES, open_all(tmp_path), strict=True))
    with pytest.raises(InputError, match=why):
        mix(weights, [named[name] for name in weights])

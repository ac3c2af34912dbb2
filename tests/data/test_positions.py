"""Positions are checked when a checkpoint is read."""

import copy
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from blip2.config import DataConfig
from blip2.data.mixtures import build_mixture, resume_mixture, sample_mixture
from blip2.data.positions import is_position
from blip2.data.sources import open_records


@pytest.fixture
def position(tmp_path: Path) -> Any:
    """The position of a process in a table and in a stream that were redistributed, as JSON."""
    rows = [json.dumps({"image": "x.png", "caption": str(i)}) + "\n" for i in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    path = str(tmp_path / "a.jsonl")
    opened = [open_records(path, DataConfig(train=path, streaming=streaming)) for streaming in (False, True)]
    sources = build_mixture({"table": 1.0, "stream": 1.0}, opened)
    before = list(islice(sample_mixture(sources, 2, 0), 8))[-1].position
    resumed, _ = resume_mixture([before], sources, 3, 0)
    return json.loads(json.dumps(list(islice(sample_mixture(sources, 3, 0, position=resumed), 1))[-1].position))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a key is missing": lambda position: position.pop("num_batches"),
    "a key is unknown": lambda position: position.update(number=3),
    "a count is negative": lambda position: position.update(num_batches=-1),
    "a count is a boolean": lambda position: position.update(num_batches=True),
    "a source is no object": lambda position: position["sources"].update(table=3),
    "a key of a source is missing": lambda position: position["sources"]["table"].pop("base_epoch"),
    "a mask is no text": lambda position: position["sources"]["table"]["remaining"].update(mask=None),
    "a segment is unknown": lambda position: position["sources"]["stream"]["segments"].append({"rank": 0}),
    "a former rank is empty": lambda position: position["sources"]["stream"]["segments"][0]["former_ranks"].append({}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_format_is_noticed(position: Any, change: Callable[[Any], Any]) -> None:
    assert is_position(position)
    other = copy.deepcopy(position)
    change(other)
    assert not is_position(other)


@pytest.mark.parametrize("value", [None, 3, [], {}, "x"])
def test_other_values_are_not_positions(value: Any) -> None:
    assert not is_position(value)

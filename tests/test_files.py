"""Files that are there whole or not at all."""

import json
from pathlib import Path

import pytest

from blip2.errors import InputError
from blip2.files import explained, write_json, written


def test_any_text_comes_back(tmp_path: Path) -> None:
    value = {"é": ["\udcff.jpg", "half \ud83d", "a \\ and a \n", "whole 😀"], "number": 1.5}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_bytes()) == value
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_what_was_there_stays_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, [1])
    with pytest.raises(KeyError), written(path) as file:
        file.write(b"half of")
        raise KeyError
    assert json.loads(path.read_bytes()) == [1] and list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "a.json"
    with pytest.raises(FileNotFoundError):
        write_json(path, [])
    with (
        pytest.raises(InputError, match=r"a\.json cannot be written \(No such file.+\): make room, or give"),
        explained(path),
    ):
        write_json(path, [])

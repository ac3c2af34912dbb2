"""Files that are there whole or not at all."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from blip2.corpus.job import HERE, Worker, claim, do_units
from blip2.errors import InputError
from blip2.io import LOCK, explained, locked, output_path, write_json, written


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


# -- folders of one writer -----------------------------------------------------------------------------------------


def test_a_home_folder_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_path("~/a") == tmp_path / "a"
    assert output_path("a~/~") == Path("a~/~")
    with pytest.raises(InputError, match="output ~nobody-here/a begins with a home folder that is not known"):
        output_path("~nobody-here/a")


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_lock_is_not_held_by_what_is_forked(tmp_path: Path) -> None:
    """Or orphaned data workers of a killed run would keep the next one away."""
    reading, writing = os.pipe()
    holder = os.fork()
    if holder == 0:
        with locked(tmp_path):
            worker = os.fork()
            if worker:
                os.write(writing, str(worker).encode())
            time.sleep(600)
            os._exit(1)
    worker = int(os.read(reading, 20))
    try:
        with pytest.raises(InputError, match=f"in use by process {holder} on "), locked(tmp_path):
            pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with locked(tmp_path):
            assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    finally:
        os.kill(worker, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


class Nothing:
    """Work that fails when it is begun."""

    def worker(self) -> Worker:
        raise AssertionError


def test_a_pass_has_its_output_alone(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(InputError, match="in use by this process"):
        do_units(Nothing(), [], tmp_path, {"pass": "x"}, HERE, "x")
    assert list(do_units(Nothing(), [], tmp_path, {"pass": "x"}, HERE, "x")) == []
    (tmp_path / "about.json").write_text('{"pass": ')
    with pytest.raises(InputError, match=r"about\.json is damaged .*: delete it to go on with what lies beside it"):
        claim(tmp_path, {"pass": "x"})

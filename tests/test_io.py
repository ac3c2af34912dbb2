"""Files that are there whole or not at all."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from blip2.corpus.job import Worker, run_job
from blip2.corpus.options import LOCAL
from blip2.errors import InputError
from blip2.evaluation.report import Report
from blip2.io import (
    LOCK,
    atomic_write,
    convert_os_errors,
    expand_home,
    lock_folder,
    read_json,
    read_regular_file,
    write_json,
    write_tensors,
)
from blip2.resumable import claim_folder
from blip2.training.metrics import JsonlLog


def test_any_text_comes_back(tmp_path: Path) -> None:
    value = {"é": ["\udcff.jpg", "half \ud83d", "a \\ and a \n", "whole 😀"], "number": 1.5}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_bytes()) == value
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_what_was_there_stays_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, [1])
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write(b"half of")
        raise KeyError
    assert json.loads(path.read_bytes()) == [1] and list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "a.json"
    with pytest.raises(FileNotFoundError):
        write_json(path, [])
    with (
        pytest.raises(InputError, match=r"a\.json cannot be written \(No such file.+\): free disk space .* or give"),
        convert_os_errors(path),
    ):
        write_json(path, [])


# -- folders of one writer -----------------------------------------------------------------------------------------


def test_a_home_folder_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home("~/a") == tmp_path / "a"
    assert expand_home("a~/~") == Path("a~/~")
    with pytest.raises(InputError, match="~nobody-here/a begins with a home folder that is unknown"):
        expand_home("~nobody-here/a")


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_lock_is_not_held_by_what_is_forked(tmp_path: Path) -> None:
    """Or orphaned data workers of a killed run would keep the next one away."""
    reading, writing = os.pipe()
    holder = os.fork()
    if holder == 0:
        with lock_folder(tmp_path):
            worker = os.fork()
            if worker:
                os.write(writing, str(worker).encode())
            time.sleep(600)
            os._exit(1)
    worker = int(os.read(reading, 20))
    try:
        with pytest.raises(InputError, match=f"in use by process {holder} on "), lock_folder(tmp_path):
            pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with lock_folder(tmp_path):
            assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    finally:
        os.kill(worker, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


class Nothing:
    """Work that fails when it is begun."""

    def worker(self) -> Worker:
        raise AssertionError


def test_a_pass_has_its_output_alone(tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(InputError, match="in use by another job of this process"):
        run_job(Nothing(), [], tmp_path, {"pass": "x"}, LOCAL, "x")
    assert list(run_job(Nothing(), [], tmp_path, {"pass": "x"}, LOCAL, "x")) == []
    (tmp_path / "about.json").write_text('{"pass": ')
    with pytest.raises(InputError, match=r"about\.json is damaged .*: delete this file if the other files"):
        claim_folder(tmp_path / "about.json", {"pass": "x"}, "pass")


def test_a_link_to_itself_is_no_folder(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(InputError, match=r"loop cannot be written \(.*\): free disk space"), lock_folder(loop):
        pass


@pytest.mark.parametrize("name", ["a\0b", "a\ud800"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(OSError, match=r"null byte|surrogates"):
        read_regular_file(name, 10)
    with pytest.raises(InputError, match="cannot be read"):
        read_json(name)


def test_only_regular_files_are_replaced(tmp_path):
    """A rename would put a file in the place of a device or a link."""
    (tmp_path / "link.json").symlink_to(tmp_path / "file.json")
    write_json(tmp_path / "link.json", {"a": 1})
    write_tensors(tmp_path / "link.json", {"a": torch.zeros(1)})
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "file.json").is_file()
    os.mkfifo(tmp_path / "pipe")
    for write in (
        lambda path: write_json(path, {}),
        lambda path: write_tensors(path, {"a": torch.zeros(1)}),
        lambda path: Report("title", "").save(path),  # opening a pipe that nobody reads would never end
        JsonlLog,
        lambda path: JsonlLog.truncate(path, 3),
    ):
        with pytest.raises(InputError, match=r"cannot be written \(it is a device, a pipe or a socket\): give another"):
            write(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()

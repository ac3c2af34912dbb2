"""Runs on shards: every sample once an epoch, whatever is killed or broken.

BLIP2_KILLS=10 lets the run with kills be killed ten times.
"""

import io
import itertools
import json
import os
import random
import signal
import tarfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from torch.utils.data import _utils as torch_workers

from blip2.config import DataConfig
from blip2.data.sources import open_records
from blip2.data.workers import MAX_WORKER_FAILURES, prefetch
from blip2.errors import InputError
from blip2.recipe import dump_config
from blip2.training import data_stats
from blip2.training.metrics import read_metrics
from blip2.training.trainer import train
from fixtures.processes import begin_two, finish, note_batches
from fixtures.runs import assert_same_run, cut_short, lines

KILLS = int(os.environ.get("BLIP2_KILLS", "3"))
EPOCHS = 3
SAMPLES, SHARDS = 1000, 10
BATCH = 24  # which 1000 samples do not fill
STEPS = -(-EPOCHS * SAMPLES // (2 * BATCH)) + 1


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for kind, data in members.items():
                entry = tarfile.TarInfo(f"{key}.{kind}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def sample(number: int) -> tuple[str, dict[str, bytes]]:
    return f"{number:04d}", {"png": png(number), "txt": f"a disc {number}".encode()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, size = tmp_path_factory.mktemp("shards"), SAMPLES // SHARDS
    for shard in range(SHARDS):
        write_shard(folder / f"{shard}.tar", [sample(i) for i in range(shard * size, (shard + 1) * size)])
    return str(folder / f"{{0..{SHARDS - 1}}}.tar")


# -- kills -----------------------------------------------------------------------------------------------------------


def notes_of(folder: Path) -> list[dict[int, list[tuple[int, str]]]]:
    """Of each process the samples of each batch; what is done again after a kill has to be the same."""
    ranks = []
    for rank in range(2):
        batches: dict[int, list[tuple[int, str]]] = {}
        for line in (folder / f"{rank}.jsonl").read_text().splitlines():
            note = json.loads(line)
            samples = [(epoch, key) for epoch, key in note["samples"]]
            assert batches.setdefault(note["number"], samples) == samples
        ranks.append(batches)
    return ranks


def assert_exactly_once(folder: Path) -> None:
    ranks = notes_of(folder)
    assert [sorted(rank) for rank in ranks] == [list(range(1, STEPS + 1))] * 2
    times = Counter(one for rank in ranks for samples in rank.values() for one in samples)
    assert set(times.values()) == {1}
    for epoch in range(EPOCHS):
        assert sum(of == epoch for of, _ in times) == SAMPLES
    both = [{key for samples in rank.values() for epoch, key in samples if epoch == 0} for rank in ranks]
    assert not both[0] & both[1]


def recipe_of(parts, folder: Path, shards: str) -> Path:
    recipe = parts.recipe(
        folder / "run",
        data={"train": shards, "batch_size": BATCH, "num_workers": 2},
        training={"max_steps": STEPS, "save_steps": 9},
    )
    path = folder / "recipe.yaml"
    path.write_text(dump_config(recipe))
    return path


def taken(folder: Path) -> int:
    return min((folder / f"{rank}.jsonl").read_bytes().count(b"\n") for rank in range(2))


def children(process: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.fixture(scope="module")
def calm(parts, shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calm")
    for process, log in begin_two(
        ["train", str(recipe_of(parts, folder, shards))], folder, partial(note_batches, folder)
    ):
        status, printed = finish(process, log)
        assert status == 0, printed
    return folder


def test_two_processes_with_two_workers(calm: Path) -> None:
    assert_exactly_once(calm)
    (row,) = read_metrics(calm / "run")[-1:]
    assert list(row["samples_seen"].values()) == [STEPS * 2 * BATCH]
    assert row["shards"] >= EPOCHS * SHARDS


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="worker processes are found in /proc")
def test_everything_is_killed_and_then_a_worker(parts, shards, calm: Path, tmp_path: Path) -> None:
    arguments = ["train", str(recipe_of(parts, tmp_path, shards)), "--resume"]
    moments = random.Random(3)
    for rank in range(2):
        (tmp_path / f"{rank}.jsonl").touch()

    def begin(after: int, last: int | None = None):
        """Two processes that have taken so many batches; `last` is that of :func:`note_batches`."""
        before = taken(tmp_path)
        ranks = begin_two(arguments, tmp_path, partial(note_batches, tmp_path, last))
        while taken(tmp_path) < before + after:
            alive = [process.is_alive() for process, _ in ranks]
            assert any(alive) if last else all(alive), [log.read_text() for _, log in ranks]
            time.sleep(0.001)
        return ranks

    for _ in range(KILLS):
        after = moments.randint(1, 16)
        ranks = begin(after, after + 3)
        time.sleep(moments.uniform(0, 0.05))
        for process, _ in ranks:
            with suppress(ProcessLookupError):  # one was at its last batch, and took the other with it
                os.killpg(process.pid, signal.SIGKILL)  # with its workers
            process.join()
    ranks = begin(2)
    os.kill(moments.choice(children(ranks[0][0].pid)), signal.SIGKILL)
    for process, log in ranks:
        status, printed = finish(process, log)
        assert status == 0, printed
    assert_exactly_once(tmp_path)
    assert notes_of(tmp_path) == notes_of(calm)
    assert_same_run(calm / "run", tmp_path / "run")


# -- workers -----------------------------------------------------------------------------------------------------------


class Killed(Dataset[tuple[int, int]]):
    """Item i with its process, which is killed at some items if the file is not there yet, or at each time."""

    def __init__(self, deadly: set[int], once: Path | None) -> None:
        self.deadly, self.once = deadly, once

    def __getitem__(self, item: int) -> tuple[int, int]:
        if item in self.deadly and not (self.once and (self.once / str(item)).exists()):
            if self.once:
                (self.once / str(item)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item, os.getpid()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deaths are looked for twice a second, not every 5 seconds."""
    monkeypatch.setattr(torch_workers, "MP_STATUS_CHECK_INTERVAL", 0.5)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_killed_workers_are_replaced(tmp_path: Path, soon: None) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    made = list(prefetch(iter(range(40)), Killed({7, 8, 30}, tmp_path), 2))
    assert [item for item, _ in made] == list(range(40))
    assert len({process for _, process in made}) >= 4
    assert signal.getsignal(signal.SIGCHLD) == handler


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_workers_that_are_always_killed(soon: None) -> None:
    made = prefetch(iter(range(40)), Killed({5}, None), 1)
    with pytest.raises(
        InputError, match=f"were killed {MAX_WORKER_FAILURES} times in a row .* lower data.num_workers"
    ) as error:
        for expected, (item, _) in enumerate(made):
            assert item == expected < 5
    assert "\n" not in str(error.value)


class Tensors(Dataset[torch.Tensor]):
    def __getitem__(self, item: int) -> torch.Tensor:
        return torch.tensor([item])


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("error", [EOFError, ConnectionResetError, FileNotFoundError])
def test_a_worker_that_is_killed_while_its_tensors_are_received(
    monkeypatch: pytest.MonkeyPatch, soon: None, error: type[Exception]
) -> None:
    """The connection to it is lost before PyTorch sees that it is gone."""
    detach, calls = resource_sharer.DupFd.detach, itertools.count(1)

    def lose(self: Any) -> int:
        if next(calls) == 3:
            raise error
        return detach(self)

    monkeypatch.setattr(resource_sharer.DupFd, "detach", lose)
    made = prefetch(iter(range(8)), Tensors(), 1)
    assert [int(item) for item in made] == list(range(8))
    monkeypatch.setattr(resource_sharer.DupFd, "detach", lambda self: (_ for _ in ()).throw(error))
    with pytest.raises(InputError, match=rf"were killed 3 times in a row \({error.__name__}\)"):
        next(prefetch(iter(range(8)), Tensors(), 1))


class Wrong(Dataset[int]):
    def __getitem__(self, item: int) -> int:
        raise RuntimeError("wrong")


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_what_workers_raise_is_raised() -> None:
    with pytest.raises(RuntimeError, match="wrong"):
        next(prefetch(iter(range(4)), Wrong(), 1))


# -- bad samples -------------------------------------------------------------------------------------------------------

EACH = 10  # of 200: 5 %


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int, dict[str, int]]:
    """10 shards of 20 samples, 5 % of them broken in each way, and 2 broken shards: (source, items, causes)."""
    folder = tmp_path_factory.mktemp("bad")
    samples = [sample(number) for number in range(10 * 20)]
    for start, spoil in enumerate(
        (
            lambda members: {**members, "png": b"no image"},
            lambda members: {**members, "png": members["png"][:40]},
            lambda members: {"png": members["png"]},
            lambda members: {**members, "txt": b" \n"},
            lambda members: {"txt": members["txt"]},
        )
    ):
        for number in range(start, 200, 20):
            samples[number] = (samples[number][0], spoil(samples[number][1]))
    for shard in range(10):
        write_shard(folder / f"{shard:02d}.tar", samples[20 * shard : 20 * shard + 20])
    (folder / "10.tar").write_bytes(b"<html>not found</html>")
    write_shard(folder / "11.tar", [sample(number) for number in range(200, 220)])
    whole = (folder / "11.tar").read_bytes()
    (folder / "11.tar").write_bytes(whole[: 13 * 2048 + 600])  # within the image of its 14th sample
    return str(folder / "*.tar"), 200 + 1 + 13 + 1, {"image": 3 * EACH, "caption": 2 * EACH, "question": 0, "shard": 2}


def counts(row: dict) -> dict[str, int]:
    return {name.removeprefix("skipped_"): n for name, n in row.items() if name.startswith("skipped_")}


def test_what_was_planted_is_counted(parts, bad, tmp_path, capsys):
    source, items, causes = bad
    assert items == len(list(open_records(source, DataConfig(train=source)).read())) == 5 * 43
    recipe = parts.recipe(
        tmp_path / "run",
        data={"train": source, "batch_size": 5, "max_bad_fraction": 0.5},
        training={"max_steps": 43, "save_steps": 20, "save_total_limit": 9},
    )
    train(recipe)
    last = read_metrics(tmp_path / "run")[-1]
    assert (counts(last), last["skipped"], last["shards"]) == (causes, sum(causes.values()), 12)
    assert last["samples_seen"] == {source: items}
    rows = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert Counter(row["reason"] for row in rows) == Counter({c: n for c, n in causes.items() if n})
    assert len({row["key"] for row in rows}) == len(rows)
    assert {Path(row["key"]).name for row in rows if row["reason"] == "shard"} == {"10.tar", "11.tar"}
    errors = capsys.readouterr().err
    assert errors.count("skipped /") == data_stats.MAX_DISPLAYED_SKIPS
    assert f"further skipped records are listed in {tmp_path / 'run' / 'skipped.jsonl'} only" in errors

    # After a kill no line is there twice, and none is missing.
    copy = cut_short(tmp_path / "run", 20)
    with (copy / "skipped.jsonl").open("a") as file:
        file.write('{"step": 21, "cau')
    train(replace(recipe, output=str(copy)), resume=True)
    assert_same_run(tmp_path / "run", copy)
    assert (copy / "skipped.jsonl").read_text() == (tmp_path / "run" / "skipped.jsonl").read_text()


@pytest.mark.parametrize(
    ("enough", "limit", "what"),
    [({"SAMPLES": 100}, 0.05, r"\d+ of 100 samples"), ({"SAMPLES": 10**9, "SHARDS": 10}, 0.02, r"[12] of 1\d shards")],
)
def test_a_run_stops_when_too_much_is_bad(parts, bad, tmp_path, monkeypatch, enough, limit, what):
    for name, number in enough.items():
        monkeypatch.setattr(data_stats, f"MIN_{name}", number)
    recipe = parts.recipe(
        tmp_path / "run",
        data={"train": bad[0], "batch_size": 5, "max_bad_fraction": limit},
        training={"max_steps": 90, "save_steps": 90},
    )
    message = rf"^{what} are bad, more than data.max_bad_fraction {limit} \(.*skipped\.jsonl\): fix the data"
    with pytest.raises(InputError, match=message) as error:
        train(recipe)
    assert "\n" not in str(error.value)
    rows = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    last = read_metrics(tmp_path / "run")[-1]
    assert len(rows) == last["skipped"]
    assert last["step"] < 90 and (tmp_path / "run" / "checkpoints" / f"step-{last['step']:08d}").is_dir()


# -- mixtures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"cached_views": 1}, {"num_workers": 2}])
def test_a_run_on_a_mixture(parts, shards, tmp_path, changes):
    """Tables and shards; going on is exact, and each step says what it was drawn from."""
    other = parts.images if changes.get("cached_views") else shards
    table = tmp_path / "more.jsonl"
    table.write_text(Path(parts.images).read_text().replace('"image": "', f'"image": "{Path(parts.images).parent}/'))
    data = {"train": {str(table): 2.0, other: 1.0}, "batch_size": 4, **changes}
    recipe = parts.recipe(
        tmp_path / "run",
        data=data,
        training={"max_steps": 8, "save_steps": 5, "save_total_limit": 9, "gradient_accumulation_steps": 2},
    )
    train(recipe)
    rows = lines(tmp_path / "run")
    drawn = Counter()
    for row in rows:
        drawn[row["source"]] += 8
        assert row["samples_seen"] == {str(table): drawn[str(table)], other: drawn[other]}
    assert min(drawn.values()) > 0
    copy = cut_short(tmp_path / "run", 5)
    train(replace(recipe, output=str(copy)), resume=True)
    assert_same_run(tmp_path / "run", copy)


def test_losses_are_of_the_source(parts, tmp_path):
    """A source on which nothing can be learned is told from one on which everything is known."""
    recipe = parts.recipe(
        tmp_path / "run",
        stage="generation",
        language={"name": parts.llama},
        qformer={"bert": None, "dropout": 0.0},
        data={"train": {parts.images: 1.0, str(write_long(tmp_path)): 1.0}, "batch_size": 4},
        optimizer={"learning_rate": {"vision.*": "frozen", "language.*": "frozen", "*": 0.0}},
        training={"max_steps": 12, "save_steps": 12},
    )
    train(recipe)
    of = {}
    for row in lines(tmp_path / "run"):
        of.setdefault(row["source"], []).append(row["lm"])
    (one, other) = of.values()
    assert max(one) < min(other) or max(other) < min(one)


def write_long(folder: Path) -> Path:
    """Images whose captions are one letter again and again."""
    rows = []
    for number in range(8):
        (folder / f"{number}.png").write_bytes(png(number))
        rows.append({"image": f"{number}.png", "caption": "e" * 20})
    path = folder / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

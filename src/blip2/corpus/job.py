"""Doing work on every unit of a corpus: on this machine, or on a Ray cluster.

A :class:`Work` says how; its worker, which holds models, is built once a process and then does unit after unit. What a
worker writes of a unit is there whole or not at all, and ``NAME.stats.json``, which says that the unit is done, is
written last. So a pass that was killed goes on where it was, a unit that was lost with its worker is done again by
another, and both engines write the same bytes.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from blip2.console import Display
from blip2.corpus.tar_shards import Unit
from blip2.errors import InputError
from blip2.io import explained, locked, parse_json, plain, read_json, read_object, write_json
from blip2.resumable import whose

Worker = Callable[[Unit], Mapping[str, Any]]
"""Does a unit, writes what comes of it, and tells what happened, for JSON, with the number of ``pictures``."""
STATS = ".stats.json"
ERROR = "error"
"""What a worker of Ray tells in place of raising it."""


@runtime_checkable
class Work(Protocol):
    """What is to be done; it travels to other machines, so it holds names and settings."""

    def worker(self) -> Worker:
        """Load what is needed, once a process."""
        ...


@dataclass(frozen=True)
class Engine:
    """Where work is done."""

    kind: Literal["local", "ray"] = "local"
    """This process; or the Ray cluster that RAY_ADDRESS names, or else one on this machine."""
    workers: int | None = None
    """Processes of Ray; None: one a GPU, or without GPUs one for every two CPU cores."""
    threads: int | None = None
    """CPU threads a worker; None: all in this process, or an even share of the cores. The last digit of a sum may
    depend on it, so what is to be the same to the byte needs the same number."""

    def __post_init__(self) -> None:
        if self.kind == "local" and self.workers is not None:
            raise InputError("workers are of the engine ray: add --engine ray, or leave out --num-workers")
        for name in ("workers", "threads"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise InputError(f"{name} is {number}, expected at least 1")


HERE = Engine()


def do_units(
    work: Work, units: Sequence[Unit], folder: Path, about: Mapping[str, Any], engine: Engine, label: str
) -> Iterator[dict[str, Any]]:
    """Do all units that are not done; then what was told of each, in their order, one at a time.

    Args:
        folder: for what is written; made if need be.
        about: all that what is written depends on; ``about.json`` says it.
        label: stands before the progress bar.

    Raises:
        InputError: the folder cannot be written or holds another pass, Ray is missing, or what a worker raised.
    """
    with locked(folder):
        return _do_units(work, units, folder, about, engine, label)


def _do_units(
    work: Work, units: Sequence[Unit], folder: Path, about: Mapping[str, Any], engine: Engine, label: str
) -> Iterator[dict[str, Any]]:
    claim(folder, about)
    _sweep(folder)
    left = [unit for unit in units if not _stats(folder, unit).exists()]
    display = Display(label)
    if left:
        display.start(len(units), len(units) - len(left))
    started, pictures = time.monotonic(), 0
    try:
        for done, told in enumerate(run_units(_Recorded(work, folder), left, engine), len(units) - len(left) + 1):
            pictures += told["pictures"]
            display.advance(done, f"shards  {pictures / (time.monotonic() - started):.1f} pictures/s")
        _sweep(folder)
    finally:
        display.close()
    return (read_json(_stats(folder, unit)) for unit in units)


def claim(folder: Path, about: Mapping[str, Any]) -> None:
    """Make a folder one's own, or find that it is.

    Raises:
        InputError: it cannot be written, or belongs to something else.
    """
    file = folder / "about.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_json(file, about)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): give another output") from error
    problem = whose(folder, read_object(file), plain(about), "pass")
    if problem is not None:
        raise InputError(problem)


def _sweep(folder: Path) -> None:
    """Delete what workers that were killed left half written."""
    for left in folder.glob(f"*.{'?' * 32}.tmp"):
        left.unlink()


def _stats(folder: Path, unit: Unit) -> Path:
    return folder / f"{unit.name}{STATS}"


@dataclass(frozen=True)
class _Recorded:
    """Work whose units are noted when they are done."""

    work: Work
    folder: Path

    def worker(self) -> Worker:
        """Does a unit; only the number of its pictures comes back, for the rest may be much."""
        do = self.work.worker()

        def record(unit: Unit) -> Mapping[str, Any]:
            file = _stats(self.folder, unit)
            if not file.exists():  # otherwise a worker was lost just after it was done
                told = do(unit)
                with explained(file):
                    write_json(file, told)
            return {"pictures": read_json(file)["pictures"]}

        return record


# -- engines -------------------------------------------------------------------------------------------------------


def run_units(work: Work, units: Sequence[Unit], engine: Engine) -> Iterator[Mapping[str, Any]]:
    """What a worker tells of each unit, in the order in which they are done.

    Raises:
        InputError: Ray is missing, or what a worker raised.
    """
    return _on_ray(work, units, engine) if engine.kind == "ray" else _here(work, units, engine)


def _here(work: Work, units: Sequence[Unit], engine: Engine) -> Iterator[Mapping[str, Any]]:
    if not units:
        return
    before = torch.get_num_threads()
    if engine.threads is not None:
        torch.set_num_threads(engine.threads)
    try:
        yield from map(work.worker(), units)
    finally:
        torch.set_num_threads(before)


def _on_ray(work: Work, units: Sequence[Unit], engine: Engine) -> Iterator[Mapping[str, Any]]:
    """Ray Data: actors that hold a worker each, fed no faster than they work, begun anew where one is lost."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("--engine ray needs the extra blip2[ray]: pip install 'blip2[ray]'") from error
    if not units:
        return
    ours = not ray.is_initialized()
    if ours:
        # Never another run's cluster on this machine, which would end with it.
        ray.init(os.environ.get("RAY_ADDRESS", "local"), logging_level=logging.WARNING, log_to_driver=False)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        there = ray.cluster_resources()
        cores, gpus = int(there.get("CPU", 1)), int(there.get("GPU", 0))
        workers = min(engine.workers or gpus or max(1, cores // 2), len(units))
        share = cores // workers or cores / workers  # Ray counts in whole cores, or in parts of one
        threads = engine.threads or max(1, int(share))
        # Blocks that lie there from the start: to make them would take a core that the workers may have.
        items = [{"unit": json.dumps(asdict(unit))} for unit in units]
        rows = ray.data.from_items(items, override_num_blocks=min(len(units), 4096)).map_batches(
            _Actor,
            fn_constructor_args=(work, threads),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=min(threads, share),
            num_gpus=min(1, gpus / workers),
        )
        for row in rows.iter_rows():
            told = parse_json(row["told"])
            if ERROR in told:
                raise InputError(told[ERROR])
            yield told
    finally:
        if ours:
            ray.shutdown()


class _Actor:
    """A worker in a process of Ray."""

    def __init__(self, work: Work, threads: int) -> None:
        self._work, self._threads = work, threads
        self._do: Worker | None = None

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, list[str]]:
        try:
            if self._do is None:  # not when it is made, or Ray would make it again and again where that fails
                torch.set_num_threads(self._threads)
                self._do = self._work.worker()
            return {"told": [json.dumps(self._do(Unit(**parse_json(unit)))) for unit in rows["unit"]]}
        except InputError as error:  # told, for what is raised comes wrapped in pages of Ray's own
            return {"told": [json.dumps({ERROR: str(error)})]}

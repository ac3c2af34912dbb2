"""Run a job on every unit of a corpus, in this process or on a Ray cluster.

The worker of a :class:`Job` loads the models once per process and then processes one unit after another. The outputs of
a unit are written atomically, and ``NAME.stats.json``, which marks the unit as finished, is written last. An
interrupted job therefore resumes where it stopped. If a worker dies, another worker repeats the unfinished unit. Both
engines write the same bytes.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from blip2.backbones.pretrained import short_message
from blip2.console import Display
from blip2.corpus.options import Engine
from blip2.corpus.units import Unit
from blip2.errors import InputError
from blip2.io import convert_os_errors, lock_folder, parse_json, read_json, read_json_object, write_json
from blip2.resumable import claim_folder

Worker = Callable[[Unit], Mapping[str, Any]]
"""Processes a unit, writes the outputs, and returns a JSON-serializable result with the number of ``images``."""
STATS = ".stats.json"
UNIT = "unit"
"""Key of the records from which a result was computed."""
ERROR = "error"
"""Key under which a worker on Ray returns an error message instead of raising the error."""


@runtime_checkable
class Job(Protocol):
    """A job on the units of a corpus. Jobs are sent to other machines, so they hold names and options, not models."""

    def worker(self) -> Worker:
        """Load the models, and return a worker. This method is called once per process."""
        ...


def run_job(
    job: Job, units: Sequence[Unit], folder: Path, metadata: Mapping[str, Any], engine: Engine, label: str
) -> Iterator[dict[str, Any]]:
    """Run a job on all units that are not finished.

    Args:
        job: the job.
        units: the units of the corpus.
        folder: folder of the outputs; created if needed.
        metadata: everything that determines the outputs; written to ``about.json``.
        engine: where the job runs.
        label: label of the progress bar.

    Returns:
        An iterator over the results of all units, in order.

    Raises:
        InputError: the folder cannot be written or holds the outputs of another job or of other data, Ray is not
            installed, or a worker raised an InputError.
    """
    with lock_folder(folder):
        claim_folder(folder / "about.json", metadata, "pass")
        _remove_stale_tmp(folder)
        remaining = [unit for unit in units if not _is_finished(folder, unit)]
        known = {_stats_file(folder, unit) for unit in units}
        stale = next((file for file in sorted(folder.glob(f"*{STATS}")) if file not in known), None)
        if stale is not None:
            raise InputError(
                f"{stale} has the result of records that the data no longer has: remove the files of this name, or give"
                " another output"
            )
        finished = len(units) - len(remaining)
        display = Display(label)
        if remaining:
            display.start(len(units), finished)
        started, images = time.monotonic(), 0
        try:
            for done, result in enumerate(run_units(_RecordedJob(job, folder), remaining, engine), finished + 1):
                images += result["images"]
                display.update(done, f"shards  {images / (time.monotonic() - started):.1f} images/s")
            _remove_stale_tmp(folder)
        finally:
            display.close()
        return (read_json(_stats_file(folder, unit)) for unit in units)


def _remove_stale_tmp(folder: Path) -> None:
    """Delete the unfinished files of workers that were killed."""
    for file in folder.glob(f"*.{'?' * 32}.tmp"):
        file.unlink()


def _stats_file(folder: Path, unit: Unit) -> Path:
    return folder / f"{unit.name}{STATS}"


def _identify(unit: Unit) -> dict[str, Any]:
    """Return what tells a unit from the same unit of other data. The path is not part of it: data may be moved."""
    return {"start": unit.start, "count": unit.count, "version": unit.version}


def _is_finished(folder: Path, unit: Unit) -> bool:
    """Return whether the results of a unit are there.

    Raises:
        InputError: they are the results of other records, because the data has changed.
    """
    file = _stats_file(folder, unit)
    if not file.exists():
        return False
    found, expected = read_json_object(file).get(UNIT), _identify(unit)
    if found != expected:
        raise InputError(
            f"{file} has the result of {found}, expected {expected}: the data, {unit.source}, has changed since; give"
            " another output"
        )
    return True


@dataclass(frozen=True)
class _RecordedJob:
    """A job whose results are written to a folder."""

    job: Job
    folder: Path

    def worker(self) -> Worker:
        """Return a worker that writes each result to a file, and returns only the number of images.

        Whole results may be too large to be sent between processes.
        """
        process = self.job.worker()

        def record(unit: Unit) -> Mapping[str, Any]:
            file = _stats_file(self.folder, unit)
            if not file.exists():  # it exists if a worker died right after writing the file
                result = process(unit)
                with convert_os_errors(file):
                    write_json(file, {**result, UNIT: _identify(unit)})
            return {"images": read_json(file)["images"]}

        return record


# -- engines -------------------------------------------------------------------------------------------------------


def run_units(job: Job, units: Sequence[Unit], engine: Engine) -> Iterator[Mapping[str, Any]]:
    """Yield the result of each unit, in order of completion.

    Raises:
        InputError: Ray is not installed or does not start, or a worker raised an InputError.
    """
    return _run_on_ray(job, units, engine) if engine.kind == "ray" else _run_locally(job, units, engine)


def _run_locally(job: Job, units: Sequence[Unit], engine: Engine) -> Iterator[Mapping[str, Any]]:
    if not units:
        return
    num_threads = torch.get_num_threads()
    if engine.num_threads is not None:
        torch.set_num_threads(engine.num_threads)
    try:
        yield from map(job.worker(), units)
    finally:
        torch.set_num_threads(num_threads)


def _run_on_ray(job: Job, units: Sequence[Unit], engine: Engine) -> Iterator[Mapping[str, Any]]:
    """Run units on Ray Data actors, each with one worker. Ray applies backpressure, and restarts actors that die."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("--engine ray needs Ray Data, which is not installed: pip install 'blip2[ray]'") from error
    if not units:
        return
    start_ray = not ray.is_initialized()
    if start_ray:
        # "local" starts a cluster of its own: the cluster of another run on this machine would shut down with that run.
        try:
            ray.init(os.environ.get("RAY_ADDRESS", "local"), logging_level=logging.WARNING, log_to_driver=False)
        except Exception as error:  # Ray has no class for them
            raise InputError(
                f"Ray does not start or cannot be reached ({short_message(error)}): check RAY_ADDRESS, and that this"
                " machine is not overloaded"
            ) from error
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        resources = ray.cluster_resources()
        cores, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
        num_workers = min(engine.num_workers or gpus or max(1, cores // 2), len(units))
        share = cores // num_workers or cores / num_workers  # Ray takes whole cores or a fraction of one
        num_threads = engine.num_threads or max(1, int(share))
        # from_items makes blocks immediately; a read task would take a core from the workers.
        items = [{"unit": json.dumps(asdict(unit))} for unit in units]
        rows = ray.data.from_items(items, override_num_blocks=min(len(units), 4096)).map_batches(
            _Actor,
            fn_constructor_args=(job, num_threads),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            num_cpus=min(num_threads, share),
            num_gpus=min(1, gpus / num_workers),
        )
        for row in rows.iter_rows():
            result = parse_json(row["result"])
            if ERROR in result:
                raise InputError(result[ERROR])
            yield result
    finally:
        if start_ray:
            ray.shutdown()


class _Actor:
    """A worker in a Ray process."""

    def __init__(self, job: Job, num_threads: int) -> None:
        self._job, self._num_threads = job, num_threads
        self._process: Worker | None = None

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, list[str]]:
        try:
            if self._process is None:  # not in __init__: Ray would retry a failing constructor forever
                torch.set_num_threads(self._num_threads)
                self._process = self._job.worker()
            return {"result": [json.dumps(self._process(Unit(**parse_json(unit)))) for unit in rows["unit"]]}
        except InputError as error:  # returned, because Ray would wrap a raised error in a long traceback
            return {"result": [json.dumps({ERROR: str(error)})]}

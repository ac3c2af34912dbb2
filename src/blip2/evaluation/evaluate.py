"""Evaluating a checkpoint on any records, on any number of processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState

from blip2.build import choose_device
from blip2.config import DataConfig, Precision
from blip2.data.assets import resolve
from blip2.data.identity import add_weights
from blip2.data.records import Records, open_records
from blip2.errors import InputError
from blip2.evaluation import tasks
from blip2.evaluation.parts import Parts
from blip2.evaluation.predictions import write_json, write_predictions
from blip2.evaluation.report import write_cases
from blip2.evaluation.tasks import DEFAULTS, Settings
from blip2.inference import load
from blip2.model.distributed import process_index
from blip2.training.checkpoint import trained_state

Task = Literal["captioning", "vqa", "retrieval"]
WORK: dict[Task, Any] = {"captioning": tasks.caption, "vqa": tasks.answer, "retrieval": tasks.retrieve}
METRICS = "metrics.json"


def evaluate(
    model: str | Path,
    task: Task,
    data: str | DataConfig,
    output: str | Path,
    settings: Settings = DEFAULTS,
    *,
    limit: int | None = None,
    device: str | None = None,
    dtype: Precision | None = None,
    changes: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint of any format; ``metrics.json``, ``predictions.json`` and ``report.html`` go to `output`.

    Under ``torchrun`` or ``accelerate launch`` the processes share the work. A killed evaluation goes on where it was
    when it is started again, and one that was done is not done again; an output of another model, task, data or
    settings is refused.

    Args:
        data: what ``data.train`` of a recipe may say, or a section of a recipe that says it.
        limit: only so many records, the first ones.

    Returns:
        The metrics.

    Raises:
        InputError: the model cannot do the task, the data cannot be read or do not fit the task, or `output` belongs
            to another evaluation.
    """
    state = PartialState(cpu=choose_device(device).type == "cpu")
    stage = "representation" if task == "retrieval" else "generation"
    pipeline = load(model, device or str(state.device), dtype, changes=changes, stage=stage)
    config = DataConfig(train=data, streaming=False) if isinstance(data, str) else replace(data, streaming=False)
    (source, *others) = config.sources
    if others:
        raise InputError(f"an evaluation is of one data set, and data names {1 + len(others)}: evaluate each by itself")
    records = open_records(resolve(source), config)
    assert isinstance(records, Records)
    count = len(records) if limit is None else min(limit, len(records))
    folder = Path(output)
    about = {
        "task": task, "model": str(pipeline.path), "weights": _digest(pipeline.model), "data": source,
        "records": count, "dtype": str(pipeline.model.vision.dtype), **json.loads(json.dumps(asdict(settings))),
    }  # fmt: skip
    parts = _claim(folder, about)
    if (folder / METRICS).exists():  # it was done before
        return json.loads((folder / METRICS).read_text(encoding="utf-8"))
    findings = WORK[task](pipeline, [records[i] for i in range(count)], settings, parts)
    metrics = {**about, **findings.metrics}
    if process_index() == 0:
        if findings.kind is not None:
            write_predictions(folder / "predictions.json", findings.kind, findings.predictions)
        write_cases(folder / "report.html", metrics, findings.cases)
        # What says that it is done comes last.
        write_json(folder / METRICS, metrics, indent=1)
        parts.forget()
    state.wait_for_everyone()
    return metrics


def _claim(folder: Path, about: dict[str, Any]) -> Parts:
    """The parts of an evaluation in a folder that is its own.

    Raises:
        InputError: the folder cannot be made, or holds another evaluation.
    """
    file = folder / "evaluation.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_json(file, about, indent=1)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): give another output") from error
    found = json.loads(file.read_text(encoding="utf-8"))
    other = sorted(key for key in found.keys() | about.keys() if found.get(key) != about.get(key))
    if other:
        raise InputError(
            f"{folder} holds another evaluation: its {other[0]} is {found.get(other[0])}, not {about.get(other[0])}:"
            " give another output"
        )
    return Parts(folder / "parts")


def _digest(model: torch.nn.Module) -> str:
    """Of what was trained."""
    weights = hashlib.blake2b(digest_size=8)
    add_weights(weights, sorted(trained_state(model).items()))
    return weights.hexdigest()

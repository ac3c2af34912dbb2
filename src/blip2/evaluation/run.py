"""Evaluating a checkpoint, or a file of predictions, on any records and on any number of processes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState

from blip2.builder import choose_device
from blip2.checkpoint import trained_state
from blip2.config import DataConfig, EvaluationConfig, Precision
from blip2.distributed import gather_objects, process_index
from blip2.errors import InputError
from blip2.evaluation import tasks
from blip2.evaluation.data import Table
from blip2.evaluation.predictions import write_predictions
from blip2.evaluation.report import write_cases
from blip2.evaluation.tasks import DEFAULTS, Findings, Settings
from blip2.feature_cache.digests import add_weights
from blip2.io import explained, output_path, plain, read_object, write_json
from blip2.pipelines import ANSWER, CAPTION, GenerationPipeline, RepresentationPipeline, load
from blip2.resumable import Parts, whose
from blip2.training.launch import holding

Task = Literal["captioning", "vqa", "retrieval"]
WORK: dict[Task, Any] = {"captioning": tasks.caption, "vqa": tasks.answer, "retrieval": tasks.retrieve}
JUDGE: dict[Task, Any] = {"captioning": tasks.judge_given_captions, "vqa": tasks.judge_given_answers}
METRICS = "metrics.json"
OK_VQA = "ok-vqa:"
"""Beginning of the sources whose answers are base forms."""


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
    about, found = evaluate_pipeline(pipeline, task, open_table(data, limit), output, settings)
    return {**about, **found}


def evaluate_pipeline(
    pipeline: RepresentationPipeline | GenerationPipeline,
    task: Task,
    table: Table,
    output: str | Path,
    settings: Settings = DEFAULTS,
    anew: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """:func:`evaluate` a model that is there already, in evaluation mode.

    Args:
        anew: clear an output of another evaluation instead of refusing it.

    Returns:
        What was evaluated, and the metrics.
    """
    settings = _for_data(settings, table)
    about = {
        "task": task, "model": str(pipeline.path), "weights": _digest(pipeline.model), "data": table.source,
        "records": len(table), "dtype": str(pipeline.model.vision.dtype), **_plain(settings),
    }  # fmt: skip
    return about, _once(output_path(output), about, anew, lambda parts: WORK[task](pipeline, table, settings, parts))


def evaluate_predictions(
    file: str | Path,
    task: Task,
    data: str | DataConfig,
    output: str | Path,
    settings: Settings = DEFAULTS,
    *,
    limit: int | None = None,
) -> dict[str, Any]:
    """Score a file of predictions as :func:`evaluate` writes it, of any model. Images are only shown.

    Raises:
        InputError: the file cannot be read, lacks records, or has some twice or that are not in the data; or as
            :func:`evaluate`.
    """
    PartialState(cpu=True)
    if task not in JUDGE:
        raise InputError(f"the task {task} has no predictions to score: give a model")
    table = open_table(data, limit)
    settings = _for_data(settings, table)
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): check the path of the predictions") from error
    about = {
        "task": task, "predictions": str(file), "digest": hashlib.blake2b(content, digest_size=8).hexdigest(),
        "data": table.source, "records": len(table), "rules": settings.rules, "lemmatize": settings.lemmatize,
    }  # fmt: skip
    found = _once(output_path(output), about, False, lambda parts: JUDGE[task](table, file, settings, parts))
    return {**about, **found}


def open_table(data: str | DataConfig, limit: int | None = None) -> Table:
    """The records that a source of data names."""
    return Table(DataConfig(train=data) if isinstance(data, str) else data, limit)


def settings_of(config: EvaluationConfig, seed: int = 0) -> Settings:
    """What a recipe, or the command line, says of an evaluation."""
    given = {name: getattr(config, name) for name in DECODING}
    decoding = ANSWER if config.task == "vqa" else CAPTION
    decoding = replace(decoding, **{name: value for name, value in given.items() if value is not None})
    return Settings(
        None if config.task == "retrieval" else decoding, config.prompt, config.rerank_k, config.fusion,
        config.rules, config.lemmatize, seed,
    )  # fmt: skip


DECODING = ("num_beams", "top_p", "temperature", "length_penalty", "max_new_tokens")


def _for_data(settings: Settings, table: Table) -> Settings:
    return replace(settings, lemmatize=settings.lemmatize or table.source.startswith(OK_VQA))


def _plain(settings: Settings) -> dict[str, Any]:
    return plain(asdict(settings))


def _once(folder: Path, about: dict[str, Any], anew: bool, work: Callable[[Parts], Findings]) -> dict[str, Any]:
    """The metrics that `work` finds, which are written to a folder; those in it, where it was done before."""
    if anew:  # of a run that is held, which says itself what cannot be written
        return _find(folder, about, anew, work)
    with explained(folder), holding(folder):
        return _find(folder, about, anew, work)


def _find(folder: Path, about: dict[str, Any], anew: bool, work: Callable[[Parts], Findings]) -> dict[str, Any]:
    problem = None
    if process_index() == 0:
        problem = _claim(folder, about, anew)
    problem = gather_objects(problem)[0]
    if problem is not None:
        raise InputError(problem)
    if (folder / METRICS).exists():  # it was done before
        found = read_object(folder / METRICS)
        return {name: value for name, value in found.items() if name not in about}
    parts = Parts(folder / "parts")
    findings = work(parts)
    if process_index() == 0:
        metrics = {**about, **findings.metrics}
        if findings.kind is not None:
            write_predictions(folder / "predictions.json", findings.kind, findings.predictions)
        write_cases(folder / "report.html", metrics, findings.cases)
        # What says that it is done comes last.
        write_json(folder / METRICS, metrics)
    gather_objects(None)  # nobody goes on before all is written, and all have read the parts
    if process_index() == 0:
        parts.forget()
    return findings.metrics


def _claim(folder: Path, about: dict[str, Any], anew: bool) -> str | None:
    """Make a folder an evaluation's own; what is in the way, if it cannot be."""
    file = folder / "evaluation.json"
    try:
        if anew and file.exists() and _said(file) != about:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_json(file, about)
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror}): give another output"
    try:
        return whose(folder, read_object(file), about, "evaluation")
    except InputError as error:
        return str(error)


def _said(file: Path) -> dict[str, Any] | None:
    """What a folder says of itself; None where that is damaged."""
    try:
        return read_object(file)
    except InputError:
        return None


def _digest(model: torch.nn.Module) -> str:
    """Of what was trained."""
    weights = hashlib.blake2b(digest_size=8)
    add_weights(weights, sorted(trained_state(model).items()))
    return weights.hexdigest()

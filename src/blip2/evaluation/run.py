"""Evaluate a checkpoint or a file of predictions on any records, with any number of processes."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from blip2.builder import choose_device
from blip2.checkpoint import trained_state_dict
from blip2.config import DataConfig, EvaluationConfig, Precision
from blip2.distributed import all_gather_objects, on_rank_0, rank
from blip2.errors import InputError
from blip2.evaluation import tasks
from blip2.evaluation.control import COLUMNS, control_rows
from blip2.evaluation.data import EvalData, read_answer_list
from blip2.evaluation.predictions import MAX_PREDICTIONS, write_predictions
from blip2.evaluation.report import write_evaluation_report
from blip2.evaluation.tasks import EvalResult, decoding_for
from blip2.feature_cache.digests import hash_weights
from blip2.io import convert_os_errors, expand_home, read_json_object, read_regular_file, to_plain, write_json
from blip2.pipelines import GenerationPipeline, RepresentationPipeline, load
from blip2.resumable import ResumableMap, claim_folder
from blip2.training.launch import lock_run

log = logging.getLogger("blip2")

EVALUATE_MODEL: dict[str, Any] = {"captioning": tasks.caption, "vqa": tasks.answer, "retrieval": tasks.retrieve}
SCORE_PREDICTIONS: dict[str, Any] = {
    "captioning": tasks.score_caption_predictions,
    "vqa": tasks.score_answer_predictions,
}
METRICS = "metrics.json"
OK_VQA = "ok-vqa:"
"""Prefix of data sources whose answers are lemmatized."""


def evaluate(
    model: str | Path,
    config: EvaluationConfig,
    output: str | Path,
    *,
    seed: int = 0,
    device: str | None = None,
    dtype: Precision | None = None,
    overrides: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint and write ``metrics.json``, ``predictions.json`` and ``report.html`` to a folder.

    Under ``torchrun`` or ``accelerate launch`` the processes share the work. An evaluation that was interrupted resumes
    where it stopped when it is started again, and a finished one returns its metrics at once.

    Args:
        model: a checkpoint of any format that :func:`blip2.pipelines.load` reads.
        config: the task, the data and the options.
        output: folder of the results. A folder with the results of another model, task, data or options is refused.
        seed: seed of sampling.
        device: device to run on. None: a GPU if there is one.
        dtype: data type of the frozen parts. None: the dtype in the model's config, else bf16 on a CUDA GPU and fp32 on
            other devices.
        overrides: keys of the model's config to override.

    Returns:
        The content of ``metrics.json``: what was evaluated, and the metrics.

    Raises:
        InputError: the model cannot do the task, the data cannot be read or does not fit the task, or `output` holds
            another evaluation.
    """
    state = PartialState(cpu=choose_device(device).type == "cpu")
    stage = "representation" if config.task == "retrieval" else "generation"
    pipeline = load(model, device or str(state.device), dtype, overrides=overrides, stage=stage)
    data = EvalData(DataConfig(train=config.data), config.limit, pipeline.config.vision.reads_features)
    metadata, metrics = evaluate_pipeline(pipeline, config, data, output, seed)
    _log_control(metrics)
    return {**metadata, **metrics}


def evaluate_pipeline(
    pipeline: RepresentationPipeline | GenerationPipeline,
    config: EvaluationConfig,
    data: EvalData,
    output: str | Path,
    seed: int = 0,
    overwrite: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluate a loaded model in evaluation mode; see :func:`evaluate`.

    Args:
        pipeline: the model.
        config: the task and the options; ``data`` and ``limit`` are not used.
        data: the records to evaluate on.
        output: folder of the results.
        seed: seed of sampling.
        overwrite: used in a training run: results of another evaluation in `output` are deleted; otherwise they are an
            error.

    Returns:
        The metadata that identifies the evaluation, and the metrics.

    Raises:
        InputError: as for :func:`evaluate`.
    """
    if config.control and pipeline.config.vision.reads_features:
        raise InputError(
            f"control is set, but {pipeline.path} reads arrays of features, for which no blank image is known: leave"
            " out --control"
        )
    config = _with_lemmatize(config, data)
    decoding = None if config.task == "retrieval" else asdict(decoding_for(config))
    metadata = to_plain({
        "task": config.task, "model": str(pipeline.path), "weights": _digest(pipeline.model), "data": data.source,
        "records": len(data), "records_digest": data.digest(), "dtype": str(pipeline.model.vision.dtype),
        "decoding": decoding,
        "prompt": config.prompt, "rerank_k": config.rerank_k, "fusion": config.fusion, "rules": config.rules,
        "lemmatize": config.lemmatize, "seed": seed, **({"control": True} if config.control else {}),
        **_certainty_metadata(pipeline, config),
    })  # fmt: skip

    def work(resumable: ResumableMap) -> EvalResult:
        return EVALUATE_MODEL[config.task](pipeline, data, config, seed, resumable)

    metrics = _run_once(expand_home(output), metadata, work, overwrite)
    if metrics.get("images_skipped") and rank() == 0:
        count, first = metrics["images_skipped"], metrics["skipped"][0]
        log.warning("%d images of %s cannot be used and are not scored; the first: %s", count, data.source, first)
    return metadata, metrics


def evaluate_predictions(file: str | Path, config: EvaluationConfig, output: str | Path) -> dict[str, Any]:
    """Score a file of predictions of any model, in the format that :func:`evaluate` writes.

    The images are needed only for the report, and may be missing.

    Args:
        file: the predictions.
        config: the task, the data and the options.
        output: folder of the results, as for :func:`evaluate`.

    Returns:
        The content of ``metrics.json``: what was evaluated, and the metrics.

    Raises:
        InputError: the file cannot be read, ids are missing, repeated or unknown, the data cannot be read or does not
            fit the task, or `output` holds another evaluation.
    """
    PartialState(cpu=True)
    if config.task not in SCORE_PREDICTIONS:
        raise InputError(
            f"the task {config.task} cannot score a file of predictions, expected {' or '.join(SCORE_PREDICTIONS)}:"
            " give a model, or choose another task"
        )
    if config.control:
        raise InputError(
            f"control is set for {file}, but a file of predictions has no model for other images: give a model, or"
            " leave out --control"
        )
    if config.rank_by is not None or config.calibration:
        raise InputError(
            f"{'rank_by' if config.rank_by is not None else 'calibration'} is set for {file}, but a file of predictions"
            " has no probabilities: give a model, or leave it out"
        )
    data = EvalData(DataConfig(train=config.data), config.limit)
    config = _with_lemmatize(config, data)
    try:
        content = read_regular_file(file, MAX_PREDICTIONS)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): check the path and the permissions") from error
    metadata = {
        "task": config.task, "predictions": str(file), "digest": hashlib.blake2b(content, digest_size=8).hexdigest(),
        "data": data.source, "records": len(data), "records_digest": data.digest(), "rules": config.rules,
        "lemmatize": config.lemmatize,
    }  # fmt: skip

    def work(resumable: ResumableMap) -> EvalResult:
        return SCORE_PREDICTIONS[config.task](data, file, config, resumable)

    return {**metadata, **_run_once(expand_home(output), metadata, work)}


def _certainty_metadata(
    pipeline: RepresentationPipeline | GenerationPipeline, config: EvaluationConfig
) -> dict[str, Any]:
    """Return what determines the ranked answers and the probabilities, if the evaluation has any."""
    metadata: dict[str, Any] = {}
    if config.rank_by is not None:
        metadata["rank_by"] = config.rank_by
        if config.answer_list is not None:
            listed = json.dumps(read_answer_list(config.answer_list)).encode()
            metadata["answer_list"] = config.answer_list
            metadata["answer_list_digest"] = hashlib.blake2b(listed, digest_size=8).hexdigest()
    if config.calibration:
        metadata["calibration"] = True
    if metadata and pipeline.config.calibration is not None:
        metadata["temperatures"] = asdict(pipeline.config.calibration)
    return metadata


def _with_lemmatize(config: EvaluationConfig, data: EvalData) -> EvaluationConfig:
    """Switch lemmatization on for OK-VQA."""
    return replace(config, lemmatize=config.lemmatize or data.source.startswith(OK_VQA))


def _run_once(
    folder: Path, metadata: dict[str, Any], work: Callable[[ResumableMap], EvalResult], overwrite: bool = False
) -> dict[str, Any]:
    """Run an evaluation and write its results to a folder, or read the metrics if the evaluation is finished.

    A training run, which sets `overwrite`, holds the lock of its folder and reports write errors itself.
    """
    with nullcontext() if overwrite else convert_os_errors(folder), nullcontext() if overwrite else lock_run(folder):
        on_rank_0(lambda: _claim(folder, metadata, overwrite))
        if (folder / METRICS).exists():
            metrics = read_json_object(folder / METRICS)
            return {name: value for name, value in metrics.items() if name not in metadata}
        resumable = ResumableMap(folder / "parts")
        result = work(resumable)
        if rank() == 0:
            metrics = {**metadata, **result.metrics}
            if result.format is not None:
                write_predictions(folder / "predictions.json", result.format, result.predictions)
            if result.ranked:
                write_json(folder / "ranked.json", result.ranked, indent=None)
            write_evaluation_report(folder / "report.html", metrics, result.examples)
            write_json(folder / METRICS, metrics)  # last: it marks the evaluation as finished
        all_gather_objects(None)  # wait until everything is written and every process has read the chunks
        if rank() == 0:
            resumable.clear()
        return result.metrics


def _claim(folder: Path, metadata: dict[str, Any], overwrite: bool) -> None:
    """Mark a folder as the output of an evaluation. The folder must be new or belong to the same evaluation."""
    file = folder / "evaluation.json"
    if overwrite and file.exists() and _read_or_none(file) != metadata:
        with convert_os_errors(folder):
            shutil.rmtree(folder)
    claim_folder(file, metadata, "evaluation")


def _read_or_none(file: Path) -> dict[str, Any] | None:
    """Read a JSON object; return None if the file is damaged."""
    try:
        return read_json_object(file)
    except InputError:
        return None


def _log_control(metrics: Mapping[str, Any]) -> None:
    """Log the scores of the controls as a table, in the first process."""
    rows = [COLUMNS, *control_rows(metrics)]
    if len(rows) > 1 and rank() == 0:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for first, *others in rows:
            cells = [
                first.ljust(widths[0]),
                *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True)),
            ]
            log.info("%s", "  ".join(cells))


def _digest(model: torch.nn.Module) -> str:
    """Return a digest of the trained weights."""
    weights = hashlib.blake2b(digest_size=8)
    hash_weights(weights, sorted(trained_state_dict(model).items()))
    return weights.hexdigest()

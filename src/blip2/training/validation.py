"""Measurements on held-out data during training: validation losses, evaluations, and the best checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from blip2.builder import Built
from blip2.config import ObjectivesConfig, Recipe
from blip2.console import Display
from blip2.data.collate import StageBatch
from blip2.data.dataset import BatchDataset, SkippedRecord, to_device
from blip2.data.records import Records
from blip2.data.sampler import sequential_batches
from blip2.data.workers import prefetch
from blip2.distributed import all_gather_objects
from blip2.errors import InputError
from blip2.io import to_plain
from blip2.model.generation import GenerationModel
from blip2.model.representation import RepresentationModel
from blip2.training.metrics import METRICS_FILE, from_mean, read_metrics, to_addend

LOWER_IS_BETTER = ("_loss", *(f"_{name}" for name in ObjectivesConfig().weights), "_perplexity", "_query_similarity")
"""Suffixes of the validation metrics for which lower is better: every loss, and some metrics."""
CALIBRATION_ERROR = "_expected_calibration_error"
"""Suffix of the evaluation metrics for which lower is better."""


@runtime_checkable
class Evaluator(Protocol):
    """An evaluation that is repeated during training."""

    @property
    def records(self) -> Records:
        """The held-out records."""
        ...

    def __call__(self, built: Built, step: int) -> dict[str, float | str]:
        """Return the metrics of the model after a step, by name.

        All processes must call it. The value of a metric that could not be computed is a text with the reason.
        """
        ...


@torch.no_grad()
def validate(
    model: RepresentationModel | GenerationModel,
    dataset: BatchDataset,
    recipe: Recipe,
    accelerator: Accelerator,
    log: Callable[[str], None],
    dummy_batch: StageBatch | None = None,
) -> dict[str, float]:
    """Compute the mean losses and metrics on the held-out pairs, with the same random numbers every time.

    All processes must call it.

    Args:
        model: the model.
        dataset: the held-out pairs.
        recipe: the settings of the run.
        accelerator: the accelerator of the run.
        log: called with a message if records were skipped.
        dummy_batch: a batch for processes that have fewer batches than others. They run it, and ignore the result, so
            that all processes take part in each forward pass, which sharded frozen parts need.

    Returns:
        The means, by name with the prefix ``validation_``. ``validation_loss`` is the sum of the losses weighted by
        ``recipe.objectives``.

    Raises:
        InputError: no record can be used, or ``training.metric_for_best_model`` names a metric that is not there.
    """
    records = dataset.records
    assert records is not None
    set_seed(recipe.training.seed)
    model.eval()
    sums: dict[str, torch.Tensor] = {}
    skipped: list[SkippedRecord] = []
    losses: set[str] = set()
    num_pairs = torch.zeros((), device=accelerator.device)
    batch_size, world_size = recipe.data.batch_size, accelerator.num_processes
    with accelerator.autocast():
        specs = sequential_batches(records, batch_size, accelerator.process_index, world_size)
        num_batches = math.ceil(math.ceil(len(records) / world_size) / batch_size)
        for loaded in islice(chain(prefetch(specs, dataset, 0), repeat(None)), num_batches):
            skipped += loaded.skipped if loaded is not None else ()
            if loaded is None or loaded.batch is None:
                if dummy_batch is not None:
                    model(dummy_batch)
                continue
            output = model(to_device(loaded.batch, accelerator.device))
            losses |= set(output.losses)
            for name, value in {**output.losses, **output.metrics}.items():
                addend = to_addend(name, value.float()) * len(loaded.keys)
                sums[name] = sums.get(name, torch.zeros_like(num_pairs)) + addend
            num_pairs += len(loaded.keys)
    model.train()
    if skipped:
        log(f"skipped {len(skipped)} records of data.validation; the first is {skipped[0]}")
    # A process without records does not know the names of the losses and metrics.
    gathered = all_gather_objects((list(sums), losses))
    names = sorted({name for rank_names, _ in gathered for name in rank_names})
    losses = set().union(*(rank_losses for _, rank_losses in gathered))
    zero = torch.zeros_like(num_pairs)
    packed = torch.stack([*(sums.get(name, zero) for name in names), num_pairs])
    totals = cast(torch.Tensor, accelerator.reduce(packed, "sum")).tolist()
    total_pairs = totals.pop()
    if not total_pairs:
        first = f": {skipped[0]}" if skipped else ""
        raise InputError(
            f"none of the {len(records)} records of data.validation can be used{first}: correct these records, or set"
            " data.validation to other data"
        )
    means = {name: from_mean(name, total / total_pairs) for name, total in zip(names, totals, strict=True)}
    loss = float(sum(recipe.objectives.weight(name) * means[name] for name in sorted(losses)))
    values = {f"validation_{name}": mean for name, mean in {"loss": loss, **means}.items()}
    best = recipe.training.metric_for_best_model or ""
    if best.startswith("validation_") and best not in values:
        raise InputError(
            f"training.metric_for_best_model is {best}, expected one of {', '.join(values)}: correct it, and rerun with"
            " --resume"
        )
    return values


def run_evaluation(evaluator: Evaluator, built: Built, step: int, recipe: Recipe, display: Display) -> dict[str, float]:
    """Evaluate the model after a step, and log which metrics are missing.

    Returns:
        The metrics that could be computed, by name.

    Raises:
        InputError: the metric that ``training.metric_for_best_model`` names is missing.
    """
    set_seed(recipe.training.seed)
    built.model.eval()
    with display.paused():
        metrics = evaluator(built, step)
    built.model.train()
    missing = {name: reason for name, reason in metrics.items() if isinstance(reason, str)}
    for name, reason in missing.items():
        display.log(f"{name} is missing: {reason}")
    values: dict[str, float] = {name: value for name, value in metrics.items() if not isinstance(value, str)}
    best = recipe.training.metric_for_best_model or ""
    if best.startswith("evaluation_") and best not in values:
        reason = missing.get(best) or f"expected one of {', '.join(values)}"
        raise InputError(
            f"training.metric_for_best_model is {best}, which is missing ({reason}): remove the cause or name another"
            " metric, and rerun with --resume"
        )
    return values


def is_better(value: float, best: float | None, name: str) -> bool:
    """Return whether a value of the metric `name` is better than `best`, the best value so far.

    Args:
        value: the new value. A value that is not finite is never better.
        best: the best value so far. None: any finite value is better.
        name: name of the metric, with the prefix ``validation_`` or ``evaluation_``.
    """
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    suffixes = LOWER_IS_BETTER if name.startswith("validation_") else CALIBRATION_ERROR
    return value < best if name.endswith(suffixes) else value > best


def best_metric(run: Path, name: str | None, since: int = 0) -> float | None:
    """Return the best value of a metric in the metrics file of a run.

    Args:
        run: folder of the run.
        name: name of the metric.
        since: number of steps; the values after these and earlier steps do not count.

    Returns:
        The best value; None if the file has no value of this metric.
    """
    best: float | None = None
    if name is not None and (run / METRICS_FILE).exists():
        for row in read_metrics(run):
            value = row.get(name)
            if row["step"] > since and isinstance(value, int | float) and is_better(value, best, name):
                best = value
    return best


def measurement_settings(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """Return what ``training.metric_for_best_model`` depends on besides the model, as plain values for JSON.

    Values that were measured with other settings cannot be compared: in smaller batches, for example, ITC is smaller.
    """
    name, settings = recipe.training.metric_for_best_model or "", {}
    if name.startswith("evaluation_") and recipe.evaluation is not None:
        settings = asdict(replace(recipe.evaluation, eval_steps=1))
    elif name.startswith("validation_"):
        data = {key: getattr(recipe.data, key) for key in ("validation", "batch_size", "max_length")}
        settings = {**data, **asdict(recipe.objectives), "processes": world_size}
    return to_plain({"metric": name, **settings})

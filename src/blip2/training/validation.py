"""What is measured of a model while it trains, on pairs that it is not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from blip2.builder import Built
from blip2.config import Recipe
from blip2.console import Display
from blip2.data.collate import StageBatch
from blip2.data.dataset import Preparation, Skipped, plan_evaluation, to_device
from blip2.data.records import Records
from blip2.data.workers import load
from blip2.distributed import gather_objects
from blip2.errors import InputError
from blip2.model.generation import GenerationModel
from blip2.model.representation import RepresentationModel
from blip2.training.metrics import METRICS, read_metrics

SMALL_IS_GOOD = ("loss", "_itc", "_itm", "_itg", "_lm", "_perplexity")
"""Ends of the names of validation metrics of which the smallest is the best."""


@runtime_checkable
class Evaluation(Protocol):
    """What measures a model beside its losses."""

    @property
    def records(self) -> Records:
        """What it looks at."""
        ...

    def __call__(self, built: Built, step: int) -> dict[str, float | str]:
        """Metrics of the model after a step; a text says why one is missing. All processes call it."""
        ...


@torch.no_grad()
def validate(
    model: RepresentationModel | GenerationModel,
    preparation: Preparation,
    recipe: Recipe,
    accelerator: Accelerator,
    say: Callable[[str], None],
    stand_in: StageBatch | None = None,
) -> dict[str, float]:
    """Mean losses and metrics over the held-out pairs, with the same draws every time; ``validation_loss`` is the sum
    of the losses as ``objectives`` weighs them.

    Args:
        stand_in: what a process that has no batch while others have one looks at instead, without counting it: where
            frozen parts are dealt out, all need what each has of them.
    """
    assert preparation.records is not None
    set_seed(recipe.training.seed)
    model.eval()
    sums: dict[str, torch.Tensor] = {}
    skipped: list[Skipped] = []
    losses: set[str] = set()
    weight = torch.zeros((), device=accelerator.device)
    with accelerator.autocast():
        plans = plan_evaluation(
            preparation.records, recipe.data.batch_size, accelerator.process_index, accelerator.num_processes
        )
        most = math.ceil(math.ceil(len(preparation.records) / accelerator.num_processes) / recipe.data.batch_size)
        for loaded in islice(chain(load(plans, preparation, 0), repeat(None)), most):
            skipped += loaded.skipped if loaded is not None else ()
            if loaded is None or loaded.batch is None:
                if stand_in is not None:
                    model(stand_in)
                continue
            outcome = model(to_device(loaded.batch, accelerator.device))
            losses |= set(outcome.losses)
            for name, value in {**outcome.losses, **outcome.metrics}.items():
                sums[name] = sums.get(name, torch.zeros_like(weight)) + value.float() * len(loaded.keys)
            weight += len(loaded.keys)
    model.train()
    if skipped:
        say(f"skipped {len(skipped)} records of data.validation; the first is {skipped[0]}")
    # A process may have had no record of its own.
    every = gather_objects((list(sums), losses))
    names = sorted({name for found, _ in every for name in found})
    losses = set().union(*(found for _, found in every))
    zero = torch.zeros_like(weight)
    both = torch.stack([*(sums.get(name, zero) for name in names), weight])
    totals = cast(torch.Tensor, accelerator.reduce(both, "sum")).tolist()
    count = totals.pop()
    means = {name: total / count for name, total in zip(names, totals, strict=True)}
    weights = vars(recipe.objectives)
    loss = float(sum(weights.get(name, 1.0) * means[name] for name in sorted(losses)))
    return {f"validation_{name}": mean for name, mean in {"loss": loss, **means}.items()}


def evaluate(evaluation: Evaluation, built: Built, step: int, recipe: Recipe, display: Display) -> dict[str, float]:
    """What `evaluation` measures of the model after a step, in evaluation mode; what is missing is said.

    Raises:
        InputError: the metric that the best is chosen by is missing.
    """
    set_seed(recipe.training.seed)
    built.model.eval()
    with display.paused():
        found = evaluation(built, step)
    built.model.train()
    missing = {name: why for name, why in found.items() if isinstance(why, str)}
    for name, why in missing.items():
        display.say(f"{name} is missing: {why}")
    values: dict[str, float] = {name: value for name, value in found.items() if not isinstance(value, str)}
    best = recipe.training.metric_for_best_model or ""
    if best.startswith("evaluation_") and best not in values:
        why = missing.get(best) or f"expected one of {', '.join(values)}"
        raise InputError(
            f"training.metric_for_best_model is {best}, which is missing ({why}): mend that and go on with --resume"
        )
    return values


def is_better(value: float, best: float | None, name: str) -> bool:
    """Whether a metric is better than the best so far, of which there may be none."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return value < best if name.startswith("validation_") and name.endswith(SMALL_IS_GOOD) else value > best


def best_so_far(run: Path, name: str | None) -> float | None:
    """The best value of a metric among those that a run has written."""
    best: float | None = None
    if name is not None and (run / METRICS).exists():
        for row in read_metrics(run):
            if name in row and is_better(row[name], best, name):
                best = row[name]
    return best

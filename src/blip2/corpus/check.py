"""Check a round of CapFilt: do the bootstrapped captions train a better model than the captions before it?

A ranker prefers the captions that it selected, so its scores cannot tell whether a round helps. Stage 1 is therefore
trained on both corpora, from the same start and for the same number of steps, and compared on held-out pairs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blip2.config import Recipe
from blip2.errors import InputError
from blip2.evaluation.in_training import train
from blip2.training.metrics import read_metrics

SIDES = ("before", "after")
"""The corpora that are compared: with the captions before the round, and with those after it."""


def check_round(recipe: Recipe, before: str, after: str, output: Path, runs: int) -> dict[str, Any]:
    """Train stage 1 on the captions before and after a round, and compare the recall on held-out pairs.

    A check that was interrupted resumes where it stopped.

    Args:
        recipe: a recipe of stage 1 that evaluates retrieval. ``data.train``, ``output`` and ``training.seed`` are
            replaced.
        before: the source of the captions before the round, as in ``data.train``.
        after: the source of the captions after the round.
        output: folder of the runs.
        runs: number of runs on each source, with the seeds 0, 1 ...

    Returns:
        The result of :func:`judge`, and ``held_out``, the source of the held-out pairs, and ``steps``.

    Raises:
        InputError: the recipe does not evaluate retrieval, or a run fails.
    """
    check_recipe(recipe)
    assert recipe.evaluation is not None
    scores: dict[str, list[float]] = {side: [] for side in SIDES}
    chance = 0.0
    for seed in range(runs):
        for side, source in zip(SIDES, (before, after), strict=True):
            folder = output / f"{side}-{seed}"
            # Cached features need a table; both sides are read in the same way.
            streaming = False if recipe.data.cached_views else recipe.data.streaming
            data = replace(recipe.data, train=source, streaming=streaming)
            data = replace(data, features=data.features or str(output / "features"))
            run = replace(recipe, output=str(folder), data=data, training=replace(recipe.training, seed=seed))
            train(run, resume=True)
            score, chance = _read_recall(folder, recipe)
            scores[side].append(score)
    return {
        **judge(scores["before"], scores["after"], chance),
        "held_out": recipe.evaluation.data,
        "steps": recipe.training.max_steps,
    }


def check_recipe(recipe: Recipe) -> None:
    """Raise an InputError unless a recipe evaluates retrieval."""
    if recipe.evaluation is None or recipe.evaluation.task != "retrieval":
        found = "no evaluation" if recipe.evaluation is None else f"evaluation.task {recipe.evaluation.task}"
        raise InputError(
            f"the recipe of --check has {found}, expected a recipe of stage representation with evaluation.task"
            " retrieval and evaluation.data, held-out pairs whose captions are true: add them"
        )


def judge(before: Sequence[float], after: Sequence[float], chance: float) -> dict[str, Any]:
    """Decide whether a round is accepted.

    A round is refused if the mean recall after it is lower by more than the spread, or if no recall is above chance by
    more than the spread, because the runs then cannot tell the two apart. The spread is the standard deviation over
    runs, pooled over both sides; 0 for a single run.

    Args:
        before: recall at 1 of each run on the captions before the round, in [0, 1].
        after: recall at 1 of each run on the captions after the round.
        chance: recall at 1 of a random ranking.

    Returns:
        The arguments, ``spread``, ``accepted``, and ``reason``, a sentence.
    """
    variances = [statistics.variance(values) if len(values) > 1 else 0.0 for values in (before, after)]
    spread = math.sqrt(statistics.mean(variances))
    means = [statistics.mean(values) for values in (before, after)]
    found = f"held-out R@1 is {100 * means[1]:.1f} % after the round and {100 * means[0]:.1f} % before it"
    found += f" (spread {100 * spread:.1f}, chance {100 * chance:.1f})"
    is_conclusive = max(means) > chance + spread
    accepted = is_conclusive and means[1] >= means[0] - spread
    reason = f"the round is {'accepted' if accepted else 'refused'}: {found}"
    if not is_conclusive:
        reason += ", which is no better than chance, so that the check cannot tell: train for more steps"
    return {
        "before": list(before), "after": list(after), "chance": chance, "spread": spread, "accepted": accepted,
        "reason": reason,
    }  # fmt: skip


def _read_recall(folder: Path, recipe: Recipe) -> tuple[float, float]:
    """Return the recall at 1, averaged over both directions, after the last step of a run, and that of chance."""
    assert recipe.evaluation is not None
    ranking = recipe.evaluation.fusion if recipe.evaluation.rerank_k else "itc"
    names = [f"evaluation_{ranking}_{side}@1" for side in ("TR", "IR")]
    last = next(row for row in reversed(read_metrics(folder)) if names[0] in row)
    return statistics.mean(last[name] for name in names), last["evaluation_chance_r1"]

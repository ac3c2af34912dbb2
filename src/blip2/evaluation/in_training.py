"""Evaluating a model while it trains: the section ``evaluation`` of a recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from blip2.builder import Built
from blip2.config import Recipe
from blip2.evaluation.run import evaluate_pipeline, open_table, settings_of
from blip2.pipelines import connect
from blip2.training import trainer as loop


def train(recipe: Recipe, resume: bool = False) -> Path:
    """:func:`blip2.training.trainer.train` with the evaluation that the recipe asks for.

    Raises:
        InputError: as there, or the evaluation's data cannot be read or do not fit its task.
    """
    return loop.train(recipe, resume, Evaluation)


class Evaluation:
    """Measures a model as ``blip2 evaluate`` does, on the same weights with the same results.

    Its folder is ``evaluation/step-...`` in that of the run. One that was killed goes on where it was.
    """

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.evaluation is not None
        self.recipe, self.config = recipe, recipe.evaluation
        self.table = open_table(replace(recipe.data, train=self.config.data), self.config.limit)
        self.records = self.table.records
        self.settings = settings_of(self.config, recipe.training.seed)

    def __call__(self, built: Built, step: int) -> dict[str, float | str]:
        """Metrics of the model, whose names begin with ``evaluation_``; a text says why one is missing."""
        folder = Path(self.recipe.output)
        _, found = evaluate_pipeline(
            connect(built, self.recipe, folder), self.config.task, self.table,
            folder / "evaluation" / f"step-{step:08d}", self.settings, anew=True,
        )  # fmt: skip
        values: dict[str, float | str] = {}
        for name, value in found.items():
            if isinstance(value, dict) and not name.startswith("by_"):  # those are many, and stand in the folder
                prefix = "" if name == "missing" else f"{name}_"
                values |= {f"{prefix}{key}": each for key, each in value.items()}
            elif isinstance(value, float):
                values[name] = value
        return {f"evaluation_{name}": value for name, value in values.items()}

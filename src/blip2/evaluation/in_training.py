"""Evaluate a model during training: the ``evaluation`` section of a recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from blip2.builder import Built
from blip2.config import Recipe
from blip2.evaluation.control import CONTROLS, GAPS, flatten_scores
from blip2.evaluation.data import EvalData
from blip2.evaluation.run import evaluate_pipeline
from blip2.evaluation.tasks import find_candidates, group_captioned_images, reference_answers
from blip2.pipelines import make_pipeline
from blip2.training import trainer


def train(recipe: Recipe, resume: bool = False, encoder: nn.Module | None = None) -> Path:
    """Train with :func:`blip2.training.trainer.train`, and evaluate as the recipe says.

    Args:
        recipe: the settings of the run.
        resume: continue from the last checkpoint in ``recipe.output``, if there is one.
        encoder: the image encoder, for a recipe with ``vision.name`` module or features: a torch module that maps
            pixels [B, 3, H, W], or arrays [B, P, E], to features [B, P, E] or to an output of transformers. It is run
            once on a blank input to check its output. It stays frozen unless ``optimizer.learning_rate`` has a rate for
            "vision.*", and its weights are in the checkpoints only if it trains.

    Returns:
        The folder of the last checkpoint.

    Raises:
        InputError: as for :func:`blip2.training.trainer.train`, or the data of the evaluation cannot be read or does
            not fit the task.
    """
    return trainer.train(recipe, resume, Evaluation, encoder)


class Evaluation:
    """Evaluates a model in training, with the same results as ``blip2 evaluate`` on the same weights.

    Results go to ``evaluation/step-...`` in the folder of the run. An interrupted evaluation resumes where it stopped.
    """

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.evaluation is not None
        self.recipe, self.config = recipe, recipe.evaluation
        data = replace(recipe.data, train=self.config.data)
        self.data = EvalData(data, self.config.limit, recipe.vision.reads_features)
        self.records = self.data.dataset
        # What cannot be scored or ranked is found before the training.
        if self.config.task != "vqa":
            group_captioned_images(self.data)
            return
        references = reference_answers(self.data)
        if self.config.rank_by is not None:
            find_candidates(self.data, self.config.answer_list, references, self.config.rules)

    def __call__(self, built: Built, step: int) -> dict[str, float | str]:
        """Return the metrics, by name with the prefix ``evaluation_``.

        The value of a metric that could not be computed is a text with the reason.
        """
        folder = Path(self.recipe.output)
        _, metrics = evaluate_pipeline(
            make_pipeline(built, self.recipe.model, folder), self.config, self.data,
            folder / "evaluation" / f"step-{step:08d}", self.recipe.training.seed, overwrite=True,
        )  # fmt: skip
        values: dict[str, float | str] = {}
        for name, value in metrics.items():
            if name in (*CONTROLS, *GAPS.values()):
                values |= {f"{name}_{key.replace(' ', '_')}": score for key, score in flatten_scores(value)}
            elif isinstance(value, dict) and not name.startswith("by_"):  # scores by type are only in the folder
                prefix = "" if name == "missing" else f"{name}_"
                values |= {f"{prefix}{key}": each for key, each in value.items() if not isinstance(each, dict)}
            elif isinstance(value, float):
                values[name] = value
        return {f"evaluation_{name}": value for name, value in values.items()}

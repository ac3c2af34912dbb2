"""What a run that goes on says of a recipe that has changed since its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from blip2.checkpoint import check_qformer
from blip2.config import Recipe
from blip2.errors import InputError
from blip2.interop.checkpoint import Checkpoint

WITHOUT_EFFECT = ("start_from", "qformer.bert", "language.projection_init")
"""They say how a run begins, and this one has begun."""


def compare_recipes(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """Compare a recipe with that of the checkpoint from which a run goes on.

    Returns:
        A line on the keys that have changed, and one on those of them that no longer have an effect.

    Raises:
        InputError: the recipe is of another stage, or of a Q-Former that the weights are not for.
    """
    before = checkpoint.recipe
    if before.stage != recipe.stage:
        raise InputError(
            f"{checkpoint.name} is of stage {before.stage}, and the recipe of stage {recipe.stage}: give another"
            " output, with start_from for the weights"
        )
    check_qformer(checkpoint, recipe)
    old, new = dict(_flat(asdict(before))), dict(_flat(asdict(recipe)))
    changed = [key for key in old | new if old.get(key) != new.get(key) and key != "output"]
    lines = []
    counts = [f"{key} from {old.get(key)} to {new.get(key)}" for key in changed if key not in WITHOUT_EFFECT]
    if counts:
        lines.append(f"the recipe has changed since the checkpoint, and its new values hold: {', '.join(counts)}")
    idle = [key for key in changed if key in WITHOUT_EFFECT]
    if idle:
        lines.append(f"{', '.join(idle)} changed too, without effect: it says how a run begins, and this one goes on")
    return lines


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each key of a recipe with the keys above it."""
    for key, value in values.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" not in ("optimizer.learning_rate", "data.train"):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value

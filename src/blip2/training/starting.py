"""Starting from what another run, or somebody else, has trained."""

from __future__ import annotations

from pathlib import Path

from blip2.build import Built
from blip2.config import Recipe
from blip2.interop.formats import is_pickle, open_foreign
from blip2.model.generation import GenerationModel
from blip2.training import checkpoint
from blip2.training.progress import Display


def start_from(recipe: Recipe, built: Built, display: Display) -> None:
    """Load the trained weights of a checkpoint of any format, of this stage or of the one before."""
    assert recipe.start_from is not None
    known: dict[str, object] = {"vision.name": recipe.vision.name, "qformer.heads": recipe.qformer.heads}
    if recipe.language is not None:
        known["language.name"] = recipe.language.name
    name = recipe.start_from  # a pickle says nothing of its frozen parts
    found = (open_foreign(name, known) if is_pickle(name) else None) or checkpoint.open_checkpoint(name)
    new = checkpoint.load_previous_stage(found, built.model)
    if isinstance(built.model, GenerationModel) and "projection.weight" in new:
        built.model.initialise_projection()
    parts = sorted({name.split(".")[0] for name in new})
    display.say(f"starting from {found.name} ({found.about})" + (f"; new: {', '.join(parts)}" if parts else ""))
    if found.holds_vision and found.name not in (recipe.vision.name, str(Path(recipe.vision.name).absolute())):
        display.say(f"its own image encoder is left out for vision.name {recipe.vision.name}")
    for key, of in (("image_norm_eps", "qformer"), ("activation", "language")):
        theirs, ours = (getattr(getattr(each, of), key, None) for each in (found.recipe, recipe))
        if theirs != ours and getattr(found.recipe, of) is not None:
            display.say(f"its {of}.{key} is {theirs}, the recipe's {ours}: results begin a little apart")

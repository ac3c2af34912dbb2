"""Bytes that a process sends to the others in a training step (docs/scale.md)."""

from __future__ import annotations

from typing import Literal, NamedTuple

from blip2.config import Recipe
from blip2.data.dataset import SKIP_REASONS


class Collective(NamedTuple):
    """A collective operation of one step."""

    name: str
    operation: Literal["all-gather", "all-to-all", "all-reduce"]
    bytes: int
    """Size of the tensor that each process contributes."""

    def sent(self, world_size: int) -> float:
        """Return the bytes that each process sends with a ring algorithm."""
        others = world_size - 1
        return self.bytes * {"all-gather": others, "all-to-all": others / world_size}.get(
            self.operation, 2 * others / world_size
        )


def step_traffic(
    recipe: Recipe, num_trained: int, num_tokens: int, width: int, length: int, world_size: int
) -> list[Collective]:
    """List the collectives of one optimizer step in which the frozen parts are not sharded.

    Args:
        num_trained: number of weights that train; their gradients are in float32.
        num_tokens, width: P and E, the shape of the image features.
        length: T, length of the longest text of the step in tokens.
    """
    batch, objectives = recipe.data.batch_size, recipe.objectives
    num_metrics = 3  # stage 2: loss, perplexity and accuracy
    if recipe.stage == "representation":
        num_metrics = 3 * bool(objectives.itc) + 2 * bool(objectives.itm) + 2 * bool(objectives.itg)
    # Query diversity and similarity.
    num_metrics += bool(objectives.query_diversity) + 2 * (recipe.qformer.num_query_tokens > 1)
    # And weighted loss, number of labels, and counts of skipped records, truncated captions, shards and sources.
    num_values = 2 + num_metrics + len(SKIP_REASONS) + 2 + len(recipe.data.sources)
    collectives = [
        Collective("gradients", "all-reduce", 4 * num_trained),
        Collective("losses and metrics", "all-reduce", 4 * num_values),
        Collective("system metrics", "all-gather", 4 * 4),
    ]
    if recipe.stage == "generation" or not (objectives.itc or objectives.itm):
        return collectives
    images, texts = (
        4 * batch * recipe.qformer.image_text_hidden_size * n for n in (recipe.qformer.num_query_tokens, 1)
    )
    contrastive = [
        Collective("image embeddings", "all-gather", images),
        Collective("text embeddings", "all-gather", texts),
        Collective("text tokens", "all-gather", 8 * batch * length),
        Collective("image ids", "all-gather", 8 * batch),
        Collective("longest text", "all-reduce", 8),
    ]
    if objectives.itc:
        contrastive += [
            Collective("gradients of the image embeddings", "all-to-all", images * world_size),
            Collective("gradients of the text embeddings", "all-to-all", texts * world_size),
        ]
    if objectives.itm:
        contrastive += [
            Collective("indices of the hard negatives", "all-gather", 8 * batch),
            Collective("features of the hard negatives", "all-to-all", 4 * batch * num_tokens * width),
            Collective("text masks", "all-gather", batch * length),
            Collective("longest text, again", "all-reduce", 8),
        ]
    return collectives + [
        each._replace(bytes=each.bytes * recipe.training.gradient_accumulation_steps) for each in contrastive
    ]

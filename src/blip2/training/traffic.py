"""What a process sends to the others in a step, in bytes (docs/scale.md)."""

from __future__ import annotations

from typing import Literal, NamedTuple

from blip2.config import Recipe
from blip2.data.dataset import CAUSES


class Travel(NamedTuple):
    """A collective of one step."""

    what: str
    how: Literal["all-gather", "all-to-all", "all-reduce"]
    bytes: int
    """Of the tensor that each process gives in."""

    def sent(self, processes: int) -> float:
        """Bytes that each process sends, where they stand in a ring."""
        others = processes - 1
        return self.bytes * {"all-gather": others, "all-to-all": others / processes}.get(
            self.how, 2 * others / processes
        )


def step_traffic(recipe: Recipe, trained: int, tokens: int, width: int, length: int, processes: int) -> list[Travel]:
    """Everything that travels between processes in one optimizer step while the frozen parts are whole in each.

    Args:
        trained: number of weights that train, whose gradients are in float32.
        tokens, width: of the image features, P and E.
        length: the longest text of the step in tokens, T.
        processes: how many take part.
    """
    batch, objectives = recipe.data.batch_size, recipe.objectives
    numbers = 3  # of stage 2: its loss, perplexity and accuracy
    if recipe.stage == "representation":
        numbers = 3 * bool(objectives.itc) + 2 * bool(objectives.itm) + 2 * bool(objectives.itg)
    numbers += bool(objectives.query_diversity) + 2 * (
        recipe.qformer.num_query_tokens > 1
    )  # and how much queries differ
    travels = [
        Travel("gradients", "all-reduce", 4 * trained),
        # Beside them their sum, the number of labels, what was skipped and cut, shards, and samples of each source.
        Travel("losses and metrics", "all-reduce", 4 * (2 + numbers + len(CAUSES) + 2 + len(recipe.data.sources))),
        Travel("what is watched", "all-gather", 4 * 4),
    ]
    if recipe.stage == "generation" or not (objectives.itc or objectives.itm):
        return travels
    images, texts = (
        4 * batch * recipe.qformer.image_text_hidden_size * n for n in (recipe.qformer.num_query_tokens, 1)
    )
    contrastive = [
        Travel("embeddings of images", "all-gather", images),
        Travel("embeddings of texts", "all-gather", texts),
        Travel("tokens of texts", "all-gather", 8 * batch * length),
        Travel("which image", "all-gather", 8 * batch),
        Travel("longest text", "all-reduce", 8),
    ]
    if objectives.itc:
        contrastive += [
            Travel("gradients of images' embeddings", "all-to-all", images * processes),
            Travel("gradients of texts' embeddings", "all-to-all", texts * processes),
        ]
    if objectives.itm:
        contrastive += [
            Travel("which negatives", "all-gather", 8 * batch),
            Travel("features of drawn negatives", "all-to-all", 4 * batch * tokens * width),
            Travel("which tokens are real", "all-gather", batch * length),
            Travel("longest text, again", "all-reduce", 8),
        ]
    return travels + [
        each._replace(bytes=each.bytes * recipe.training.gradient_accumulation_steps) for each in contrastive
    ]

"""Image-text retrieval (paper §4.4): recall at k of both directions.

An image of COCO or Flickr30K has five texts: it counts as found at k (TR@k) if any of them is among its k best texts,
and a text (IR@k) if its one image is among its k best images. Of equal scores the wrong ones come first.

Legend: I images, T texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from blip2.pipelines import RepresentationPipeline

CUTOFFS = (1, 5, 10)
Recall = dict[str, float]
"""``r1``, ``r5``, ``r10``: shares in [0, 1]."""
Fusion = Literal["itm", "itm+itc"]
"""What candidates are ranked anew by. ``itm``: the matching score, as the paper says. ``itm+itc``: the logit of
"matched" plus the similarity, which is what the reference implementation does."""


@dataclass(frozen=True)
class Retrieval:
    """Scores of all pairs, and what follows from them. Larger is better."""

    image_scores: Float[Tensor, "I T"]
    """What texts are ranked by for each image: only the order along a row means something."""
    text_scores: Float[Tensor, "I T"]
    """What images are ranked by for each text: only the order down a column means something."""
    positive: Bool[Tensor, "I T"]
    by_similarity: Retrieval | None = None
    """The same by similarity (ITC) alone, where the best were ranked anew."""

    @property
    def image_to_text(self) -> Recall:
        """TR@k."""
        return recall(self.image_scores, self.positive)

    @property
    def text_to_image(self) -> Recall:
        """IR@k."""
        return recall(self.text_scores.T, self.positive.T)

    @property
    def chance(self) -> Recall:
        """What guessing would give, averaged over both directions."""
        sides = [_chance(self.positive), _chance(self.positive.T)]
        return {key: sum(side[key] for side in sides) / 2 for key in sides[0]}


def recall(scores: Float[Tensor, "N M"], positive: Bool[Tensor, "N M"]) -> Recall:
    """Share of rows that have a positive among their k best columns."""
    best = ranks(scores, positive)
    return {f"r{k}": float(((best < k) & positive.any(dim=1)).float().mean()) for k in CUTOFFS}


def ranks(scores: Float[Tensor, "N M"], positive: Bool[Tensor, "N M"]) -> Int[Tensor, "N"]:
    """How many columns score higher than a row's best positive. Ties and NaN count against it."""
    best = scores.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
    return (~(scores < best) & ~positive).sum(dim=1)


def _chance(positive: Bool[Tensor, "N M"]) -> Recall:
    columns = positive.shape[1]
    rows = positive.sum(dim=1).tolist()
    drawn = {f"r{k}": min(k, columns) for k in CUTOFFS}
    return {r: sum(1 - comb(columns - p, k) / comb(columns, k) for p in rows) / len(rows) for r, k in drawn.items()}


def evaluate_retrieval(
    pipeline: RepresentationPipeline,
    features: Float[Tensor, "I P E"],
    texts: list[str],
    positive: Bool[Tensor, "I T"],
    candidates: int = 128,
    fusion: Fusion = "itm",
) -> Retrieval:
    """Rank all texts for each image and all images for each text.

    As in the paper, the `candidates` best by similarity (ITC) are ranked anew by their matching score (ITM), in each
    direction its own. 0 leaves the ranking to the similarity alone.
    """
    similarity = pipeline.similarity(features, texts).cpu()
    if not candidates:
        return Retrieval(similarity, similarity, positive)
    chosen = choose(similarity, candidates)
    ids, mask = pipeline.encode_texts(texts)
    logits = [match(pipeline, image, ids, mask, row) for image, row in zip(features.split(1), chosen.any, strict=True)]
    return rerank(similarity, positive, chosen, logits, fusion)


class Candidates(NamedTuple):
    """Pairs that are ranked anew, in each direction its own."""

    for_images: Bool[Tensor, "I T"]
    """Among the best texts of their image."""
    for_texts: Bool[Tensor, "I T"]
    """Among the best images of their text."""

    @property
    def any(self) -> Bool[Tensor, "I T"]:
        return self.for_images | self.for_texts


def choose(similarity: Float[Tensor, "I T"], count: int) -> Candidates:
    """The `count` best in each direction."""

    def best(dimension: int) -> Bool[Tensor, "I T"]:
        places = similarity.topk(min(count, similarity.shape[dimension]), dimension).indices
        return torch.zeros_like(similarity, dtype=torch.bool).scatter(dimension, places, True)

    return Candidates(best(1), best(0))


def match(
    pipeline: RepresentationPipeline,
    image: Float[Tensor, "1 P E"],
    ids: Int[Tensor, "T L"],
    mask: Bool[Tensor, "T L"],
    wanted: Bool[Tensor, "T"],
) -> Float[Tensor, "K 2"]:
    """Logits of (not matched, matched) of an image with those of all texts that are wanted, in their order."""
    some = wanted.nonzero().T.to(ids.device)
    return pipeline.model.match_candidates(image, ids, mask, some, 4 * pipeline.batch_size)[0].cpu()


def rerank(
    similarity: Float[Tensor, "I T"],
    positive: Bool[Tensor, "I T"],
    chosen: Candidates,
    logits: Sequence[Float[Tensor, "_ 2"]],
    fusion: Fusion,
) -> Retrieval:
    """Candidates in their new order, before all others in the order they had.

    Args:
        logits: what :func:`match` gives for each image.
    """
    matching = torch.zeros_like(similarity)
    for row, wanted, pairs in zip(matching, chosen.any, logits, strict=True):
        row[wanted] = (pairs[:, 1] - (pairs[:, 0] if fusion == "itm" else 0)).to(row.dtype)
    if fusion == "itm+itc":
        matching += similarity
    behind = similarity - 1000.0
    return Retrieval(
        matching.where(chosen.for_images, behind), matching.where(chosen.for_texts, behind), positive,
        Retrieval(similarity, similarity, positive),
    )  # fmt: skip

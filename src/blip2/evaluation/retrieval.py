"""Image-text retrieval (paper §4.4): recall at k of both directions.

Legend: I images, T texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from blip2.inference import RepresentationPipeline

CUTOFFS = (1, 5, 10)
Recall = dict[str, float]
"""``r1``, ``r5``, ``r10``: shares in [0, 1]."""


@dataclass(frozen=True)
class Retrieval:
    """Scores of all pairs, and what follows from them."""

    scores: Float[Tensor, "I T"]
    """Larger is better; only the order along a row or a column means something."""
    positive: Bool[Tensor, "I T"]

    @property
    def image_to_text(self) -> Recall:
        return recall(self.scores, self.positive)

    @property
    def text_to_image(self) -> Recall:
        return recall(self.scores.T, self.positive.T)

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
) -> Retrieval:
    """Rank all texts for each image and all images for each text.

    As in the paper, the `candidates` best by similarity (ITC) are ranked anew by their matching score (ITM). 0
    leaves the ranking to the similarity alone.
    """
    similarity = pipeline.similarity(features, texts).cpu()
    if not candidates:
        return Retrieval(similarity, positive)
    shortlist = torch.zeros_like(positive)
    for dimension, count in ((1, len(texts)), (0, len(features))):
        shortlist.scatter_(dimension, similarity.topk(min(candidates, count), dimension).indices, True)
    scores = similarity - 1000.0  # behind every candidate, in their own order
    for i, row in enumerate(shortlist):
        chosen = row.nonzero().squeeze(1)
        own = [texts[j] for j in chosen]
        logits = pipeline.match_candidates(features[i : i + 1], own, torch.arange(len(own))[None])
        scores[i, chosen] = (logits[0, :, 1] - logits[0, :, 0]).cpu()
    return Retrieval(scores, positive)

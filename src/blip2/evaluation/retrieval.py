"""Image-text retrieval (paper §4.4): recall at k in both directions.

An image of COCO or Flickr30K has five texts. TR@k counts an image as found if any of its texts is among its k best
texts, and IR@k counts a text as found if its image is among its k best images. In ties, wrong candidates rank first.

Legend: I images, T texts, P image tokens, E width of the image encoder, L longest text in tokens, K selected texts, N
rows and M columns of a matrix of scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from blip2.config import Fusion
from blip2.pipelines import RepresentationPipeline

CUTOFFS = (1, 5, 10)
Recall = dict[str, float]
"""Recall at each of :data:`CUTOFFS` as ``r1``, ``r5``, ``r10``, in [0, 1]."""


@dataclass(frozen=True)
class RetrievalResult:
    """Scores of all image-text pairs and the recall computed from them. Larger scores are better."""

    scores_i2t: Float[Tensor, "I T"]
    """Scores that rank the texts for each image; comparable only within a row."""
    scores_t2i: Float[Tensor, "I T"]
    """Scores that rank the images for each text; comparable only within a column."""
    positive: Bool[Tensor, "I T"]
    """True for pairs that match."""
    itc: RetrievalResult | None = None
    """The result of ranking by similarity (ITC) alone, if candidates were re-ranked; else None."""

    @property
    def image_to_text(self) -> Recall:
        """TR@k: recall of the texts of an image."""
        return recall(self.scores_i2t, self.positive)

    @property
    def text_to_image(self) -> Recall:
        """IR@k: recall of the image of a text."""
        return recall(self.scores_t2i.T, self.positive.T)

    @property
    def chance(self) -> Recall:
        """Expected recall of a random ranking, averaged over both directions."""
        sides = [_chance(self.positive), _chance(self.positive.T)]
        return {key: sum(side[key] for side in sides) / 2 for key in sides[0]}


def recall(scores: Float[Tensor, "N M"], positive: Bool[Tensor, "N M"]) -> Recall:
    """Compute the share of rows that have a positive column among their k best columns, for k in :data:`CUTOFFS`."""
    best = ranks(scores, positive)
    return {f"r{k}": float(((best < k) & positive.any(dim=1)).float().mean()) for k in CUTOFFS}


def ranks(scores: Float[Tensor, "N M"], positive: Bool[Tensor, "N M"]) -> Int[Tensor, "N"]:
    """Return the rank of the best positive column of each row, from 0.

    Negative columns with the same score, or with NaN, rank before the positive column.
    """
    best = scores.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
    return (~(scores < best) & ~positive).sum(dim=1)


def _chance(positive: Bool[Tensor, "N M"]) -> Recall:
    columns = positive.shape[1]
    rows = positive.sum(dim=1).tolist()
    cutoffs = {f"r{k}": min(k, columns) for k in CUTOFFS}
    return {r: sum(1 - comb(columns - p, k) / comb(columns, k) for p in rows) / len(rows) for r, k in cutoffs.items()}


def evaluate_retrieval(
    pipeline: RepresentationPipeline,
    features: Float[Tensor, "I P E"],
    texts: list[str],
    positive: Bool[Tensor, "I T"],
    rerank_k: int = 128,
    fusion: Fusion = "itm",
) -> RetrievalResult:
    """Rank all texts for each image and all images for each text.

    As in the paper, the `rerank_k` best candidates by similarity (ITC) are re-ranked by their matching score (ITM),
    separately in each direction.

    Args:
        pipeline: the stage-1 model.
        features: features of the images.
        texts: the texts.
        positive: True for pairs that match.
        rerank_k: number of candidates of each image and of each text. 0: all are ranked by similarity alone.
        fusion: score by which the candidates are re-ranked; see :attr:`blip2.config.EvaluationConfig.fusion`.
    """
    similarity = pipeline.similarity(features, texts).cpu()
    if not rerank_k:
        return RetrievalResult(similarity, similarity, positive)
    candidates = select_candidates(similarity, rerank_k)
    ids, mask = pipeline.tokenize(texts)
    rows = zip(features.split(1), candidates.union, strict=True)
    logits = [itm_logits(pipeline, image, ids, mask, row) for image, row in rows]
    return rerank(similarity, positive, candidates, logits, fusion, pipeline.itc_temperature)


class Candidates(NamedTuple):
    """The pairs to re-rank in each direction."""

    i2t: Bool[Tensor, "I T"]
    """True for pairs whose text is among the best texts of the image."""
    t2i: Bool[Tensor, "I T"]
    """True for pairs whose image is among the best images of the text."""

    @property
    def union(self) -> Bool[Tensor, "I T"]:
        """Pairs to re-rank in either direction."""
        return self.i2t | self.t2i


def select_candidates(similarity: Float[Tensor, "I T"], k: int) -> Candidates:
    """Select the `k` pairs with the largest similarity for each image and for each text."""

    def best(dim: int) -> Bool[Tensor, "I T"]:
        indices = similarity.topk(min(k, similarity.shape[dim]), dim).indices
        return torch.zeros_like(similarity, dtype=torch.bool).scatter(dim, indices, True)

    return Candidates(best(1), best(0))


def itm_logits(
    pipeline: RepresentationPipeline,
    image: Float[Tensor, "1 P E"],
    ids: Int[Tensor, "T L"],
    mask: Bool[Tensor, "T L"],
    selected: Bool[Tensor, "T"],
) -> Float[Tensor, "K 2"]:
    """Compute the ITM logits (not matched, matched) of an image with each of the selected texts.

    Args:
        pipeline: the stage-1 model.
        image: features of the image.
        ids: tokens of all texts, padded on the right.
        mask: True for text tokens, False for padding.
        selected: True for the texts to compare with the image.

    Returns:
        The logits, in the order of the texts.
    """
    indices = selected.nonzero().T.to(ids.device)
    return pipeline.model.match_candidates(image, ids, mask, indices, 4 * pipeline.batch_size)[0].cpu()


def rerank(
    similarity: Float[Tensor, "I T"],
    positive: Bool[Tensor, "I T"],
    candidates: Candidates,
    logits: Sequence[Float[Tensor, "_ 2"]],
    fusion: Fusion,
    temperature: float,
) -> RetrievalResult:
    """Rank the candidates by `fusion`, and all other pairs after the candidates, by similarity.

    Args:
        similarity: ITC similarity of all pairs.
        positive: True for pairs that match.
        candidates: pairs to re-rank.
        logits: the result of :func:`itm_logits` for each image.
        fusion: score by which the candidates are re-ranked; see :attr:`blip2.config.EvaluationConfig.fusion`.
        temperature: the temperature of ITC.
    """
    scale = {"itm": 0.0, "itm+itc": 1.0, "itm+itc/temperature": 1 / temperature}[fusion]
    matching = torch.zeros_like(similarity)
    for row, selected, pairs in zip(matching, candidates.union, logits, strict=True):
        row[selected] = (pairs[:, 1] - (0 if fusion == "itm+itc" else pairs[:, 0])).to(row.dtype)
    if scale:
        matching += scale * similarity
    others = similarity - (1000.0 + scale)  # below every candidate
    return RetrievalResult(
        matching.where(candidates.i2t, others), matching.where(candidates.t2i, others), positive,
        RetrievalResult(similarity, similarity, positive),
    )  # fmt: skip

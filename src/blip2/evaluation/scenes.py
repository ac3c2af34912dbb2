"""What a model knows of scenes (:mod:`blip2.data.scenes`): facts in captions, answers by type, twins told apart.

Every scene has an exact truth, so that a caption in any words can be judged fact by fact.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from blip2.data.scene_facts import score_caption
from blip2.data.scene_texts import Truth
from blip2.evaluation.vqa import normalize
from blip2.io import parse_json
from blip2.model.representation import RepresentationBatch
from blip2.pipelines import RepresentationPipeline


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of one of the files of a set of scenes."""
    return [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_truths(rows: Sequence[Mapping[str, Any]]) -> list[Truth]:
    """Return the truth of each row."""
    return [Truth.of_json(row["truth"]) for row in rows]


def score_facts(captions: Sequence[str], truths: Sequence[Truth]) -> dict[str, float]:
    """Return the share of captions that state each fact rightly, over the scenes that have it.

    Returns:
        ``objects`` (all kinds and no other), ``color``, ``relation`` (pairs), ``order`` (three kinds), ``count``,
        ``size``, and ``all``, the share of captions with every fact of their scene. In [0, 1]; facts that no scene has
        are left out.
    """
    shares: defaultdict[str, list[bool]] = defaultdict(list)
    for caption, truth in zip(captions, truths, strict=True):
        facts = {name: right for name, right in score_caption(caption, truth).items() if right is not None}
        for name, right in facts.items():
            shares[name].append(right)
        shares["all"].append(all(facts.values()))
    return {name: sum(rights) / len(rights) for name, rights in shares.items()}


def score_answers(answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the share of right answers for each ``question_type``, and of all as ``all``, in [0, 1]."""
    shares: defaultdict[str, list[bool]] = defaultdict(list)
    for answer, row in zip(answers, rows, strict=True):
        right = normalize(answer) in {normalize(each) for each in row["answers"]}
        for name in (row["question_type"], "all"):
            shares[name].append(right)
    return {name: sum(rights) / len(rights) for name, rights in shares.items()}


def majority_answers(train: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Answer each question with the most frequent answer of its words in training, or else of its type."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        for name in (row["question"], row["question_type"]):
            answers[name][row["answers"][0]] += 1
    return [(answers.get(row["question"]) or answers[row["question_type"]]).most_common(1)[0][0] for row in rows]


@dataclass(frozen=True)
class Twins:
    """How well scores tell twins apart: images and texts that differ in one word or in the order of two."""

    scores: Float[Tensor, "N 2 2"]
    """Of the images of a pair (rows) with its texts (columns); each image's own text has its place."""

    @property
    def told_apart(self) -> dict[str, float]:
        """Shares of right decisions, each in [0, 1].

        ``pairwise``: an image's own text scores above its twin's, or a text's own image above the twin's (chance 1/2).
        ``text``, ``image``, ``group``: Winoground's: both images find their text (1/4), both texts their image (1/4),
        both (1/6). Equal scores count as wrong.
        """
        s = self.scores
        own = torch.stack([s[:, 0, 0], s[:, 1, 1]], 1)
        text = own > torch.stack([s[:, 0, 1], s[:, 1, 0]], 1)  # [N, 2], by image
        image = own > torch.stack([s[:, 1, 0], s[:, 0, 1]], 1)  # [N, 2], by text
        means = {
            "pairwise": torch.cat([text, image], 1),
            "text": text.all(1),
            "image": image.all(1),
            "group": text.all(1) & image.all(1),
        }
        return {name: float(right.float().mean()) for name, right in means.items()}

    def by_type(self, types: Sequence[str]) -> dict[str, Twins]:
        """Return the twins of each type.

        Args:
            types: of the N pairs.
        """
        return {kind: Twins(self.scores[[each == kind for each in types]]) for kind in sorted(set(types))}


def compare_twins(
    pipeline: RepresentationPipeline, features: Float[Tensor, "I P E"], texts: Sequence[str]
) -> dict[str, Twins]:
    """Score twins by similarity (``itc``) and by the matching head (``itm``).

    Args:
        features: of the images; each pair is two neighbors.
        texts: the text of each image.
    """
    count = len(texts) // 2
    both = torch.arange(len(texts)).view(count, 2).repeat_interleave(2, dim=0)  # the texts of each image's pair
    logits = pipeline.match_candidates(features, texts, both).cpu()
    images, words = pipeline.embed_images(features).view(count, 2, *_tail(pipeline)), pipeline.embed_texts(texts)
    similarity = torch.einsum("niqc,ntc->nitq", images, words.view(count, 2, -1)).amax(dim=-1).cpu()
    return {"itc": Twins(similarity), "itm": Twins((logits[..., 1] - logits[..., 0]).view(count, 2, 2))}


@torch.no_grad()
def matching_accuracy(
    pipeline: RepresentationPipeline,
    features: Float[Tensor, "I P E"],
    texts: Sequence[str],
    batch_size: int = 48,
    seed: int = 0,
) -> float:
    """Return the accuracy of the matching head (ITM) with hard negatives drawn as in training, in [0, 1].

    A third of the pairs match: saying no to everything is right in 2 of 3.
    """
    model = pipeline.model.eval()
    right, count = 0.0, 0
    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        ids, mask = pipeline.encode_texts(texts[part])
        batch = RepresentationBatch(features[part], ids, mask, torch.arange(len(ids), device=ids.device))
        right += float(model(batch, seed=seed + start).metrics["itm_accuracy"]) * len(ids)
        count += len(ids)
    return right / count


def _tail(pipeline: RepresentationPipeline) -> tuple[int, int]:
    config = pipeline.recipe.qformer
    return config.num_query_tokens, config.image_text_hidden_size

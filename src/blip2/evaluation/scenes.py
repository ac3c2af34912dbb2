"""Metrics on composed scenes (:mod:`blip2.data.scenes`): facts in captions, answers by type, and twins.

The exact content of every scene is known, so that a caption in any wording can be scored fact by fact.
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
    """Read a JSON Lines file of a scenes data set."""
    return [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_truths(rows: Sequence[Mapping[str, Any]]) -> list[Truth]:
    """Return the true content of the scene of each row."""
    return [Truth.from_json(row["truth"]) for row in rows]


def score_facts(captions: Sequence[str], truths: Sequence[Truth]) -> dict[str, float]:
    """Compute the share of captions that state each fact correctly, over the scenes that have the fact.

    Args:
        captions: the captions to score.
        truths: the true content of the scene of each caption.

    Returns:
        Shares in [0, 1], by the name of the fact: ``objects`` (the caption names every kind of object in the scene and
        no other kind), ``color``, ``relation`` (of two objects), ``order`` (of three objects), ``count``, ``size``, and
        ``all`` (every fact of the scene is correct). Facts that no scene has are left out.
    """
    correct: defaultdict[str, list[bool]] = defaultdict(list)
    for caption, truth in zip(captions, truths, strict=True):
        facts = {name: value for name, value in score_caption(caption, truth).items() if value is not None}
        for name, value in facts.items():
            correct[name].append(value)
        correct["all"].append(all(facts.values()))
    return _shares(correct)


def score_answers(answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute the share of correct answers.

    Args:
        answers: the answers to score.
        rows: for each answer, the row with ``question_type`` and the reference ``answers``.

    Returns:
        The share for each question type, by its name, and for all questions as ``all``, in [0, 1].
    """
    correct: defaultdict[str, list[bool]] = defaultdict(list)
    for answer, row in zip(answers, rows, strict=True):
        is_correct = normalize(answer) in {normalize(reference) for reference in row["answers"]}
        for name in (row["question_type"], "all"):
            correct[name].append(is_correct)
    return _shares(correct)


def _shares(correct: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    return {name: sum(values) / len(values) for name, values in correct.items()}


def majority_answers(train: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Answer questions without images, as a baseline.

    The answer is the most frequent answer to the same question in `train`, or, for a question that is not in `train`,
    the most frequent answer to questions of the same type.

    Args:
        train: rows with ``question``, ``question_type`` and ``answers``.
        rows: the rows with the questions to answer.

    Returns:
        An answer for each of `rows`.
    """
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        for name in (row["question"], row["question_type"]):
            answers[name][row["answers"][0]] += 1
    return [(answers.get(row["question"]) or answers[row["question_type"]]).most_common(1)[0][0] for row in rows]


@dataclass(frozen=True)
class Twins:
    """Scores of twins: pairs of images with texts that differ in one word or in the order of two words."""

    scores: Float[Tensor, "N 2 2"]
    """Scores of the images of a pair (rows) with its texts (columns); matching pairs are on the diagonal."""

    @property
    def accuracy(self) -> dict[str, float]:
        """Shares of correct decisions, each in [0, 1]; ties count as wrong.

        ``pairwise`` counts each of the four decisions of a pair: the better text for each image, and the better image
        for each text (chance 1/2). The other three are Winoground's: ``text`` counts pairs in which the text is correct
        for both images (1/4), ``image`` pairs in which the image is correct for both texts (1/4), and ``group`` pairs
        in which all four decisions are correct (1/6).
        """
        s = self.scores
        matching = torch.stack([s[:, 0, 0], s[:, 1, 1]], 1)
        text = matching > torch.stack([s[:, 0, 1], s[:, 1, 0]], 1)  # [N, 2], by image
        image = matching > torch.stack([s[:, 1, 0], s[:, 0, 1]], 1)  # [N, 2], by text
        means = {
            "pairwise": torch.cat([text, image], 1),
            "text": text.all(1),
            "image": image.all(1),
            "group": text.all(1) & image.all(1),
        }
        return {name: float(correct.float().mean()) for name, correct in means.items()}

    def by_type(self, types: Sequence[str]) -> dict[str, Twins]:
        """Group the pairs by type.

        Args:
            types: the type of each of the N pairs.

        Returns:
            The scores of the pairs of each type, by type.
        """
        return {kind: Twins(self.scores[[each == kind for each in types]]) for kind in sorted(set(types))}


def score_twins(
    pipeline: RepresentationPipeline, features: Float[Tensor, "I P E"], texts: Sequence[str]
) -> dict[str, Twins]:
    """Score twins by similarity (``itc``) and by the matching head (``itm``).

    Args:
        pipeline: the stage-1 model.
        features: features [2 N, P, E] of the images; images 2 i and 2 i + 1 are a pair.
        texts: the text of each image.

    Returns:
        The scores under the keys ``itc`` and ``itm``.
    """
    pairs = len(texts) // 2
    candidates = torch.arange(len(texts)).view(pairs, 2).repeat_interleave(2, dim=0)  # both texts for each image
    logits = pipeline.match_candidates(features, texts, candidates).cpu()
    image_embeds = pipeline.embed_images(features).unflatten(0, (pairs, 2))
    text_embeds = pipeline.embed_texts(texts).unflatten(0, (pairs, 2))
    similarity = torch.einsum("niqc,ntc->nitq", image_embeds, text_embeds).amax(dim=-1).cpu()
    return {"itc": Twins(similarity), "itm": Twins((logits[..., 1] - logits[..., 0]).view(pairs, 2, 2))}


@torch.no_grad()
def matching_accuracy(
    pipeline: RepresentationPipeline,
    features: Float[Tensor, "I P E"],
    texts: Sequence[str],
    batch_size: int = 48,
    seed: int = 0,
) -> float:
    """Compute the accuracy of the matching head (ITM) with hard negatives drawn as in training, in [0, 1].

    One third of the compared pairs match, so that a head that always predicts "not matched" has an accuracy of 2/3.

    Args:
        pipeline: the stage-1 model.
        features: features [I, P, E] of I images.
        texts: the matching text of each image.
        batch_size: number of images from whose texts the hard negatives are drawn.
        seed: seed of the hard negatives.
    """
    model = pipeline.model.eval()
    correct, count = 0.0, 0
    for start in range(0, len(texts), batch_size):
        rows = slice(start, start + batch_size)
        ids, mask = pipeline.tokenize(texts[rows])
        batch = RepresentationBatch(features[rows], ids, mask, torch.arange(len(ids), device=ids.device))
        correct += float(model(batch, seed=seed + start).metrics["itm_accuracy"]) * len(ids)
        count += len(ids)
    return correct / count

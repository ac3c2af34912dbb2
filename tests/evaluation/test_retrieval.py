from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blip2.builder import build
from blip2.evaluation.retrieval import CUTOFFS, Recall, RetrievalResult, evaluate_retrieval, ranks, recall
from blip2.model.representation import RepresentationModel
from blip2.pipelines import RepresentationPipeline
from conftest import Parts
from fixtures.tiny import randomize

TEXTS = ["a red disc", "the disc is red here", "a blue square", "two", "stripe", "a green stripe on white", "x y z"]


def by_sorting(scores: Tensor, positive: Tensor) -> Recall:
    """Recall as one would tell it: sort each row, the wrong ones first among equals, and look at the first k."""
    hits = dict.fromkeys(CUTOFFS, 0)
    for row, right in zip(scores.tolist(), positive.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda column: (-row[column], right[column]))
        for k in CUTOFFS:
            hits[k] += any(right[column] for column in order[:k])
    return {f"r{k}": count / len(scores) for k, count in hits.items()}


@pytest.mark.parametrize("columns", [3, 8, 30])
@pytest.mark.parametrize("levels", [4, 1000])
def test_recall(columns: int, levels: int) -> None:
    """`levels` is how many different scores there are: with few, most are ties."""
    generator = torch.Generator().manual_seed(columns)
    scores = torch.randint(levels, (50, columns), generator=generator).float()
    positive = torch.rand(50, columns, generator=generator) < 2 / columns
    assert not positive.any(dim=1).all()  # a row without a positive is never a hit
    assert recall(scores, positive) == pytest.approx(by_sorting(scores, positive))


def test_ranks() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [2.0, 2.0, 1.0]])
    positive = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]]).bool()
    assert ranks(scores, positive).tolist() == [0, 2, 1, 1]


@pytest.mark.parametrize("score", [0.0, float("nan")])
def test_a_model_that_says_nothing_finds_nothing(score: float) -> None:
    scores = torch.full((20, 20), score)
    retrieval = RetrievalResult(scores, scores, torch.eye(20).bool())
    assert retrieval.image_to_text == retrieval.text_to_image == {"r1": 0.0, "r5": 0.0, "r10": 0.0}


def test_directions() -> None:
    """Two images, three texts: both images find their texts, but every text finds the first image."""
    scores = torch.tensor([[9.0, 8.0, 7.0], [1.0, 2.0, 3.0]])
    positive = torch.tensor([[1, 0, 0], [0, 1, 1]]).bool()
    retrieval = RetrievalResult(scores, scores, positive)
    assert retrieval.image_to_text["r1"] == 1.0
    assert retrieval.text_to_image["r1"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("levels", [3, 12, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_five_texts_an_image(levels: int, seed: int) -> None:
    """TR@k: any of the five is enough. IR@k: there is one image. In each direction by its own scores."""
    generator = torch.Generator().manual_seed(seed)
    count = 24
    owner = torch.arange(5 * count) // 5
    owner = owner[torch.randperm(5 * count, generator=generator)]  # not adjacent
    positive = owner == torch.arange(count)[:, None]
    scores, others = torch.randint(levels, (2, count, 5 * count), generator=generator).float()
    scores[positive] += levels / 4
    retrieval = RetrievalResult(scores, others, positive)
    expected = {f"r{k}": 0.0 for k in CUTOFFS}
    for image in range(count):
        ahead = []  # for each of its texts: the wrong texts that come before it
        for text in (owner == image).nonzero().flatten().tolist():
            ahead.append(
                sum(bool(scores[image, t] >= scores[image, text]) for t in range(5 * count) if owner[t] != image)
            )
        for k in CUTOFFS:
            expected[f"r{k}"] += (min(ahead) < k) / count
    assert retrieval.image_to_text == pytest.approx(expected) == by_sorting(scores, positive)
    expected = {f"r{k}": 0.0 for k in CUTOFFS}
    for text in range(5 * count):
        ahead = sum(bool(others[i, text] >= others[owner[text], text]) for i in range(count) if i != owner[text])
        for k in CUTOFFS:
            expected[f"r{k}"] += (ahead < k) / (5 * count)
    assert retrieval.text_to_image == pytest.approx(expected) == by_sorting(others.T, positive.T)


@pytest.mark.parametrize(
    "rows", [[[1, 0, 0, 0, 0, 0]], [[1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]], [[1], [0], [1]]]
)
def test_chance_is_the_mean_over_all_rankings(rows: list[list[int]]) -> None:
    positive = torch.tensor(rows).bool()

    def mean(positive: Tensor) -> Recall:
        count = positive.shape[1]
        orders = list(permutations(range(count)))
        recalls = [recall(torch.tensor(order).float().expand(len(positive), -1), positive) for order in orders]
        return {key: sum(each[key] for each in recalls) / len(recalls) for key in recalls[0]}

    sides = [mean(positive), mean(positive.T)]
    expected = {key: (sides[0][key] + sides[1][key]) / 2 for key in sides[0]}
    scores = torch.zeros(positive.shape)
    assert RetrievalResult(scores, scores, positive).chance == pytest.approx(expected)


# -- with a model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(parts: Parts) -> RepresentationPipeline:
    recipe = parts.recipe(Path("nowhere"))
    built = build(recipe.model, torch.device("cpu"))
    assert isinstance(built.model, RepresentationModel)
    pipeline = RepresentationPipeline(randomize(built.model).eval(), built.tokenizer, recipe.model, Path("nowhere"))
    pipeline.batch_size = 2
    return pipeline


@pytest.fixture(scope="module")
def features(pipeline: RepresentationPipeline) -> Tensor:
    vision = pipeline.model.vision
    return torch.randn(5, vision.num_tokens, vision.hidden_size, generator=torch.Generator().manual_seed(0))


POSITIVE = torch.zeros(5, len(TEXTS)).bool().fill_diagonal_(True)


def test_similarity_alone(pipeline: RepresentationPipeline, features: Tensor) -> None:
    retrieval = evaluate_retrieval(pipeline, features, TEXTS, POSITIVE, rerank_k=0)
    for scores in (retrieval.scores_i2t, retrieval.scores_t2i):
        assert torch.equal(scores, pipeline.similarity(features, TEXTS))
    assert torch.equal(retrieval.positive, POSITIVE)
    assert retrieval.itc is None


@pytest.mark.parametrize("candidates", [7, 128])
def test_enough_candidates_rank_all_by_matching(
    pipeline: RepresentationPipeline, features: Tensor, candidates: int
) -> None:
    matched = pipeline.match(features, TEXTS)
    retrieval = evaluate_retrieval(pipeline, features, TEXTS, POSITIVE, candidates)
    assert torch.equal(retrieval.scores_i2t, retrieval.scores_t2i)
    scores = retrieval.scores_i2t
    torch.testing.assert_close(scores.sigmoid(), matched)
    similarity = pipeline.similarity(features, TEXTS)
    for dimension in (0, 1):
        order = matched.argsort(dimension)
        assert torch.equal(scores.argsort(dimension), order)
        assert not torch.equal(similarity.argsort(dimension), order)
    assert retrieval.itc is not None
    for scores in (retrieval.itc.scores_i2t, retrieval.itc.scores_t2i):
        assert torch.equal(scores, similarity)


def test_few_candidates(pipeline: RepresentationPipeline, features: Tensor) -> None:
    """In each direction the best are re-ranked, ahead of all others, which keep their order."""
    similarity, matched = pipeline.similarity(features, TEXTS), pipeline.match(features, TEXTS)
    retrieval = evaluate_retrieval(pipeline, features, TEXTS, POSITIVE, rerank_k=2)
    sides = [
        (retrieval.scores_i2t, similarity, matched),
        (retrieval.scores_t2i.T, similarity.T, matched.T),
    ]
    for scores, before, wanted in sides:
        reranked = torch.zeros(scores.shape).bool()
        for i in range(len(scores)):
            reranked[i, before[i].argsort(descending=True)[:2]] = True
        assert reranked.sum() == 2 * len(scores)
        torch.testing.assert_close(scores[reranked].sigmoid(), wanted[reranked])
        assert scores[~reranked].max() < scores[reranked].min()
        for i in range(len(scores)):
            assert torch.equal(scores[i][~reranked[i]].argsort(), before[i][~reranked[i]].argsort())


def test_fusion_adds_the_similarity_to_the_logit(pipeline: RepresentationPipeline, features: Tensor) -> None:
    every = torch.arange(len(TEXTS)).expand(5, -1)
    logits = pipeline.match_candidates(features, TEXTS, every)[..., 1]
    similarity = pipeline.similarity(features, TEXTS)
    retrieval = evaluate_retrieval(pipeline, features, TEXTS, POSITIVE, fusion="itm+itc")
    torch.testing.assert_close(retrieval.scores_i2t, logits + similarity)
    torch.testing.assert_close(retrieval.scores_t2i, logits + similarity)
    alone = evaluate_retrieval(pipeline, features, TEXTS, POSITIVE).scores_i2t
    assert not torch.equal(alone.argsort(1), retrieval.scores_i2t.argsort(1))

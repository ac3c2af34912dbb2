import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from blip2.model import losses
from blip2.model.losses import (
    image_text_contrastive,
    image_text_matching,
    image_text_similarity,
    language_modeling,
    query_cosines,
    query_diversity,
    query_statistics,
    recall_at_1,
    sample_hard_negatives,
)

# Three pairs of this process among five of all processes; the first two pairs show the same image.
POSITIVE = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0]]).bool()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(score) for score in row))
    return [score - total for score in row]


def cross_entropies(scores: torch.Tensor, targets: list[list[float]], smoothing: float) -> list[float]:
    """Of each row, from the definition. The targets of a row sum to one."""
    losses = []
    for row, target in zip(scores.tolist(), targets, strict=True):
        smooth = [(1 - smoothing) * share + smoothing / len(row) for share in target]
        losses.append(-sum(share * score for share, score in zip(smooth, log_softmax(row), strict=True)))
    return losses


# -- contrast ------------------------------------------------------------------------------------------------------


def test_similarity_is_that_of_the_best_query():
    images, texts = F.normalize(random(3, 4, 8), dim=-1), F.normalize(random(5, 8, seed=1), dim=-1)
    similarity = image_text_similarity(images, texts)
    assert similarity.shape == (3, 5)
    for i, queries in enumerate(images.tolist()):
        for t, text in enumerate(texts.tolist()):
            best = max(sum(a * b for a, b in zip(query, text, strict=True)) for query in queries)
            assert similarity[i, t].item() == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_contrastive_loss(smoothing):
    """Pairs of one image share the target."""
    to_text, to_image = 5 * random(3, 5), 5 * random(3, 5, seed=1)
    targets = [[0.5, 0.5, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0, 0, 1, 0, 0]]
    expected = cross_entropies(to_text, targets, smoothing) + cross_entropies(to_image, targets, smoothing)
    loss = image_text_contrastive(to_text, to_image, POSITIVE, smoothing)
    assert loss.item() == pytest.approx(sum(expected) / 6, abs=1e-6)


def test_contrastive_loss_has_nothing_to_contrast_in_a_batch_of_one():
    score = torch.tensor([[3.0]])
    assert image_text_contrastive(score, score, torch.tensor([[True]])).item() == 0


def test_contrastive_gradient():
    def loss(images: torch.Tensor, texts: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        scores = image_text_similarity(F.normalize(images, dim=-1), F.normalize(texts, dim=-1)) / temperature
        return image_text_contrastive(scores, scores.T, POSITIVE[:, :3])

    inputs = (random(3, 2, 4), random(3, 4, seed=1), torch.tensor(0.3, dtype=torch.float64))
    assert torch.autograd.gradcheck(loss, [tensor.requires_grad_() for tensor in inputs])


def test_recall_at_1_counts_positives_in_both_directions():
    per_image = torch.tensor([[0.0, 9, 0, 0, 0], [0, 0, 9, 0, 0], [9, 0, 0, 0, 0]])  # only the first is right
    per_text = torch.tensor([[9.0, 0, 0, 0, 0], [9, 0, 0, 0, 0], [0, 0, 0, 9, 0]])  # the first two are
    assert recall_at_1(per_image, per_text, POSITIVE).item() == 0.5


# -- hard negatives ------------------------------------------------------------------------------------------------

DRAWS = 20_000


@pytest.mark.parametrize(
    "similarity",
    [
        [0.0, 1.0, 2.0, 3.0, -1.0],
        [20.0, 11.0, 9.0, 0.0, 0.0],  # the softmax leaves next to nothing to the negatives: the 1e-4 speaks
    ],
)
def test_negatives_are_drawn_by_how_similar_they_look(similarity):
    torch.manual_seed(0)
    positive = torch.tensor([True, False, False, False, True])
    drawn = sample_hard_negatives(torch.tensor(similarity).expand(DRAWS, 5), positive.expand(DRAWS, 5))
    shares = (torch.bincount(drawn, minlength=5) / DRAWS).tolist()
    weights = [math.exp(score) + 1e-4 for score in log_softmax(similarity)]
    weights = [0.0 if right else weight for weight, right in zip(weights, positive.tolist(), strict=True)]
    for share, weight in zip(shares, weights, strict=True):
        expected = weight / sum(weights)
        assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / DRAWS)


def test_uniforms_decide():
    weights = torch.tensor([[0.5, 0.0, 0.2, 0.3]]).log().clamp(min=-60).expand(5, 4)
    positive = torch.tensor([False, True, False, False]).expand(5, 4)
    uniforms = torch.tensor([0.0, 0.4, 0.6, 0.8, 1 - 2**-24])
    assert sample_hard_negatives(weights, positive, uniforms).tolist() == [0, 0, 2, 3, 3]


def test_each_row_draws_its_own_negative():
    torch.manual_seed(0)
    similarity = torch.full((4, 6), -50.0)
    similarity[torch.arange(4), torch.tensor([5, 3, 0, 1])] = 50.0
    assert sample_hard_negatives(similarity, torch.eye(4, 6, dtype=torch.bool)).tolist() == [5, 3, 0, 1]


def test_a_row_without_negatives_draws_something():
    drawn = sample_hard_negatives(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[True, True], [True, False]]))
    assert drawn[0] in (0, 1)
    assert drawn[1] == 1
    assert sample_hard_negatives(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)).tolist() == [0]


# -- matching ------------------------------------------------------------------------------------------------------


def test_matching_loss_ignores_rows_that_do_not_count():
    logits = random(4, 2).requires_grad_()
    labels, valid = torch.tensor([1, 1, 0, 0]), torch.tensor([True, False, True, True])
    loss = image_text_matching(logits, labels, valid)
    rows = [log_softmax(row) for row in logits.tolist()]
    assert loss.item() == pytest.approx(-(rows[0][1] + rows[2][0] + rows[3][0]) / 3, abs=1e-12)
    loss.backward()
    assert (logits.grad != 0).all(dim=1).tolist() == valid.tolist()


# -- language modeling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_language_modeling_loss(smoothing):
    logits, labels = 3 * random(4, 7), torch.tensor([6, 0, 3, 3])
    expected = cross_entropies(logits, F.one_hot(labels, 7).tolist(), smoothing)
    assert language_modeling(logits, nn.Identity(), labels, None, smoothing).loss.item() == pytest.approx(
        sum(expected) / 4, abs=1e-6
    )


def test_label_count_makes_micro_batches_one_mean():
    logits, labels = random(10, 7), torch.arange(10) % 7
    whole = language_modeling(logits, nn.Identity(), labels, None, 0.1).loss
    sizes = (1, 6, 3)
    average = sum(sizes) / len(sizes)
    parts = zip(logits.split(sizes), labels.split(sizes), strict=True)
    losses = [language_modeling(part, nn.Identity(), wanted, average, 0.1).loss for part, wanted in parts]
    assert torch.stack(losses).mean().item() == pytest.approx(whole.item(), abs=1e-6)


def test_language_modeling_without_labels_is_zero():
    assert language_modeling(torch.zeros(0, 7), nn.Identity(), torch.zeros(0, dtype=torch.long)).loss.item() == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_in_chunks_are_the_same_and_few(monkeypatch, smoothing):
    states, labels, head = random(11, 5).requires_grad_(), torch.arange(11) % 7, nn.Linear(5, 7).double()
    seen = []
    head.register_forward_hook(lambda module, inputs, logits: seen.append(logits.numel()))
    results = []
    for max_logits in (11 * 7, 3 * 7, 1):
        monkeypatch.setattr(losses, "MAX_LOGITS_PER_CHUNK", max_logits)
        states.grad = None
        head.zero_grad()
        seen.clear()
        lm = language_modeling(states, head, labels, 4.0, smoothing)
        lm.loss.backward()
        results.append((*lm, states.grad, head.weight.grad, head.bias.grad))
        assert max(seen) <= max(max_logits, 7)
        assert sum(seen) == 11 * 7 * (1 if max_logits == 11 * 7 else 2)  # once more in the backward pass
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("num_labels", [None, 5.0])
def test_perplexity_and_accuracy(num_labels):
    """Averaged over batches that were given their mean number of labels, they are those of all labels."""
    logits, labels = 3 * random(4, 7), torch.tensor([6, 0, 3, 3])
    lm = language_modeling(logits, nn.Identity(), labels, num_labels, 0.5)
    expected = cross_entropies(logits, F.one_hot(labels, 7).tolist(), 0.0)
    divisor = num_labels or 4
    assert lm.perplexity.item() == pytest.approx(math.exp(sum(expected) / divisor), rel=1e-5)
    assert lm.accuracy.item() == pytest.approx((logits.argmax(dim=1) == labels).sum().item() / divisor)


# -- queries that differ -------------------------------------------------------------------------------------------


def test_query_diversity_is_the_mean_squared_cosine_of_different_queries():
    queries = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    expected = torch.stack([F.cosine_similarity(image[i], image[j], dim=0) for image in queries for i, j in pairs])
    found = query_cosines(queries)
    torch.testing.assert_close(found.double(), expected.view(3, 12))
    torch.testing.assert_close(query_diversity(queries).double(), expected.square().mean(), atol=1e-6, rtol=0)


def test_query_diversity_pulls_collapsed_queries_apart():
    torch.manual_seed(0)
    queries = (torch.randn(2, 1, 8) + 0.01 * torch.randn(2, 4, 8)).requires_grad_()
    assert query_diversity(queries) > 0.99
    for _ in range(300):
        (gradient,) = torch.autograd.grad(query_diversity(queries), queries)
        queries = (queries - 3 * gradient).detach().requires_grad_()
    assert query_diversity(queries) < 0.05


def test_query_statistics_at_their_ends():
    same = torch.randn(5, 1, 8).expand(-1, 4, -1)
    found = query_statistics(same)
    torch.testing.assert_close(found["query_similarity"], torch.tensor(1.0))
    torch.testing.assert_close(found["query_variance"], torch.tensor(0.0), atol=1e-6, rtol=0)
    apart = torch.eye(4, 8).expand(5, -1, -1)  # alike in every image
    found = query_statistics(apart)
    torch.testing.assert_close(found["query_similarity"], torch.tensor(0.0))
    torch.testing.assert_close(found["query_variance"], torch.tensor(1.0))


def test_one_query_has_nothing_to_differ_from():
    queries = torch.randn(3, 1, 8, requires_grad=True)
    loss = query_diversity(queries)
    loss.backward()
    assert loss == 0 and query_statistics(queries) == {}


def test_queries_are_compared_in_float32_under_autocast():
    queries = torch.randn(2, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = query_diversity(queries)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, query_diversity(queries))

"""The losses of stage 1 and stage 2 as pure functions of tensors (paper §3.2, §3.3).

Legend: B batch of this process, N batch of all processes, Q queries, C contrastive width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from blip2.model.kernels.recompute import recompute

IGNORE_INDEX = -100
"""Label of positions without loss."""
MAX_LOGITS_PER_CHUNK = 2**24
"""Logits that are in memory at once: 64 MiB in float32, some of which PyTorch stores twice."""


class LossOutput(NamedTuple):
    """The output of a stage: losses, which the training loop weights and sums, and metrics."""

    losses: dict[str, Float[Tensor, ""]]
    metrics: dict[str, Float[Tensor, ""]]
    """Accuracies, perplexities and statistics, without gradient."""


# -- ITC ---------------------------------------------------------------------------------------------------------------


def image_text_similarity(images: Float[Tensor, "I Q C"], texts: Float[Tensor, "T C"]) -> Float[Tensor, "I T"]:
    """Return the similarity of each image with each text: the largest among the image's queries (§3.2, ITC).

    Both are unit vectors along C, so that the result is a cosine in [-1, 1].
    """
    return torch.einsum("iqc,tc->iqt", images, texts).amax(dim=1)


def image_text_contrastive(
    logits_per_image: Float[Tensor, "B N"],
    logits_per_text: Float[Tensor, "B N"],
    positive: Bool[Tensor, "B N"],
    label_smoothing: float = 0.1,
) -> Float[Tensor, ""]:
    """Return the ITC loss: cross-entropy over in-batch candidates in both directions, averaged (§3.2).

    Args:
        logits_per_image: similarity / temperature of this process's images with all texts.
        logits_per_text: the same of this process's texts with all images.
        positive: True where image and text belong together. Several in a row (an image sampled twice) share the target
            equally, so that pairs of one image are not each other's negatives.
        label_smoothing: share of the target that is distributed evenly over all candidates.
    """
    target = positive / positive.sum(dim=1, keepdim=True)
    target = target * (1 - label_smoothing) + label_smoothing / positive.shape[1]
    return (F.cross_entropy(logits_per_image, target) + F.cross_entropy(logits_per_text, target)) / 2


def recall_at_1(
    logits_per_image: Float[Tensor, "B N"], logits_per_text: Float[Tensor, "B N"], positive: Bool[Tensor, "B N"]
) -> Float[Tensor, ""]:
    """Return the share of images whose best text is a positive and of texts whose best image is one, averaged."""
    best = [logits.argmax(dim=1, keepdim=True) for logits in (logits_per_image, logits_per_text)]
    return torch.cat([positive.gather(1, column) for column in best]).float().mean()


# -- ITM ---------------------------------------------------------------------------------------------------------------


def sample_hard_negatives(
    similarity: Float[Tensor, "B N"], positive: Bool[Tensor, "B N"], uniforms: Float[Tensor, "B"] | None = None
) -> Int[Tensor, "B"]:
    """Sample one negative per row, with a probability that grows with its similarity (§3.2, ITM).

    As in ALBEF and BLIP, probabilities are proportional to the softmax of the similarities plus 1e-4, so that no
    negative is impossible, and zero where `positive`.

    Args:
        uniforms: the random number in [0, 1) of each row; None: drawn here.

    Returns:
        The sampled columns. A row without any negative (a batch of one) gets an arbitrary column, to be ignored.
    """
    # Similarities that are not finite spoil the loss, which the training loop reports; sampling must not fail before.
    weights = (similarity.float().softmax(dim=1).nan_to_num() + 1e-4).masked_fill(positive, 0.0)
    weights = weights.masked_fill(positive.all(dim=1, keepdim=True), 1.0)
    if uniforms is None:
        uniforms = torch.rand(len(weights), device=weights.device)
    # The first column whose cumulative weight exceeds that share of the row's total.
    cumulative = weights.cumsum(dim=1)
    columns = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    columns = columns.clamp(max=weights.shape[1] - 1)
    # A GPU sums in no fixed order: a column without weight that rounding led to is replaced by the most similar one.
    possible = weights.gather(1, columns) > 0
    return torch.where(possible, columns, weights.argmax(dim=1, keepdim=True)).squeeze(1)


def image_text_matching(
    logits: Float[Tensor, "M 2"], labels: Int[Tensor, "M"], valid: Bool[Tensor, "M"]
) -> Float[Tensor, ""]:
    """Return the ITM loss: two-class cross-entropy, averaged over the `valid` rows (§3.2). Class 1 is "matched"."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses * valid).sum() / valid.sum()


# -- language modeling: ITG and stage 2 --------------------------------------------------------------------------------


class LMOutput(NamedTuple):
    """Loss and metrics of next-token prediction."""

    loss: Float[Tensor, ""]
    perplexity: Float[Tensor, ""]
    """Without label smoothing and gradient, as `accuracy`."""
    accuracy: Float[Tensor, ""]
    """Share of tokens predicted correctly."""


def language_modeling(
    hidden_states: Float[Tensor, "M D"],
    head: Callable[[Float[Tensor, "M D"]], Float[Tensor, "M V"]],
    labels: Int[Tensor, "M"],
    num_labels: float | None = None,
    label_smoothing: float = 0.0,
) -> LMOutput:
    """Return next-token cross-entropy in nats, summed over M positions and divided by `num_labels` (§3.2, §3.3).

    Logits are computed for a chunk of positions at a time, and recomputed in the backward pass if there are several
    chunks, so that at most :data:`MAX_LOGITS_PER_CHUNK` are in memory.

    Args:
        hidden_states: those of positions that have a label.
        head: computes logits from hidden states.
        num_labels: the divisor; None: M. The training loop gives the average M over the micro-batches and processes of
            one optimizer step, so that the gradient is that of one mean over all labels of the step.
    """
    rows = max(MAX_LOGITS_PER_CHUNK // head(hidden_states[:0]).shape[-1], 1)
    chunks = list(zip(torch.split(hidden_states, rows), torch.split(labels, rows), strict=True))
    if len(chunks) > 1 and torch.is_grad_enabled():
        sums = [recompute(_lm_sums, head, *chunk) for chunk in chunks]
    else:
        sums = [_lm_sums(head, *chunk) for chunk in chunks]
    cross_entropy, uniform_cross_entropy, num_correct = torch.stack(sums).sum(dim=0)
    count = max(len(labels), 1)
    total = (1 - label_smoothing) * cross_entropy + label_smoothing * uniform_cross_entropy
    return LMOutput(
        total / (num_labels if num_labels is not None else count),
        (cross_entropy.detach() / count).exp(),
        num_correct.detach() / count,
    )


def _lm_sums(
    head: Callable[[Float[Tensor, "M D"]], Float[Tensor, "M V"]],
    hidden_states: Float[Tensor, "M D"],
    labels: Int[Tensor, "M"],
) -> Float[Tensor, "3"]:
    """Return sums over positions: cross-entropy with the labels, with uniform targets, and correct predictions."""
    log_probs = head(hidden_states).float().log_softmax(dim=-1)
    cross_entropy = F.nll_loss(log_probs, labels, reduction="sum")
    num_correct = (log_probs.detach().argmax(dim=-1) == labels).sum()
    return torch.stack([cross_entropy, -log_probs.mean(dim=-1).sum(), num_correct.float()])


# -- diversity of the queries ------------------------------------------------------------------------------------------


def query_cosines(queries: Float[Tensor, "B Q D"]) -> Float[Tensor, "B Q*(Q-1)"]:
    """Return the cosines between all pairs of different output queries of each image, in float32."""
    with torch.autocast(queries.device.type, enabled=False):
        unit = F.normalize(queries.float(), dim=-1)
        cosines = unit @ unit.mT
    num_queries = queries.shape[1]
    # Remove the diagonal: every (Q + 1)-th element of the flattened matrix, beginning with the first.
    between = torch.unflatten(cosines.flatten(1)[:, 1:], 1, (num_queries - 1, num_queries + 1))[..., :-1]
    return between.flatten(1)


def query_diversity(queries: Float[Tensor, "B Q D"]) -> Float[Tensor, ""]:
    """Return the mean squared cosine between the output queries of an image, in [0, 1]; 0 for a single query.

    ITC rewards the best query alone and ITM averages over all of them, so that nothing in the paper's objectives keeps
    queries apart. This loss, which is not the paper's, is smallest where they are orthogonal.
    """
    if queries.shape[1] == 1:
        return queries.sum() * 0.0
    return query_cosines(queries).square().mean()


@torch.no_grad()
def query_statistics(queries: Float[Tensor, "B Q D"]) -> dict[str, Float[Tensor, ""]]:
    """Return how much the output queries Z of an image differ; an empty dict for a single query.

    Returns:
        ``query_similarity``: mean cosine between the queries of an image; 1 if they have collapsed into one vector.
        ``query_variance``: share of the variance of Z that lies between the queries of an image and not between
        images, in [0, 1]; 0 if they have collapsed.
    """
    if queries.shape[1] == 1:
        return {}
    z = queries.detach().float()
    within = z.var(dim=1, correction=0).sum(dim=-1).mean()
    between = z.mean(dim=1).var(dim=0, correction=0).sum()
    share = within / (within + between).clamp(min=torch.finfo(torch.float32).tiny)
    return {"query_similarity": query_cosines(z).mean(), "query_variance": share}

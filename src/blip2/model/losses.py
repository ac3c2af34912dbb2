"""The losses of stage 1 and stage 2 as pure functions of tensors (paper §3.2, §3.3).

Legend: B batch of this process, N batch of all processes, I images, T texts, Q queries, C contrastive width, M rows or
positions with a label, D width of the hidden states, V vocabulary.
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
"""Maximum number of logits that are computed at a time (64 MiB in float32)."""


class LossOutput(NamedTuple):
    """The output of a stage in training: losses and metrics by name. The training loop weights and sums the losses."""

    losses: dict[str, Float[Tensor, ""]]
    metrics: dict[str, Float[Tensor, ""]]
    """Accuracies, perplexities and statistics, without gradient."""


# -- ITC ---------------------------------------------------------------------------------------------------------------


def image_text_similarity(images: Float[Tensor, "I Q C"], texts: Float[Tensor, "T C"]) -> Float[Tensor, "I T"]:
    """Return the similarity of each image with each text: the largest among the image's queries (§3.2, ITC).

    Args:
        images: unit vectors, one per query.
        texts: unit vectors.

    Returns:
        Cosines in [-1, 1].
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
        logits_per_text: similarity / temperature of this process's texts with all images.
        positive: True in row i and column j if image i of this process belongs to text j of all processes (or text i
            to image j). Several positives in a row (an image that was sampled twice) share the target equally, so they
            are not each other's negatives.
        label_smoothing: share of the target, in [0, 1], that is distributed evenly over all candidates.
    """
    target = positive / positive.sum(dim=1, keepdim=True)
    target = target * (1 - label_smoothing) + label_smoothing / positive.shape[1]
    return (F.cross_entropy(logits_per_image, target) + F.cross_entropy(logits_per_text, target)) / 2


def recall_at_1(
    logits_per_image: Float[Tensor, "B N"], logits_per_text: Float[Tensor, "B N"], positive: Bool[Tensor, "B N"]
) -> Float[Tensor, ""]:
    """Return recall@1 within the batch, averaged over both directions.

    It is the mean of two shares: of images whose most similar text is a positive, and of texts whose most similar image
    is a positive. See :func:`image_text_contrastive` for the arguments.
    """
    best = [logits.argmax(dim=1, keepdim=True) for logits in (logits_per_image, logits_per_text)]
    return torch.cat([positive.gather(1, column) for column in best]).float().mean()


# -- ITM ---------------------------------------------------------------------------------------------------------------


def sample_hard_negatives(
    similarity: Float[Tensor, "B N"], positive: Bool[Tensor, "B N"], uniforms: Float[Tensor, "B"] | None = None
) -> Int[Tensor, "B"]:
    """Sample one negative per row, with a higher probability for negatives of higher similarity (§3.2, ITM).

    As in ALBEF and BLIP, the probability of a negative is proportional to softmax(similarity) + 1e-4, so that every
    negative can be sampled. The probability of positives is zero.

    Args:
        similarity: similarity / temperature.
        positive: True for the columns that are not negatives of the row.
        uniforms: a random number in [0, 1) for each row. None: the numbers are drawn from PyTorch's generator.

    Returns:
        The sampled columns. For a row without negatives (a batch of one) the column has no meaning and must be ignored.
    """
    # Similarities that are not finite make the loss not finite, which the training loop reports: do not fail here.
    weights = (similarity.float().softmax(dim=1).nan_to_num() + 1e-4).masked_fill(positive, 0.0)
    weights = weights.masked_fill(positive.all(dim=1, keepdim=True), 1.0)
    if uniforms is None:
        uniforms = torch.rand(len(weights), device=weights.device)
    # The first column whose cumulative weight exceeds uniforms * total weight of the row.
    cumulative = weights.cumsum(dim=1)
    columns = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    columns = columns.clamp(max=weights.shape[1] - 1)
    # GPUs sum in varying order, so rounding can select a column of weight 0. The most similar negative replaces it.
    possible = weights.gather(1, columns) > 0
    return torch.where(possible, columns, weights.argmax(dim=1, keepdim=True)).squeeze(1)


def image_text_matching(
    logits: Float[Tensor, "M 2"], labels: Int[Tensor, "M"], valid: Bool[Tensor, "M"]
) -> Float[Tensor, ""]:
    """Return the ITM loss: two-class cross-entropy, averaged over the rows where `valid` is True (§3.2).

    Args:
        logits: logits of the classes 0, "not matched", and 1, "matched".
        labels: the class of each row.
        valid: False for rows to ignore. At least one row must be valid.
    """
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses * valid).sum() / valid.sum()


# -- language modeling: ITG and stage 2 --------------------------------------------------------------------------------


class LMOutput(NamedTuple):
    """Loss and metrics of next-token prediction."""

    loss: Float[Tensor, ""]
    perplexity: Float[Tensor, ""]
    """exp of the cross-entropy without label smoothing, divided by `num_labels`; has no gradient."""
    accuracy: Float[Tensor, ""]
    """Number of tokens predicted correctly, divided by `num_labels`; has no gradient."""


def language_modeling(
    hidden_states: Float[Tensor, "M D"],
    head: Callable[[Float[Tensor, "M D"]], Float[Tensor, "M V"]],
    labels: Int[Tensor, "M"],
    num_labels: float | None = None,
    label_smoothing: float = 0.0,
) -> LMOutput:
    """Return next-token cross-entropy in nats, summed over M positions and divided by `num_labels` (§3.2, §3.3).

    Logits are computed for a chunk of at most :data:`MAX_LOGITS_PER_CHUNK` logits at a time. If there are several
    chunks, the backward pass computes the logits of each chunk again, so that they are never all in memory.

    Args:
        hidden_states: hidden states of the positions that have a label.
        head: function that computes logits from hidden states.
        labels: token ids.
        num_labels: the divisor. None: M. The training loop passes the mean of M over the micro-batches and processes of
            an optimizer step, so that every label of the step has the same weight in the gradient.
        label_smoothing: share of the target, in [0, 1], that is distributed evenly over the vocabulary.
    """
    rows = max(MAX_LOGITS_PER_CHUNK // head(hidden_states[:0]).shape[-1], 1)
    chunks = list(zip(torch.split(hidden_states, rows), torch.split(labels, rows), strict=True))
    if len(chunks) > 1 and torch.is_grad_enabled():
        sums = [recompute(_lm_sums, head, *chunk) for chunk in chunks]
    else:
        sums = [_lm_sums(head, *chunk) for chunk in chunks]
    cross_entropy, uniform_cross_entropy, num_correct = torch.stack(sums).sum(dim=0)
    divisor = num_labels if num_labels is not None else max(len(labels), 1)
    total = (1 - label_smoothing) * cross_entropy + label_smoothing * uniform_cross_entropy
    return LMOutput(total / divisor, (cross_entropy.detach() / divisor).exp(), num_correct.detach() / divisor)


def _lm_sums(
    head: Callable[[Float[Tensor, "M D"]], Float[Tensor, "M V"]],
    hidden_states: Float[Tensor, "M D"],
    labels: Int[Tensor, "M"],
) -> Float[Tensor, "3"]:
    """Return three sums over positions: cross-entropy with the labels, cross-entropy with a uniform target, and the
    number of correct predictions."""
    log_probs = head(hidden_states).float().log_softmax(dim=-1)
    cross_entropy = F.nll_loss(log_probs, labels, reduction="sum")
    num_correct = (log_probs.detach().argmax(dim=-1) == labels).sum()
    return torch.stack([cross_entropy, -log_probs.mean(dim=-1).sum(), num_correct.float()])


# -- diversity of the queries ------------------------------------------------------------------------------------------


def query_cosines(queries: Float[Tensor, "B Q D"]) -> Float[Tensor, "B Q*(Q-1)"]:
    """Return the cosine of each ordered pair of different output queries of an image, in float32."""
    with torch.autocast(queries.device.type, enabled=False):
        unit = F.normalize(queries.float(), dim=-1)
        cosines = unit @ unit.mT
    num_queries = queries.shape[1]
    # Remove the diagonal: every (Q + 1)-th element of the flattened matrix, beginning with the first.
    between = torch.unflatten(cosines.flatten(1)[:, 1:], 1, (num_queries - 1, num_queries + 1))[..., :-1]
    return between.flatten(1)


def query_diversity(queries: Float[Tensor, "B Q D"]) -> Float[Tensor, ""]:
    """Return the mean squared cosine between the output queries of an image, in [0, 1]; 0 for a single query.

    Nothing in the paper's objectives keeps the queries apart: ITC uses only the most similar query, and ITM averages
    over all queries. This loss, which is not in the paper, is smallest if the queries are orthogonal.
    """
    if queries.shape[1] == 1:
        return queries.sum() * 0.0
    return query_cosines(queries).square().mean()


@torch.no_grad()
def query_statistics(queries: Float[Tensor, "B Q D"]) -> dict[str, Float[Tensor, ""]]:
    """Measure how much the output queries Z of an image differ.

    Returns:
        Two statistics, or an empty dict if there is a single query. ``query_similarity``: mean cosine between the
        queries of an image; 1 if the queries have collapsed into one vector. ``query_variance``: share of the variance
        of Z, in [0, 1], that lies between the queries of an image and not between images; 0 if the queries have
        collapsed.
    """
    if queries.shape[1] == 1:
        return {}
    z = queries.detach().float()
    within = z.var(dim=1, correction=0).sum(dim=-1).mean()
    between = z.mean(dim=1).var(dim=0, correction=0).sum()
    share = within / (within + between).clamp(min=torch.finfo(torch.float32).tiny)
    return {"query_similarity": query_cosines(z).mean(), "query_variance": share}

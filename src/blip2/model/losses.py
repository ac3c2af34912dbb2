"""The losses of stage 1 and stage 2 as pure functions of tensors (paper §3.2, §3.3).

Legend: B batch of this process, N batch of all processes, Q queries, C contrastive width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""Label of positions that carry no loss."""
LOGITS_AT_ONCE = 2**24
"""So many are in memory together: 64 MiB in float32, some of which PyTorch keeps twice."""


class Outcome(NamedTuple):
    """What a stage gives back to the training loop, which weights and sums the losses and knows nothing else."""

    losses: dict[str, Float[Tensor, ""]]
    metrics: dict[str, Float[Tensor, ""]]
    """Accuracies and perplexities, without gradient."""


def image_text_similarity(images: Float[Tensor, "I Q C"], texts: Float[Tensor, "T C"]) -> Float[Tensor, "I T"]:
    """Similarity of every image with every text: the best of the image's queries (§3.2, ITC).

    Both are unit vectors along C, so the result is a cosine in [-1, 1].
    """
    return torch.einsum("iqc,tc->iqt", images, texts).amax(dim=1)


def image_text_contrastive(
    image_to_text: Float[Tensor, "B N"],
    text_to_image: Float[Tensor, "B N"],
    positive: Bool[Tensor, "B N"],
    label_smoothing: float = 0.1,
) -> Float[Tensor, ""]:
    """ITC: cross-entropy over in-batch candidates in both directions, averaged (§3.2).

    Args:
        image_to_text: similarity / temperature of this process's images with all texts.
        text_to_image: the same of this process's texts with all images.
        positive: True where image and text belong together. Where a row has several (an image drawn twice), they
            share the target equally, so that pairs of one image are not each other's negatives.
        label_smoothing: share of the target spread evenly over all candidates.
    """
    target = positive / positive.sum(dim=1, keepdim=True)
    target = target * (1 - label_smoothing) + label_smoothing / positive.shape[1]
    return (F.cross_entropy(image_to_text, target) + F.cross_entropy(text_to_image, target)) / 2


def draw_hard_negatives(
    similarity: Float[Tensor, "B N"], positive: Bool[Tensor, "B N"], chances: Float[Tensor, "B"] | None = None
) -> Int[Tensor, "B"]:
    """One negative for each row, drawn in proportion to how similar it looks (§3.2, ITM).

    The strategy of ALBEF and BLIP: probabilities are the softmax of the similarities plus 1e-4, so that no
    negative is impossible, and zero where `positive`.

    Args:
        chances: a number in [0, 1) for each row, which decides; drawn here when None.

    Returns:
        The drawn columns. A row without any negative (a batch of one) gets an arbitrary one: do not count it.
    """
    # Similarities that are not finite spoil the loss, which the training loop reports; drawing must not fail before.
    weights = (similarity.float().softmax(dim=1).nan_to_num() + 1e-4).masked_fill(positive, 0.0)
    weights = weights.masked_fill(positive.all(dim=1, keepdim=True), 1.0)
    if chances is None:
        chances = torch.rand(len(weights), device=weights.device)
    # The first column at which more than that share of the row's weight is reached.
    reached = weights.cumsum(dim=1)
    drawn = torch.searchsorted(reached, chances[:, None] * reached[:, -1:], right=True).clamp(max=weights.shape[1] - 1)
    # A GPU adds up in no fixed order: where rounding led to a column without weight, the most similar one is taken.
    possible = weights.gather(1, drawn) > 0
    return torch.where(possible, drawn, weights.argmax(dim=1, keepdim=True)).squeeze(1)


def query_cosines(queries: Float[Tensor, "B Q D"]) -> Float[Tensor, "B Q*(Q-1)"]:
    """Cosines between all pairs of different output queries of each image, in float32."""
    with torch.autocast(queries.device.type, enabled=False):
        unit = F.normalize(queries.float(), dim=-1)
        cosines = unit @ unit.mT
    count = queries.shape[1]
    # Without the diagonal: of the flattened matrix every (Q + 1)-th number, from the first on.
    return cosines.flatten(1)[:, 1:].unflatten(1, (count - 1, count + 1))[..., :-1].flatten(1)


def query_diversity(queries: Float[Tensor, "B Q D"]) -> Float[Tensor, ""]:
    """Mean squared cosine between the output queries of an image, in [0, 1]; 0 where there is one query.

    ITC rewards the best query alone and ITM averages over all of them, so nothing in the paper's objectives keeps
    queries apart. This term does: it is smallest where they are orthogonal.
    """
    if queries.shape[1] == 1:
        return queries.sum() * 0.0
    return query_cosines(queries).square().mean()


@torch.no_grad()
def query_statistics(queries: Float[Tensor, "B Q D"]) -> dict[str, Float[Tensor, ""]]:
    """How much the output queries Z of an image differ; nothing where there is one query.

    Returns:
        ``query_similarity``: mean cosine between the queries of an image; 1 where they have collapsed into one vector.
        ``query_variance``: share of the variance of Z that lies between the queries of an image and not between
        images, in [0, 1]; 0 where they have collapsed.
    """
    if queries.shape[1] == 1:
        return {}
    z = queries.detach().float()
    within = z.var(dim=1, correction=0).sum(dim=-1).mean()
    between = z.mean(dim=1).var(dim=0, correction=0).sum()
    share = within / (within + between).clamp(min=torch.finfo(torch.float32).tiny)
    return {"query_similarity": query_cosines(z).mean(), "query_variance": share}


def image_text_matching(
    logits: Float[Tensor, "M 2"], labels: Int[Tensor, "M"], counted: Bool[Tensor, "M"]
) -> Float[Tensor, ""]:
    """ITM: two-class cross-entropy over the rows that are `counted` (§3.2). Class 1 is "matched"."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses * counted).sum() / counted.sum()


class Written(NamedTuple):
    """How well a text is predicted."""

    loss: Float[Tensor, ""]
    perplexity: Float[Tensor, ""]
    """Without label smoothing and without gradient, as is what follows."""
    accuracy: Float[Tensor, ""]
    """Share of tokens predicted right."""


def language_modeling(
    states: Float[Tensor, "M D"],
    head: Callable[[Float[Tensor, "M D"]], Float[Tensor, "M V"]],
    labels: Int[Tensor, "M"],
    label_count: float | None = None,
    label_smoothing: float = 0.0,
) -> Written:
    """Next-token cross-entropy in nats, summed over M labeled positions and divided by `label_count` (§3.2, §3.3).

    Logits are made a chunk of positions at a time, and again in the backward pass where there are several chunks: no
    more than :data:`LOGITS_AT_ONCE` are in memory, however many positions and words there are.

    Args:
        states: hidden states at the labeled positions.
        head: what makes logits of them.
        label_count: what to divide by; M when None. The training loop gives the average M over the micro-batches
            and processes of one optimizer step, which makes their sum one mean over all labels of the step.
    """
    rows = max(LOGITS_AT_ONCE // head(states[:0]).shape[-1], 1)
    chunks = list(zip(states.split(rows), labels.split(rows), strict=True))
    if len(chunks) > 1 and torch.is_grad_enabled():
        sums = [cast(Tensor, checkpoint(_entropies, head, *chunk, use_reentrant=False)) for chunk in chunks]
    else:
        sums = [_entropies(head, *chunk) for chunk in chunks]
    entropy, spread, right = torch.stack(sums).sum(dim=0)
    count = max(len(labels), 1)
    total = (1 - label_smoothing) * entropy + label_smoothing * spread
    return Written(
        total / (label_count if label_count is not None else count),
        (entropy.detach() / count).exp(),
        right.detach() / count,
    )


def _entropies(
    head: Callable[[Float[Tensor, "M D"]], Float[Tensor, "M V"]], states: Float[Tensor, "M D"], labels: Int[Tensor, "M"]
) -> Float[Tensor, "3"]:
    """Sums over positions: cross-entropy with the label, cross-entropy with all words alike, number predicted right."""
    log_probabilities = head(states).float().log_softmax(dim=-1)
    entropy = F.nll_loss(log_probabilities, labels, reduction="sum")
    right = (log_probabilities.detach().argmax(dim=-1) == labels).sum()
    return torch.stack([entropy, -log_probabilities.mean(dim=-1).sum(), right.float()])

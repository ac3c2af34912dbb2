"""Closed-form initialization of the projection from Z to the LLM (paper §3.3).

The outputs of a random projection are far from the LLM's token embeddings, and the first steps of stage 2 only learn
their distribution. After stage 1, Z already encodes the content of the caption, so that a linear map from Z to the
LLM's token embeddings of the caption can be fitted by ridge regression in one pass over a small part of the data.

Legend: B batch, Q queries, D Q-Former width, L width of the LLM, T tokens of a caption, U positions of the LLM's text.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from blip2.backbones.features import token_mask
from blip2.model.generation import GenerationBatch, GenerationModel
from blip2.model.losses import IGNORE_INDEX

RIDGE = 1e-2
"""Penalty on the weights, as a fraction of the mean variance of Z."""


@torch.no_grad()
def fit_projection(model: GenerationModel, batches: Iterable[GenerationBatch]) -> float:
    """Set the projection to the ridge regression, with the penalty :data:`RIDGE`, from Z to the LLM's token embeddings
    of the captions.

    Query q (0 to Q - 1) is fitted to token floor(q T / Q) of a caption with T tokens; with ``qformer.window``, Q counts
    the queries of all windows of a sequence. The result is scaled to the standard deviation of the LLM's token
    embeddings.

    Args:
        model: the model; only its projection is changed.
        batches: images with captions; several hundred images are enough.

    Returns:
        The fraction of the targets' variance that the map explains, in [0, 1].
    """
    training = model.training
    model.eval()
    inputs = model.projection.in_features + 1
    width, device = model.projection.out_features, model.projection.weight.device
    xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
    xy = xx.new_zeros(inputs, width)
    yy, y, count = xx.new_zeros(()), xx.new_zeros(width), 0
    for batch in batches:
        z = model.query_outputs(batch.images, batch.questions).double()
        exists = token_mask(z)  # False for the queries of windows that a sequence lacks
        targets = model.language.embed(_aligned_tokens(batch.labels, exists))[exists].double()
        x = torch.cat([z, torch.ones_like(z[..., :1])], dim=-1)[exists]
        xx += x.T @ x
        xy += x.T @ targets
        yy += targets.square().sum()
        y += targets.sum(dim=0)
        count += len(x)
    mean = xx[:-1, -1] / count
    penalty = torch.full_like(xx[0], float(RIDGE * ((xx.diagonal()[:-1] / count - mean.square()).mean() * count)))
    penalty[-1] = 0  # no penalty on the bias
    solution = torch.linalg.solve(xx + penalty.diag(), xy)  # [D + 1, L]
    explained = 2 * (solution * xy).sum() - (solution * (xx @ solution)).sum()
    total = yy - y.square().sum() / count
    scale = model.language.embedding_scale() / (explained.clamp(min=1e-12) / (count * width)).sqrt()
    model.projection.weight.copy_((scale * solution[:-1].T).to(model.projection.weight.dtype))
    model.projection.bias.copy_((scale * solution[-1]).to(model.projection.bias.dtype))
    model.train(training)
    return float(1 - (yy - explained) / total)


def _aligned_tokens(labels: Int[Tensor, "B U"], exists: Bool[Tensor, "B Q"]) -> Int[Tensor, "B Q"]:
    """Return, for each query, the id of the caption token to which the query is fitted.

    Where `exists` is False, the id has no meaning.
    """
    rows = []
    for row, num_queries in zip(labels, exists.sum(dim=1).tolist(), strict=True):
        tokens = row[row != IGNORE_INDEX][:-1]  # without the end-of-text token
        tokens = tokens if len(tokens) else row[row != IGNORE_INDEX]
        indices = torch.arange(exists.shape[1], device=row.device) * len(tokens) // num_queries
        rows.append(tokens[indices.clamp(max=len(tokens) - 1)])
    return torch.stack(rows)

"""A closed-form start of the projection from Z to the LLM (paper §3.3).

A random projection shows the LLM vectors that are like no words, and the first steps of stage 2 go into finding out
what words are like. After stage 1 Z already tells what the caption says, so a linear map from Z to the LLM's token
embeddings of the caption can be solved for at once, by ridge regression over one pass.

Legend: N images, B batch, Q queries, D Q-Former width, L width of the LLM, U tokens of a caption.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from blip2.model.generation import GenerationBatch, GenerationModel
from blip2.model.objectives import IGNORED

RIDGE = 1e-2
"""Penalty on the weights, as a share of the mean variance of Z."""
COMMON = 0.2
"""Share of the captions above which a token that they hold ("a", "on", "of") does not tell images apart."""


@torch.no_grad()
def fit_projection(model: GenerationModel, batches: Iterable[GenerationBatch]) -> float:
    """Set the projection to the least-squares map from Z to the LLM's embeddings of the words that tell images apart.

    Of a caption's tokens those count that at most :data:`COMMON` of all captions hold, or all where there are none.
    Query q of Q is fitted to the token at its share of them: of T tokens to number floor(q T / Q). Without that choice
    the map would say "a", "on" and "the" to every image, which explains most of the variance and tells nothing. The
    result is scaled to the spread of the LLM's token embeddings.

    Args:
        batches: images with captions; some hundred images are enough.

    Returns:
        The share of the targets' variance that the map explains, in [0, 1].
    """
    training = model.training
    model.eval()
    outputs, captions = [], []
    for batch in batches:
        outputs.append(model.query_outputs(batch.images, batch.questions).cpu())
        captions += [row[row != IGNORED].cpu() for row in batch.labels]
    z = torch.cat(outputs).double()  # [N, Q, D]
    tokens = _aligned_tokens(captions, z.shape[1])  # [N, Q]
    device = model.projection.weight.device
    targets = model.language.embed(tokens.to(device)).cpu().double().flatten(0, 1)
    x = torch.cat([z, torch.ones_like(z[..., :1])], dim=-1).flatten(0, 1)
    xx, xy = x.T @ x, x.T @ targets
    penalty = torch.full_like(xx[0], float(RIDGE * x[:, :-1].var(dim=0, correction=0).mean() * len(x)))
    penalty[-1] = 0  # the bias is free
    solution = torch.linalg.solve(xx + penalty.diag(), xy)  # [D + 1, L]
    fitted = x @ solution
    residual = (targets - fitted).square().sum()
    scale = model.language.embedding_scale() / float(fitted.square().mean().sqrt().clamp(min=1e-12))
    model.projection.weight.copy_((scale * solution[:-1].T).to(model.projection.weight.dtype))
    model.projection.bias.copy_((scale * solution[-1]).to(model.projection.bias.dtype))
    model.train(training)
    return float(1 - residual / (targets - targets.mean(dim=0)).square().sum())


def _aligned_tokens(captions: Sequence[Int[Tensor, "_"]], num_queries: int) -> Int[Tensor, "N Q"]:
    """The id of the token of its caption that each query is fitted to.

    Args:
        captions: ids of each, with the end of the text.
    """
    holds = Counter(token for ids in captions for token in set(ids.tolist()))
    rows = []
    for ids in captions:
        said = ids[:-1].tolist() or ids.tolist()  # without the end
        said = [token for token in said if holds[token] <= COMMON * len(captions)] or said
        rows.append([said[query * len(said) // num_queries] for query in range(num_queries)])
    return torch.tensor(rows)

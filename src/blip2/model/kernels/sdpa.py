"""Scaled dot-product attention: softmax(Q K^T / sqrt(d)) V.

Legend: B batch (images in cross-attention), N rows of Q queries, M queries, K keys, P image tokens, H heads, d width of
a head, D = H * d.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from blip2.model.kernels.dropout import dropout


def split_heads(x: Float[Tensor, "B M D"], num_heads: int) -> Float[Tensor, "B {num_heads} M d"]:
    return torch.unflatten(x, -1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Float[Tensor, "B H M d"]) -> Float[Tensor, "B M D"]:
    return x.transpose(1, 2).flatten(2)


def sdpa(
    query: Float[Tensor, "B H M d"],
    key: Float[Tensor, "B H K d"],
    value: Float[Tensor, "B H K d"],
    mask: Bool[Tensor, "B 1 M K"] | None,
    p: float,
) -> Float[Tensor, "B H M d"]:
    """Return ``dropout(softmax(query @ key.mT / sqrt(d), -1), p) @ value``.

    Args:
        mask: True where a query may attend to a key. None: every query may attend to every key.
        p: the probability of dropping an attention weight, in [0, 1).
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, mask, p)
    if not p and query.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(query, key, value, mask)
    # PyTorch has no fused CPU kernel with dropout, and its fallback stores twice as much for the backward pass. In
    # bfloat16 the fused kernel takes as long as in float32, and four times as long in the backward pass.
    scores = (query / math.sqrt(query.shape[-1])) @ key.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    attn_weights = scores.softmax(dim=-1)
    return (dropout(attn_weights, p) if p else attn_weights).to(value.dtype) @ value


def sdpa_shared_kv(
    query: Float[Tensor, "N Q D"],
    key: Float[Tensor, "B H P d"],
    value: Float[Tensor, "B H P d"],
    row_to_image: Int[Tensor, "N"] | int,
    p: float,
    mask: Bool[Tensor, "B P"] | None = None,
) -> Float[Tensor, "N Q D"]:
    """Return ``sdpa(query, key[row_to_image], value[row_to_image], mask[row_to_image], p)``, with the heads merged.

    The queries of all rows with the same image are concatenated, so that the keys and values of an image are read once.

    Args:
        query: the queries of N rows, before the heads are split.
        key: the keys of B images.
        value: the values of B images.
        row_to_image: the image of each row, an index in [0, B). An int n means that all images repeat n times, in order
            (N = n * B).
        p: the probability of dropping an attention weight, in [0, 1).
        mask: True for tokens of an image, False for padding. None: there is no padding.
    """
    if isinstance(row_to_image, int):
        return _sdpa_repeated(query, key, value, row_to_image, p, mask)
    # On other devices, and when compiled, one large product is faster than many small ones.
    if row_to_image.device.type != "cpu" or torch.compiler.is_compiling():
        row_mask = None if mask is None else mask[row_to_image]
        return _sdpa_repeated(query, key[row_to_image], value[row_to_image], 1, p, row_mask)
    order = row_to_image.argsort(stable=True)
    counts: list[int] = row_to_image.bincount(minlength=len(key)).numpy().tolist()
    queries = torch.split(query.index_select(0, order), counts)
    masks = [None] * len(key) if mask is None else torch.split(mask, 1)
    groups = zip(queries, torch.split(key, 1), torch.split(value, 1), counts, masks, strict=True)
    attn_output = [_sdpa_repeated(q, k, v, count, p, m) for q, k, v, count, m in groups if count]
    return torch.cat(attn_output).index_select(0, order.argsort())


def _sdpa_repeated(
    query: Float[Tensor, "N Q D"],
    key: Float[Tensor, "B H P d"],
    value: Float[Tensor, "B H P d"],
    repeats: int,
    p: float,
    mask: Bool[Tensor, "B P"] | None,
) -> Float[Tensor, "N Q D"]:
    num_heads, num_queries = key.shape[1], query.shape[1]
    q = torch.unflatten(torch.unflatten(query, 0, (repeats, -1)), -1, (num_heads, -1))  # [repeats, B, Q, H, d]
    q = q.permute(1, 3, 0, 2, 4).flatten(2, 3)  # [B, H, repeats * Q, d]
    out = sdpa(q, key, value, None if mask is None else mask[:, None, None].expand(-1, -1, q.shape[2], -1), p)
    out = torch.unflatten(out, 2, (repeats, num_queries)).permute(2, 0, 3, 1, 4)  # [repeats, B, Q, H, d]
    return out.flatten(3).flatten(0, 1)

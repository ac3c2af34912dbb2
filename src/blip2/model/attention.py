"""Self-attention and cross-attention of the Q-Former (paper §3.1).

Both kinds of attention compute LayerNorm(x + O softmax(Q K^T / sqrt(d)) V) with several heads, as in BERT. Q is a
projection of x; K and V are projections of [queries; text] in self-attention and of image features in cross-attention.

Legend: B images, N rows of [queries; text], Q queries, T text tokens, S = Q + T, P image tokens, D width of the
Q-Former, E width of the image encoder, H heads, d = D / H, _ any number.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from blip2.config import QFormerConfig
from blip2.model.image_memory import CrossAttentionKV
from blip2.model.kernels.dropout import Dropout
from blip2.model.kernels.linear import Linear, NormalizedFeatures, to_autocast_dtype
from blip2.model.kernels.packing import PackedTokens
from blip2.model.kernels.sdpa import merge_heads, sdpa, sdpa_shared_kv, split_heads


class Attention(nn.Module):
    """The projections, residual connection and LayerNorm that both kinds of attention have.

    Args:
        config: sizes of the Q-Former.
        source_width: width of the input of the key and value projections: D in self-attention, E in cross-attention.
    """

    def __init__(self, config: QFormerConfig, source_width: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query = Linear(width, width)
        self.key = Linear(source_width, width)
        self.value = Linear(source_width, width)
        self.output = Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def add_and_norm(
        self, x: Float[Tensor, "*shape D"], attn_output: Float[Tensor, "*shape D"]
    ) -> Float[Tensor, "*shape D"]:
        return self.norm(x + self.dropout(self.output(attn_output)))


class SelfAttention(Attention):
    """Self-attention over [queries; text], which both transformers of Figure 2 share."""

    def forward(
        self,
        queries: Float[Tensor, "_ Q D"] | None,
        text: Float[Tensor, "_ D"] | None,
        mask: Bool[Tensor, "N 1 S S"] | None,
        tokens: PackedTokens,
        keep: PackedTokens,
    ) -> tuple[Float[Tensor, "N Q D"] | None, Float[Tensor, "_ D"] | None]:
        """Return the outputs of the queries and of the text tokens in `keep`; None for a part that `keep` lacks.

        Args:
            queries: [N, Q, D], or [1, Q, D] if all rows have the same queries. None: there is only text.
            text: the text tokens of all rows as one list, without padding. None: there are only queries.
            mask: True where a token (third dimension) may attend to a token (fourth dimension), as
                :func:`~blip2.model.qformer.attention_mask` makes it. None: every token may attend to every token of its
                row.
            tokens: the layout of `queries` and `text`.
            keep: the layout of the tokens whose outputs are computed: `tokens`, or a selection from `tokens`.
        """
        x = tokens.cat(queries, text)
        source = to_autocast_dtype(x)
        k, v = (split_heads(tokens.pad(part(source)), self.num_heads) for part in (self.key, self.value))
        if keep.kept_indices is not None:
            x = tokens.expand_queries(x)[keep.kept_indices]
            source = to_autocast_dtype(x)
            mask = None if mask is None else mask[:, :, : keep.seq_len]
        q = split_heads(keep.pad(self.query(source)), self.num_heads)
        attn_output = merge_heads(sdpa(q, k, v, mask, self.dropout.active_p))
        return keep.split(self.add_and_norm(keep.expand_queries(x), keep.unpad(attn_output)))


class CrossAttention(Attention):
    """Cross-attention of the queries to image features."""

    def project_image(self, features: NormalizedFeatures, mask: Bool[Tensor, "B P"] | None = None) -> CrossAttentionKV:
        """Project image features [B, P, E] to keys and values.

        Args:
            features: the features.
            mask: True for tokens, False for padding, to which no query attends. None: there is no padding.
        """
        k, v = (split_heads(features.project(part), self.num_heads) for part in (self.key, self.value))
        return CrossAttentionKV(k, v, mask=mask)

    def forward(
        self, queries: Float[Tensor, "N Q D"], image_kv: tuple[CrossAttentionKV, ...]
    ) -> Float[Tensor, "N Q D"]:  # fmt: skip
        """Return the outputs of the queries.

        Args:
            queries: the queries of each row.
            image_kv: groups of keys and values. The rows of `queries` attend to the rows of the first group, then to
                those of the second, and so on; all groups together have N rows.
        """
        groups = self.query(queries).split([kv.num_rows for kv in image_kv])
        p = self.dropout.active_p
        outputs = [
            sdpa_shared_kv(q, kv.keys, kv.values, kv.row_to_image, p, kv.mask)
            for q, kv in zip(groups, image_kv, strict=True)
        ]
        return self.add_and_norm(queries, torch.cat(outputs) if len(outputs) > 1 else outputs[0])

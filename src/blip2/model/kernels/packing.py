"""Text without padding.

The queries of a batch have one length, its texts do not. All layers but attention work on single tokens, so tokens pass
through a block as a list [M, D]: the queries of all rows, then the text tokens of all rows that are not padding.
Attention alone needs rows of one length, :meth:`PackedTokens.pad`.

Legend: N rows of [queries; text], Q queries, T text tokens with padding, S = Q + T, M tokens without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class PackedTokens:
    """The layout of a list of tokens."""

    num_rows: int
    """N."""
    num_query_tokens: int
    """Q; 0 if the text is alone."""
    seq_len: int
    """S."""
    indices: Int[Tensor, "M"] | None = None
    """The place of each token in [N * S]; None if there is no text, and the tokens are in order."""
    kept_indices: Int[Tensor, "M"] | slice | None = None
    """Indices into the parent layout, if this one is a selection from it."""

    @classmethod
    def from_mask(cls, num_rows: int, num_query_tokens: int, text_mask: Bool[Tensor, "N T"] | None) -> PackedTokens:
        """Return the layout of all queries and of the text tokens where `text_mask` is True; None: no text."""
        if text_mask is None:
            return cls(num_rows, num_query_tokens, num_query_tokens)
        seq_len = num_query_tokens + text_mask.shape[1]
        places = torch.arange(num_rows * seq_len, device=text_mask.device).view(num_rows, seq_len)
        query_places, text_places = places[:, :num_query_tokens].flatten(), places[:, num_query_tokens:][text_mask]
        return cls(num_rows, num_query_tokens, seq_len, torch.cat([query_places, text_places]))

    def select(self, text: Bool[Tensor, "N T"] | bool) -> PackedTokens:
        """Return the layout of all queries and of the text tokens where `text` is True."""
        if text is True or self.indices is None:
            return self
        if text is False:
            kept = slice(self.num_rows * self.num_query_tokens)
            return PackedTokens(self.num_rows, self.num_query_tokens, self.num_query_tokens, kept_indices=kept)
        keep = torch.cat([text.new_ones(self.num_rows, self.num_query_tokens), text], dim=1).flatten()
        kept = keep[self.indices].nonzero().flatten()
        return PackedTokens(self.num_rows, self.num_query_tokens, self.seq_len, self.indices[kept], kept)

    def _has_all_queries(self, x: Float[Tensor, "_ E"]) -> bool:
        """Return whether `x` has N rows of queries, not one."""
        return len(x) == (self.num_rows * self.num_query_tokens if self.indices is None else len(self.indices))

    def cat(
        self, queries: Float[Tensor, "_ Q D"] | None, text: Float[Tensor, "_ D"] | None
    ) -> Float[Tensor, "_ D"]:  # fmt: skip
        """Return the tokens as one list. `queries` [1, Q, D] stands for N equal rows of queries."""
        parts = [part for part in (None if queries is None else queries.flatten(0, 1), text) if part is not None]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def split(self, x: Float[Tensor, "_ D"]) -> tuple[Float[Tensor, "_ Q D"] | None, Float[Tensor, "_ D"] | None]:
        """Undo :meth:`cat`. A part that this layout does not have is None."""
        if self.indices is None:
            return torch.unflatten(x, 0, (-1, self.num_query_tokens)), None
        if not self.num_query_tokens:
            return None, x
        num_rows = self.num_rows if self._has_all_queries(x) else 1
        num_queries = num_rows * self.num_query_tokens
        return torch.unflatten(x[:num_queries], 0, (num_rows, self.num_query_tokens)), x[num_queries:]

    def expand_queries(self, x: Float[Tensor, "_ E"]) -> Float[Tensor, "M E"]:
        """Return `x` with N rows of queries, if it has one row that stands for all."""
        if self._has_all_queries(x):
            return x
        return torch.cat([x[: self.num_query_tokens].repeat(self.num_rows, 1), x[self.num_query_tokens :]])

    def pad(self, x: Float[Tensor, "_ E"]) -> Float[Tensor, "N S E"]:
        """Return rows of one length; padding is zero. `x` may have one row of queries, see :meth:`expand_queries`."""
        x = self.expand_queries(x)
        if self.indices is not None:
            # Unlike index_copy, index_put does not store x for the backward pass.
            x = x.new_zeros(self.num_rows * self.seq_len, x.shape[1]).index_put_((self.indices,), x)
        return torch.unflatten(x, 0, (self.num_rows, self.seq_len))

    def unpad(self, x: Float[Tensor, "N S E"]) -> Float[Tensor, "M E"]:
        """Undo :meth:`pad`."""
        return x.flatten(0, 1) if self.indices is None else x.flatten(0, 1).index_select(0, self.indices)

"""Text without padding.

All rows of a batch have the same number of queries, but their texts differ in length. Layers other than attention
compute each token by itself, so the tokens pass through a block as one list [M, D]: the queries of all rows, then the
text tokens of all rows, without padding. Only attention needs rows of equal length, which :meth:`PackedTokens.pad`
makes. As long as all rows have the same queries, the list may contain one set of Q queries instead of N.

Legend: N rows of [queries; text], Q queries, T text tokens with padding, S = Q + T, M tokens without padding, D width
of the Q-Former, E any width, _ any number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class PackedTokens:
    """The layout of a list of tokens: the row and the column of each token."""

    num_rows: int
    """N, the number of rows."""
    num_query_tokens: int
    """Q, the number of queries per row; 0 if there is only text."""
    seq_len: int
    """S, the length of a row with padding."""
    indices: Int[Tensor, "M"] | None = None
    """Index of each token in the N * S positions of all rows. None: there is no text, so the M = N * S tokens are in
    order."""
    kept_indices: Int[Tensor, "M"] | slice | None = None
    """If :meth:`select` made this layout: index of each token in the list of the layout from which it was selected."""

    @classmethod
    def from_mask(cls, num_rows: int, num_query_tokens: int, text_mask: Bool[Tensor, "N T"] | None) -> PackedTokens:
        """Return the layout of all queries and of the text tokens where `text_mask` is True.

        Args:
            num_rows: N.
            num_query_tokens: Q; 0 if there is only text.
            text_mask: True for text tokens, False for padding. None: there is no text.
        """
        if text_mask is None:
            return cls(num_rows, num_query_tokens, num_query_tokens)
        seq_len = num_query_tokens + text_mask.shape[1]
        places = torch.arange(num_rows * seq_len, device=text_mask.device).view(num_rows, seq_len)
        query_places, text_places = places[:, :num_query_tokens].flatten(), places[:, num_query_tokens:][text_mask]
        return cls(num_rows, num_query_tokens, seq_len, torch.cat([query_places, text_places]))

    def select(self, text: Bool[Tensor, "N T"] | bool) -> PackedTokens:
        """Return the layout of all queries and of the text tokens where `text` is True.

        Args:
            text: one value per text token; a single True selects all text tokens, a single False none.
        """
        if text is True or self.indices is None:
            return self
        if text is False:
            kept = slice(self.num_rows * self.num_query_tokens)
            return PackedTokens(self.num_rows, self.num_query_tokens, self.num_query_tokens, kept_indices=kept)
        keep = torch.cat([text.new_ones(self.num_rows, self.num_query_tokens), text], dim=1).flatten()
        kept = keep[self.indices].nonzero().flatten()
        return PackedTokens(self.num_rows, self.num_query_tokens, self.seq_len, self.indices[kept], kept)

    def _has_all_queries(self, x: Float[Tensor, "_ E"]) -> bool:
        """Return whether `x` has the queries of all N rows, and not one set of queries for all rows."""
        return len(x) == (self.num_rows * self.num_query_tokens if self.indices is None else len(self.indices))

    def cat(
        self, queries: Float[Tensor, "_ Q D"] | None, text: Float[Tensor, "_ D"] | None
    ) -> Float[Tensor, "_ D"]:  # fmt: skip
        """Concatenate queries and text to one list. `queries` [1, Q, D] is one set of queries for all rows."""
        parts = [part for part in (None if queries is None else queries.flatten(0, 1), text) if part is not None]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def split(self, x: Float[Tensor, "_ D"]) -> tuple[Float[Tensor, "_ Q D"] | None, Float[Tensor, "_ D"] | None]:
        """Split a list into queries and text, the inverse of :meth:`cat`. A part that the layout lacks is None."""
        if self.indices is None:
            return torch.unflatten(x, 0, (-1, self.num_query_tokens)), None
        if not self.num_query_tokens:
            return None, x
        num_rows = self.num_rows if self._has_all_queries(x) else 1
        num_queries = num_rows * self.num_query_tokens
        return torch.unflatten(x[:num_queries], 0, (num_rows, self.num_query_tokens)), x[num_queries:]

    def expand_queries(self, x: Float[Tensor, "_ E"]) -> Float[Tensor, "M E"]:
        """Return `x` with Q queries for each of the N rows.

        If `x` starts with one set of Q queries that all rows share, this set is repeated N times; the text tokens after
        it are unchanged.
        """
        if self._has_all_queries(x):
            return x
        return torch.cat([x[: self.num_query_tokens].repeat(self.num_rows, 1), x[self.num_query_tokens :]])

    def pad(self, x: Float[Tensor, "_ E"]) -> Float[Tensor, "N S E"]:
        """Expand a list to N rows of length S, with zeros as padding. `x` may have one set of queries for all rows."""
        x = self.expand_queries(x)
        if self.indices is not None:
            # Unlike index_copy, index_put does not store x for the backward pass.
            x = x.new_zeros(self.num_rows * self.seq_len, x.shape[1]).index_put_((self.indices,), x)
        return torch.unflatten(x, 0, (self.num_rows, self.seq_len))

    def unpad(self, x: Float[Tensor, "N S E"]) -> Float[Tensor, "M E"]:
        """Return the list of the tokens of padded rows, the inverse of :meth:`pad`."""
        return x.flatten(0, 1) if self.indices is None else x.flatten(0, 1).index_select(0, self.indices)

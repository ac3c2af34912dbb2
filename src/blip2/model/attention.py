"""Attention of the Q-Former, and what it remembers of images (paper §3.1).

Legend: B images, N rows that look at them, Q queries, T text tokens, S = Q + T, M tokens of all rows that are not
padding, P image tokens, D width of the Q-Former, H heads, d = D / H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from blip2.config import QFormerConfig
from blip2.model.kernels.linear import Linear, linear


class Looked(NamedTuple):
    """What rows look at in one cross-attention: keys and values of B images.

    Rows that look at the same image share its keys and values: nothing is copied on CPUs, and little elsewhere.
    """

    keys: Float[Tensor, "B H P d"]
    values: Float[Tensor, "B H P d"]
    images: Int[Tensor, "N"] | int = 1
    """Which image each row looks at. Or how many rounds of rows there are, each with one row an image in order."""

    @property
    def rows(self) -> int:
        return self.images * len(self.keys) if isinstance(self.images, int) else len(self.images)

    @property
    def row_keys(self) -> Float[Tensor, "N H P d"]:
        """The keys of the image that each row looks at, a copy for each."""
        return self.keys.repeat(self.images, 1, 1, 1) if isinstance(self.images, int) else self.keys[self.images]


@dataclass(frozen=True)
class ImageMemory:
    """Keys and values that the cross-attentions make of image features.

    They depend on the image alone, not on queries or text, so they are made once an image and shared by every pass
    that looks at it: ITC, ITG and the three ITM passes of a training step, all candidates in re-ranking, all
    questions about one picture.
    """

    layers: tuple[tuple[Looked, ...], ...]
    """Of each block that has cross-attention, in order: what its rows look at, one group of rows after the other."""

    def __len__(self) -> int:
        """Number of rows that look."""
        return sum(looked.rows for looked in self.layers[0])

    def select(self, images: Int[Tensor, "N"]) -> ImageMemory:
        """Rows that look at `images` (indices, with repeats) of this memory, which has one row an image."""
        return ImageMemory(tuple(tuple(Looked(k, v, images) for k, v, _ in layer) for layer in self.layers))

    def repeat(self, copies: int) -> ImageMemory:
        """All rows `copies` times, one round after the other."""
        return ImageMemory(
            tuple(
                tuple(Looked(k, v, i * copies if isinstance(i, int) else i.repeat(copies)) for k, v, i in layer)
                for layer in self.layers
            )
        )

    def join(self, other: ImageMemory) -> ImageMemory:
        """The rows of this memory, then those of `other`."""
        return ImageMemory(tuple(mine + theirs for mine, theirs in zip(self.layers, other.layers, strict=True)))


@dataclass(frozen=True)
class Layout:
    """Where tokens sit in the rows of [queries; text] that they belong to.

    Tokens go through a block as one long list, [M, D]: the queries of all rows, then all text without its padding.
    Attention alone needs rows of one length; it spreads the tokens out and collects them again.
    """

    rows: int
    """N."""
    queries: int
    """Q, 0 where the text is alone."""
    size: int
    """S."""
    places: Int[Tensor, "M"] | None = None
    """Of each token in [N * S]; None where there is no text, and tokens are in order."""
    chosen: Int[Tensor, "M"] | slice | None = None
    """Which tokens these are of a larger layout, where they were chosen from one."""

    @classmethod
    def of(cls, rows: int, queries: int, text: Bool[Tensor, "N T"] | None = None) -> Layout:
        """For rows that all have these queries, and the text that is True."""
        if text is None:
            return cls(rows, queries, queries)
        size = queries + text.shape[1]
        places = torch.arange(rows * size, device=text.device).view(rows, size)
        return cls(rows, queries, size, torch.cat([places[:, :queries].flatten(), places[:, queries:][text]]))

    def choose(self, text: Bool[Tensor, "N T"] | bool) -> Layout:
        """The queries, and of the text what is True."""
        if text is True or self.places is None:
            return self
        if text is False:
            return Layout(self.rows, self.queries, self.queries, chosen=slice(self.asking))
        wanted = torch.cat([text.new_ones(self.rows, self.queries), text], dim=1).flatten()
        chosen = wanted[self.places].nonzero().flatten()
        return Layout(self.rows, self.queries, self.size, self.places[chosen], chosen)

    @property
    def asking(self) -> int:
        """How many of the tokens are queries."""
        return self.rows * self.queries

    @property
    def text(self) -> int:
        """How many of the tokens are text."""
        return 0 if self.places is None else len(self.places) - self.asking

    def repeat(self, x: Float[Tensor, "_ E"]) -> Float[Tensor, "M E"]:
        """Before the first block the queries of all rows are alike, and come once: [Q, E] and the text."""
        if len(x) == self.asking + self.text:
            return x
        return torch.cat([x[: self.queries].repeat(self.rows, 1), x[self.queries :]])

    def spread(self, x: Float[Tensor, "M E"]) -> Float[Tensor, "N S E"]:
        """Padding is zero."""
        if self.places is not None:
            # Unlike index_copy, it does not keep x for the backward pass.
            x = x.new_zeros(self.rows * self.size, x.shape[1]).index_put_((self.places,), x)
        return x.unflatten(0, (self.rows, self.size))

    def collect(self, x: Float[Tensor, "N S E"]) -> Float[Tensor, "M E"]:
        return x.flatten(0, 1) if self.places is None else x.flatten(0, 1).index_select(0, self.places)


def cast(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """To the dtype that autocast would cast it to, once for all the projections that read it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def drop(x: Float[Tensor, "*shape"], share: float) -> Float[Tensor, "*shape"]:
    """Dropout that keeps one byte an element for the backward pass, as PyTorch's own does on GPUs but not on CPUs."""
    if x.device.type != "cpu":
        return F.dropout(x, share)
    # A CPU draws uniform numbers twice as fast as Bernoulli's.
    return x * (torch.rand(x.shape) >= share) / (1 - share)


def attend(
    queries: Float[Tensor, "B H N d"],
    keys: Float[Tensor, "B H M d"],
    values: Float[Tensor, "B H M d"],
    mask: Bool[Tensor, "B 1 N M"] | None,
    dropout: float,
) -> Float[Tensor, "B H N d"]:
    if queries.device.type != "cpu":
        return F.scaled_dot_product_attention(queries, keys, values, mask, dropout)
    if dropout or queries.dtype == torch.bfloat16:
        # The CPU has no fused kernel with dropout, and PyTorch's own way without one keeps twice as much; in bfloat16
        # the fused kernel's products run in float32's time, and those of its backward pass in four times that.
        scores = (queries / math.sqrt(queries.shape[-1])) @ keys.mT
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        shares = scores.softmax(dim=-1)
        return (drop(shares, dropout) if dropout else shares).to(values.dtype) @ values
    return F.scaled_dot_product_attention(queries, keys, values, mask)


class Dropout(nn.Module):
    """Sets a share of hidden units to zero in training, and makes up for them with the others."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    @property
    def now(self) -> float:
        """The share that is dropped now."""
        return self.share if self.training else 0.0

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return drop(x, self.now) if self.now else x


class Attention(nn.Module):
    """What both kinds of attention share: the projections, residual and LayerNorm (post-norm, as in BERT)."""

    def __init__(self, config: QFormerConfig, source_width: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = Linear(width, width)
        self.key = Linear(source_width, width)
        self.value = Linear(source_width, width)
        self.output = Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def split_heads(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B H N d"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_and_values(
        self, features: Float[Tensor, "B P E"], norm: nn.LayerNorm | None = None
    ) -> tuple[Float[Tensor, "B H P d"], Float[Tensor, "B H P d"]]:
        """Of image features.

        Args:
            norm: what the features were normalized, but not yet scaled and shifted by. Its weight and bias go into the
                projections instead: W (g * x + b) = (W * g) x + W b. The gradient of the norm then comes from that of
                the projections' weights, and none has to be computed for the features.
        """
        key, value = (
            part(features)
            if norm is None
            else linear(features, part.weight * norm.weight, part.bias + (part.weight * norm.bias).sum(dim=1))
            for part in (self.key, self.value)
        )
        return self.split_heads(key), self.split_heads(value)

    def finish(self, x: Float[Tensor, "*shape D"], seen: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        return self.norm(x + self.dropout(self.output(seen)))


class SelfAttention(Attention):
    """Of [queries; text] among themselves."""

    def forward(
        self, x: Float[Tensor, "_ D"], layout: Layout, mask: Bool[Tensor, "N 1 S S"] | None, seeing: Layout
    ) -> Float[Tensor, "_ D"]:
        """All tokens are seen.

        Args:
            x: all M tokens, or what :meth:`Layout.repeat` makes them of: then nothing is projected twice.
            seeing: the tokens that see, `layout` or chosen from it.
        """
        source = cast(x)
        keys, values = (self.split_heads(layout.spread(layout.repeat(part(source)))) for part in (self.key, self.value))
        if seeing.chosen is not None:
            x = layout.repeat(x)[seeing.chosen]
            source = cast(x)
            mask = mask if mask is None else mask[:, :, : seeing.size]
            layout = seeing
        queries = self.split_heads(layout.spread(layout.repeat(self.query(source))))
        seen = attend(queries, keys, values, mask, self.dropout.now)
        return self.finish(layout.repeat(x), layout.collect(seen.transpose(1, 2).flatten(2)))


class CrossAttention(Attention):
    """Of the queries to image features."""

    def forward(self, x: Float[Tensor, "N Q D"], memory: tuple[Looked, ...]) -> Float[Tensor, "N Q D"]:
        queries, start, parts = self.query(x), 0, []
        for looked in memory:
            parts.append(self._look(queries[start : start + looked.rows], looked))
            start += looked.rows
        return self.finish(x, torch.cat(parts) if len(parts) > 1 else parts[0])

    def _look(self, queries: Float[Tensor, "N Q D"], looked: Looked) -> Float[Tensor, "N Q D"]:
        keys, values, images = looked
        if isinstance(images, int):
            return self._look_together(queries, keys, values, images)
        # Elsewhere than on CPUs one large piece of work is better than many small ones, and so it is to be compiled.
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            return self._look_together(queries, keys[images], values[images], 1)
        order, counts = images.argsort(stable=True), images.bincount(minlength=len(keys)).tolist()
        parts = queries.index_select(0, order).split(counts)
        each = zip(parts, keys.split(1), values.split(1), counts, strict=True)
        seen = [self._look_together(part, k, v, count) for part, k, v, count in each if count]
        return torch.cat(seen).index_select(0, order.argsort())

    def _look_together(
        self, queries: Float[Tensor, "N Q D"], keys: Float[Tensor, "B H P d"], values: Float[Tensor, "B H P d"],
        copies: int,
    ) -> Float[Tensor, "N Q D"]:  # fmt: skip
        """All rows that look at one image ask as one long row, so that its keys and values are read once."""
        count = queries.shape[1]
        heads = queries.unflatten(0, (copies, -1)).unflatten(-1, (self.heads, -1))  # [copies, B, Q, H, d]
        heads = heads.permute(1, 3, 0, 2, 4).flatten(2, 3)  # [B, H, copies * Q, d]
        seen = attend(heads, keys, values, None, self.dropout.now)
        seen = seen.unflatten(2, (copies, count)).permute(2, 0, 3, 1, 4)  # [copies, B, Q, H, d]
        return seen.flatten(3).flatten(0, 1)


class GeluLinear(torch.autograd.Function):
    """A linear layer of an exact GELU, whose output, the widest there is, is computed again instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        above = gradients[0].flatten(0, -2)  # [M, D]
        below = torch.ops.aten.gelu_backward(linear(above, weight.T).view_as(x), x)
        # This gradient of a weight, unlike those of others, is a tenth faster by oneDNN.
        return below, linear(above.T, F.gelu(x).flatten(0, -2).T), above.sum(dim=0)

"""The Querying Transformer (paper §3.1, Figure 2 left).

Two transformers that share their self-attention: one reads the image through a fixed set of learned queries
(cross-attention in every second block), the other reads or writes text. The same weights serve every objective;
only the self-attention mask differs (Figure 2 right), and all masks are made in :func:`attention_mask`.

Legend: B batch, Q queries, T text tokens, S = Q + T, P image tokens, D width of the Q-Former, E width of the image
encoder, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from blip2.config import QFormerConfig

MaskKind = Literal["unimodal", "causal", "bidirectional"]


def attention_mask(
    kind: MaskKind, queries: int, text: Bool[Tensor, "B T"]
) -> Bool[Tensor, "B {queries}+T {queries}+T"]:
    """Who may attend to whom among [queries; text]: the three masks of Figure 2 (right). True means may attend.

    ::

        2 queries, 3 text tokens      unimodal (ITC)   causal (ITG)   bidirectional (ITM)
                               q q      1 1 . . .        1 1 . . .        1 1 1 1 1
                                        1 1 . . .        1 1 . . .        1 1 1 1 1
                             t t t      . . 1 1 1        1 1 1 . .        1 1 1 1 1
                                        . . 1 1 1        1 1 1 1 .        1 1 1 1 1
                                        . . 1 1 1        1 1 1 1 1        1 1 1 1 1

    Rows attend to columns. Columns of padding are False everywhere.

    Args:
        kind: ``unimodal``: queries and text do not see each other, so that nothing leaks into the contrastive loss.
            ``causal``: text sees the queries and the text before it, queries see only queries.
            ``bidirectional``: everything sees everything.
        queries: Q, may be 0.
        text: True where a text token is real, False where it is padding. T may be 0.
    """
    batch, length = text.shape
    size = queries + length
    mask = torch.ones(size, size, dtype=torch.bool, device=text.device)
    if kind != "bidirectional":
        mask[:queries, queries:] = False
    if kind == "unimodal":
        mask[queries:, :queries] = False
    if kind == "causal":
        mask[queries:, queries:] = torch.ones_like(mask[queries:, queries:]).tril()
    real = torch.cat([text.new_ones(batch, queries), text], dim=1)
    return mask & real[:, None, :]


def contrast_and_generate_mask(
    queries: int, text: Bool[Tensor, "B T"]
) -> Bool[Tensor, "B {queries}+2*T {queries}+2*T"]:
    """One mask for [queries; text of ITC; text of ITG], so that both objectives share one pass.

    Queries never see text under either mask, so their outputs are the same for both and need computing once. The
    first copy of the text has the rows of the uni-modal mask, the second those of the causal one, and the copies
    do not see each other.
    """
    batch, length = text.shape
    both = queries + length
    mask = text.new_zeros(batch, both + length, both + length)
    mask[:, :both, :both] = attention_mask("unimodal", queries, text)
    causal = attention_mask("causal", queries, text)[:, queries:]
    mask[:, both:, :queries] = causal[..., :queries]
    mask[:, both:, both:] = causal[..., queries:]
    return mask


class Looked(NamedTuple):
    """What rows look at in one cross-attention: keys and values of B images, by `copies` * B rows.

    Row c * B + b looks at image b. Rows that look at the same image share its keys and values: nothing is copied.
    """

    keys: Float[Tensor, "B H P d"]
    values: Float[Tensor, "B H P d"]
    copies: int = 1


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
        return sum(looked.copies * len(looked.keys) for looked in self.layers[0])

    def select(self, images: Int[Tensor, "N"]) -> ImageMemory:
        """The memories of `images` (indices, with repeats), gathered without projecting anything again."""
        return ImageMemory(
            tuple(tuple(Looked(k[images], v[images], copies) for k, v, copies in layer) for layer in self.layers)
        )

    def repeat(self, copies: int) -> ImageMemory:
        """All images seen by `copies` rows each, one round of the images after the other. Copies nothing."""
        return ImageMemory(tuple(tuple(Looked(k, v, c * copies) for k, v, c in layer) for layer in self.layers))

    def join(self, other: ImageMemory) -> ImageMemory:
        """The rows of this memory, then those of `other`. Copies nothing."""
        return ImageMemory(tuple(mine + theirs for mine, theirs in zip(self.layers, other.layers, strict=True)))


class QFormerOutput(NamedTuple):
    """What the two transformers put out; a part that was not given in is empty."""

    queries: Float[Tensor, "B Q D"]
    """Z of the paper."""
    text: Float[Tensor, "B T D"]


def _cast(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """To the dtype that autocast would cast it to, once for all the projections that read it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _drop(x: Float[Tensor, "*shape"], share: float) -> Float[Tensor, "*shape"]:
    """Dropout that keeps one byte an element for the backward pass."""
    if x.device.type != "cpu":
        return torch.native_dropout(x, share, True)[0]
    # A CPU draws uniform numbers twice as fast as Bernoulli's.
    return x * (torch.rand(x.shape) >= share) / (1 - share)


def _attend(
    queries: Float[Tensor, "B H N d"],
    keys: Float[Tensor, "B H M d"],
    values: Float[Tensor, "B H M d"],
    mask: Bool[Tensor, "B 1 N M"] | None,
    dropout: float,
) -> Float[Tensor, "B H N d"]:
    if queries.device.type != "cpu":
        return F.scaled_dot_product_attention(queries, keys, values, mask, dropout)
    if dropout:
        # The CPU has no fused kernel with dropout, and PyTorch's own way without one keeps twice as much.
        scores = (queries / math.sqrt(queries.shape[-1])) @ keys.mT
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return _drop(scores.softmax(dim=-1), dropout).to(values.dtype) @ values
    if queries.dtype == torch.bfloat16:
        # The backward of the CPU's fused kernel takes four times as long in bfloat16 as in float32.
        with torch.autocast("cpu", enabled=False):
            seen = F.scaled_dot_product_attention(queries.float(), keys.float(), values.float(), mask)
        return seen.to(queries.dtype)
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
        return _drop(x, self.now) if self.now else x


class Attention(nn.Module):
    """What both kinds of attention share: the projections, residual and LayerNorm (post-norm, as in BERT)."""

    def __init__(self, config: QFormerConfig, source_width: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def split_heads(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B H N d"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_and_values(
        self, features: Float[Tensor, "B P E"], norm: nn.LayerNorm | None = None
    ) -> tuple[Float[Tensor, "B H P d"], Float[Tensor, "B H P d"]]:
        """Of image features.

        Args:
            norm: what the features were normalised, but not yet scaled and shifted by. Its weight and bias go into the
                projections instead: W (g * x + b) = (W * g) x + W b. The gradient of the norm then comes from that of
                the projections' weights, and none has to be computed for the features.
        """
        if norm is None:
            return self.split_heads(self.key(features)), self.split_heads(self.value(features))
        key, value = (
            F.linear(features, p.weight * norm.weight, p.bias + (p.weight * norm.bias).sum(dim=1))
            for p in (self.key, self.value)
        )
        return self.split_heads(key), self.split_heads(value)

    def finish(self, x: Float[Tensor, "B N D"], seen: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.norm(x + self.dropout(self.output(seen)))


class SelfAttention(Attention):
    """Of [queries; text] among themselves."""

    def forward(
        self, x: Float[Tensor, "B S D"], mask: Bool[Tensor, "B 1 S S"] | None, kept: int
    ) -> Float[Tensor, "B {kept} D"]:
        """Every position is seen; the outputs of the first `kept` are made."""
        asking, cast = x[:, :kept], _cast(x)
        queries, keys, values = self.query(cast[:, :kept]), self.key(cast), self.value(cast)
        queries, keys, values = (self.split_heads(part) for part in (queries, keys, values))
        mask = mask if mask is None else mask[:, :, :kept]
        seen = _attend(queries, keys, values, mask, self.dropout.now)
        return self.finish(asking, seen.transpose(1, 2).flatten(2))


class CrossAttention(Attention):
    """Of the queries to image features."""

    def forward(self, x: Float[Tensor, "N Q D"], memory: tuple[Looked, ...]) -> Float[Tensor, "N Q D"]:
        queries, start, parts = self.query(x), 0, []
        for keys, values, copies in memory:
            rows = slice(start, start + copies * len(keys))
            parts.append(self._look(queries[rows], keys, values, copies))
            start = rows.stop
        return self.finish(x, torch.cat(parts) if len(parts) > 1 else parts[0])

    def _look(
        self, queries: Float[Tensor, "N Q D"], keys: Float[Tensor, "B H P d"], values: Float[Tensor, "B H P d"],
        copies: int,
    ) -> Float[Tensor, "N Q D"]:  # fmt: skip
        """All rows that look at one image ask as one long row, so that its keys and values are read once."""
        count = queries.shape[1]
        heads = queries.unflatten(0, (copies, -1)).unflatten(-1, (self.heads, -1))  # [copies, B, Q, H, d]
        heads = heads.permute(1, 3, 0, 2, 4).flatten(2, 3)  # [B, H, copies * Q, d]
        seen = _attend(heads, keys, values, None, self.dropout.now)
        seen = seen.unflatten(2, (copies, count)).permute(2, 0, 3, 1, 4)  # [copies, B, Q, H, d]
        return seen.flatten(3).flatten(0, 1)


class _GeluLinear(torch.autograd.Function):
    """A linear layer of an exact GELU, whose output, the widest there is, is computed again instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        above = gradients[0].flatten(0, -2)  # [M, D]
        below = torch.ops.aten.gelu_backward((above @ weight).view_as(x), x)
        return below, above.T @ F.gelu(x).flatten(0, -2), above.sum(dim=0)


class FeedForward(nn.Module):
    """Two layers with an exact GELU between them, residual and LayerNorm."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.hidden_size, config.intermediate_size)
        self.contract = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        hidden = self.expand(x)
        weight, bias = (parameter.to(hidden.dtype) for parameter in (self.contract.weight, self.contract.bias))
        return self.norm(x + self.dropout(_GeluLinear.apply(hidden, weight, bias)))


class Block(nn.Module):
    """Shared self-attention, cross-attention of the queries (in every second block), separate feed-forwards."""

    def __init__(self, config: QFormerConfig, image_width: int, has_cross_attention: bool, has_text: bool) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config, config.hidden_size)
        self.cross_attention = CrossAttention(config, image_width) if has_cross_attention else None
        self.query_feed_forward = FeedForward(config)
        self.text_feed_forward = FeedForward(config) if has_text else None

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        queries: int,
        mask: Bool[Tensor, "B 1 S S"] | None,
        memory: tuple[Looked, ...] | None,
        kept: int,
    ) -> Float[Tensor, "B {kept} D"]:
        """The outputs of the first `kept` positions."""
        x = self.self_attention(x, mask, kept)
        parts = []
        if queries:
            z = x[:, :queries]
            if self.cross_attention is not None and memory is not None:
                z = self.cross_attention(z, memory)
            parts.append(self.query_feed_forward(z))
        if kept > queries and self.text_feed_forward is not None:
            parts.append(self.text_feed_forward(x[:, queries:]))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class QFormer(nn.Module):
    """The Querying Transformer of §3.1.

    Args:
        config: sizes; ``config.vocabulary`` counts the [DEC] token, which is always the last id.
        image_width: E, the width of the image features.
        has_text: False leaves out the text transformer (embeddings and text feed-forwards), which stage 2 with
            unconditional queries never uses (§3.3).
    """

    def __init__(self, config: QFormerConfig, image_width: int, has_text: bool = True) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.image_width = image_width
        self.checkpointing = False
        """Keep only the inputs of each block for the backward pass, and compute the rest of it a second time."""
        self.queries = nn.Parameter(torch.empty(1, config.queries, width))
        self.word_embedding = nn.Embedding(config.vocabulary, width) if has_text else None
        self.position_embedding = nn.Embedding(config.max_positions, width) if has_text else None
        # BERT's LayerNorm of embeddings also normalises the learned queries, in both stages.
        self.embedding_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)
        self.blocks: Sequence[Block] = nn.ModuleList(  # pyright: ignore[reportAttributeAccessIssue]
            Block(config, image_width, i % config.cross_attention_every == 0, has_text) for i in range(config.layers)
        )
        self.apply(self._initialise)
        nn.init.normal_(self.queries, std=0.02)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @property
    def decoder_start(self) -> int:
        """The id of [DEC], which replaces [CLS] to signal the decoding task (§3.2)."""
        return self.config.vocabulary - 1

    def memory(self, features: Float[Tensor, "B P E"], norm: nn.LayerNorm) -> ImageMemory:
        """Keys and values of every cross-attention for these image features.

        Args:
            features: as they leave the image encoder.
            norm: their LayerNorm, which the Q-Former's owner trains with it.
        """
        attentions = [block.cross_attention for block in self.blocks if block.cross_attention is not None]
        # What is frozen needs no gradient, but the norm behind it does: see there.
        folded = norm if torch.is_grad_enabled() and not features.requires_grad else None
        plain = folded is None
        features = _cast(norm(features) if plain else F.layer_norm(features, norm.normalized_shape, eps=norm.eps))
        return ImageMemory(tuple((Looked(*each.keys_and_values(features, folded)),) for each in attentions))

    @torch.no_grad()
    def attention_maps(self, memory: ImageMemory) -> Float[Tensor, "B layers Q P"]:
        """Where each query looks: cross-attention weights, averaged over heads, which sum to 1 over P."""
        maps: list[Tensor] = []

        def note(attention: nn.Module, inputs: tuple[Tensor, tuple[Looked, ...]]) -> None:
            assert isinstance(attention, CrossAttention)
            queries, keys = attention.split_heads(attention.query(inputs[0])), inputs[1][0].keys
            maps.append((queries @ keys.mT / math.sqrt(keys.shape[-1])).softmax(dim=-1).mean(dim=1))

        hooks = [
            b.cross_attention.register_forward_pre_hook(note) for b in self.blocks if b.cross_attention is not None
        ]
        try:
            self(memory)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(maps, dim=1)

    def forward(
        self,
        memory: ImageMemory | None,
        ids: Int[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B S S"] | None = None,
        positions: Int[Tensor, "T"] | None = None,
        text_output: bool = True,
    ) -> QFormerOutput:
        """Run [queries; text] through all blocks.

        Args:
            memory: with B rows; None runs the text transformer alone, without queries.
            ids: text token ids; None runs the queries alone.
            mask: from :func:`attention_mask`; None lets everything see everything.
            positions: of the text tokens; 0..T-1 when None. Queries have no position.
            text_output: False leaves the text out of the last block, when only Z is wanted.

        Raises:
            ValueError: both `memory` and `ids` are None, or a text is given to a Q-Former without text transformer.
        """
        parts = []
        if memory is not None:
            parts.append(self.queries.expand(len(memory), -1, -1))
        if ids is not None:
            if self.word_embedding is None or self.position_embedding is None:
                raise ValueError("this Q-Former was built without its text transformer (has_text=False)")
            if positions is None:
                positions = torch.arange(ids.shape[1], device=ids.device)
            parts.append(self.word_embedding(ids) + self.position_embedding(positions))
        if not parts:
            raise ValueError("give the Q-Former an image memory, text ids, or both")
        x = self.dropout(self.embedding_norm(torch.cat(parts, dim=1)))  # [B, Q+T, D]

        queries = 0 if memory is None else self.config.queries
        memories = iter(memory.layers if memory is not None else ())
        mask = None if mask is None else mask[:, None]
        for number, block in enumerate(self.blocks):
            looks = block.cross_attention is not None and memory is not None
            kept = queries if number == len(self.blocks) - 1 and not text_output else x.shape[1]
            arguments = (x, queries, mask, next(memories) if looks else None, kept)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return QFormerOutput(x[:, :queries], x[:, queries:])

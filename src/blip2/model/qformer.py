"""The Querying Transformer (paper §3.1, Figure 2 left).

Two transformers that share their self-attention: one reads the image through a fixed set of learned queries
(cross-attention in every second block), the other reads or writes text. The same weights serve every objective;
only the self-attention mask differs (Figure 2 right), and all masks are made in :func:`attention_mask`.

Legend: B batch, Q queries, T text tokens, S = Q + T, M tokens of the batch that are not padding, P image tokens, D
width of the Q-Former, E width of the image encoder, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from blip2.config import QFormerConfig
from blip2.model.attention import CrossAttention, Dropout, GeluLinear, ImageMemory, Layout, Looked, SelfAttention, cast
from blip2.model.kernels.linear import Linear, linear_gelu

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


class QFormerOutput(NamedTuple):
    """What the two transformers put out; a part that was not given in is empty, and padding is zero."""

    queries: Float[Tensor, "B Q D"]
    """Z of the paper."""
    text: Float[Tensor, "B T D"]


class FeedForward(nn.Module):
    """Two layers with an exact GELU between them, residual and LayerNorm."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.expand = Linear(config.hidden_size, config.intermediate_size)
        self.contract = Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
        if torch.is_grad_enabled():
            hidden = self.expand(x)
            weight, bias = (parameter.to(hidden.dtype) for parameter in (self.contract.weight, self.contract.bias))
            out = GeluLinear.apply(hidden, weight, bias)
        else:
            out = self.contract(linear_gelu(x, self.expand.weight, self.expand.bias))
        return self.norm(x + self.dropout(out))


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
        x: Float[Tensor, "_ D"],
        layout: Layout,
        mask: Bool[Tensor, "B 1 S S"] | None,
        memory: tuple[Looked, ...] | None,
        wanted: Layout,
    ) -> Float[Tensor, "_ D"]:
        """The outputs of the tokens in `wanted`; `x` as :meth:`Layout.repeat` takes it."""
        x = self.self_attention(x, layout, mask, wanted)
        parts = []
        if wanted.queries:
            z = x[: wanted.asking]
            if self.cross_attention is not None and memory is not None:
                z = self.cross_attention(z.unflatten(0, (wanted.rows, -1)), memory).flatten(0, 1)
            parts.append(self.query_feed_forward(z))
        if wanted.places is not None and self.text_feed_forward is not None:
            parts.append(self.text_feed_forward(x[wanted.asking :]))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


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
        self.queries = nn.Parameter(torch.empty(1, config.num_query_tokens, width))
        self.word_embedding = nn.Embedding(config.vocab_size, width) if has_text else None
        self.position_embedding = nn.Embedding(config.max_position_embeddings, width) if has_text else None
        # BERT's LayerNorm of embeddings also normalizes the learned queries, in both stages.
        self.embedding_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)
        self.blocks: Sequence[Block] = nn.ModuleList(  # pyright: ignore[reportAttributeAccessIssue]
            Block(config, image_width, i % config.cross_attention_frequency == 0, has_text)
            for i in range(config.num_hidden_layers)
        )
        self.apply(self._initialize)
        nn.init.normal_(self.queries, std=0.02)

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def compile_blocks(self) -> None:
        """Compile each block, which stays as it is otherwise: for any length of text, so that no new length compiles
        it anew."""
        # All blocks share one cache of graphs: with cross-attention and without, to train and to judge.
        settings: Any = torch._dynamo.config  # pyright: ignore[reportPrivateUsage]
        settings.recompile_limit = max(settings.recompile_limit, 64)
        for block in self.blocks:
            block.compile(dynamic=True)

    @property
    def decoder_start(self) -> int:
        """The id of [DEC], which replaces [CLS] to signal the decoding task (§3.2)."""
        return self.config.vocab_size - 1

    def memory(self, features: Float[Tensor, "B P E"], norm: nn.LayerNorm) -> ImageMemory:
        """Keys and values of every cross-attention for these image features.

        Args:
            features: as they leave the image encoder.
            norm: their LayerNorm, which the Q-Former's owner trains with it.
        """
        attentions = [block.cross_attention for block in self.blocks if block.cross_attention is not None]
        # What is frozen needs no gradient, but its norm does: Attention.keys_and_values gets it another way.
        folded = norm if torch.is_grad_enabled() and not features.requires_grad else None
        plain = folded is None
        features = cast(norm(features) if plain else F.layer_norm(features, norm.normalized_shape, eps=norm.eps))
        return ImageMemory(tuple((Looked(*each.keys_and_values(features, folded)),) for each in attentions))

    @torch.no_grad()
    def attention_maps(self, memory: ImageMemory) -> Float[Tensor, "N layers Q P"]:
        """Return where the queries of each row of `memory` look: the weights of every cross-attention, averaged over
        its heads, which sum to 1 over P."""
        maps: list[Tensor] = []

        def note(attention: nn.Module, inputs: tuple[Tensor, tuple[Looked, ...]]) -> None:
            assert isinstance(attention, CrossAttention)
            queries = attention.split_heads(attention.query(inputs[0]))
            keys = torch.cat([looked.row_keys for looked in inputs[1]])
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
        text_output: Bool[Tensor, "B T"] | bool = True,
    ) -> QFormerOutput:
        """Run [queries; text] through all blocks.

        Args:
            memory: with B rows; None runs the text transformer alone, without queries.
            ids: text token ids; None runs the queries alone.
            mask: from :func:`attention_mask`; None lets everything see everything.
            positions: of the text tokens; 0..T-1 when None. Queries have no position.
            text_output: of which text tokens the output is wanted. The others leave the last block and are zero; with
                False, when only Z is wanted, there is no text in the output.

        Raises:
            ValueError: both `memory` and `ids` are None, or a text is given to a Q-Former without text transformer.
        """
        if memory is None and ids is None:
            raise ValueError("give the Q-Former an image memory, text ids, or both")
        queries = 0 if memory is None else self.config.num_query_tokens
        rows, parts, real = 0, [], None
        if memory is not None:
            rows = len(memory)
            parts.append(self.queries[0])
        if ids is not None:
            if self.word_embedding is None or self.position_embedding is None:
                raise ValueError("this Q-Former was built without its text transformer (has_text=False)")
            rows, length = ids.shape
            if positions is None:
                positions = torch.arange(length, device=ids.device)
            # Padding does not even see itself.
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.diagonal(0, 1, 2)[:, queries:]
            parts.append(self.word_embedding(ids[real]) + self.position_embedding(positions.expand(rows, -1)[real]))
        layout = Layout.of(rows, queries, real)
        x = self.embedding_norm(torch.cat(parts))
        if self.dropout.now:  # which makes the queries of each row others
            x = self.dropout(layout.repeat(x))
        last = layout.choose(text_output)
        memories = iter(memory.layers if memory is not None else ())
        mask = None if mask is None else mask[:, None]
        for number, block in enumerate(self.blocks):
            looks = block.cross_attention is not None and memory is not None
            wanted = last if number == len(self.blocks) - 1 else layout
            arguments = (x, layout, mask, next(memories) if looks else None, wanted)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        out = last.spread(x)
        return QFormerOutput(out[:, :queries], out[:, queries:])

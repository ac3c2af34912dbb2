"""The Querying Transformer (paper §3.1, Figure 2 left).

Two transformers that share their self-attention: one reads the image through a fixed set of learned queries
(cross-attention in every second block), the other reads or writes text. The same weights serve all objectives;
only the self-attention mask differs (Figure 2 right), and all masks are made in :func:`attention_mask`.
tests/reference/qformer.py has the same model without the code that is there only for speed.

Legend: B batch, N rows of an image memory, Q queries, T text tokens, S = Q + T, P image tokens, D width of the
Q-Former, E width of the image encoder, _ any number.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from blip2.config import QFormerConfig
from blip2.model.attention import CrossAttention, SelfAttention
from blip2.model.image_memory import CrossAttentionKV, ImageMemory
from blip2.model.kernels.dropout import Dropout
from blip2.model.kernels.linear import Linear, NormalizedFeatures, mlp
from blip2.model.kernels.packing import PackedTokens
from blip2.model.kernels.recompute import recompute
from blip2.model.kernels.sdpa import split_heads

MaskKind = Literal["unimodal", "causal", "bidirectional"]


def attention_mask(
    kind: MaskKind, num_queries: int, text_mask: Bool[Tensor, "B T"]
) -> Bool[Tensor, "B {num_queries}+T {num_queries}+T"]:
    """Return one of the three self-attention masks of Figure 2 (right), over [queries; text]. True means may attend.

    ::

        2 queries, 3 text tokens      unimodal (ITC)   causal (ITG)   bidirectional (ITM)
                               q q      1 1 . . .        1 1 . . .        1 1 1 1 1
                                        1 1 . . .        1 1 . . .        1 1 1 1 1
                             t t t      . . 1 1 1        1 1 1 . .        1 1 1 1 1
                                        . . 1 1 1        1 1 1 1 .        1 1 1 1 1
                                        . . 1 1 1        1 1 1 1 1        1 1 1 1 1

    Rows attend to columns. Columns of padding are False.

    Args:
        kind: ``unimodal``: queries and text do not attend to each other, so that nothing leaks into the contrastive
            loss. ``causal``: text attends to the queries and to the text before it, queries only to queries.
            ``bidirectional``: all attend to all.
        num_queries: Q, may be 0.
        text_mask: True for text tokens, False for padding. T may be 0.
    """
    num_rows, length = text_mask.shape
    seq_len = num_queries + length
    mask = torch.ones(seq_len, seq_len, dtype=torch.bool, device=text_mask.device)
    if kind != "bidirectional":
        mask[:num_queries, num_queries:] = False
    if kind == "unimodal":
        mask[num_queries:, :num_queries] = False
    if kind == "causal":
        mask[num_queries:, num_queries:] = torch.ones_like(mask[num_queries:, num_queries:]).tril()
    columns = torch.cat([text_mask.new_ones(num_rows, num_queries), text_mask], dim=1)
    return mask & columns[:, None, :]


def itc_itg_mask(
    num_queries: int, text_mask: Bool[Tensor, "B T"]
) -> Bool[Tensor, "B {num_queries}+2*T {num_queries}+2*T"]:
    """Return one mask for [queries; text of ITC; text of ITG], so that both objectives share one pass.

    Queries do not attend to text in the mask of either objective, so their outputs serve both objectives. The first
    copy of the text attends as in the unimodal mask, the second copy as in the causal mask. The two copies do not
    attend to each other.

    Args:
        num_queries: Q, may be 0.
        text_mask: True for text tokens, False for padding.
    """
    num_rows, length = text_mask.shape
    both = num_queries + length
    mask = text_mask.new_zeros(num_rows, both + length, both + length)
    mask[:, :both, :both] = attention_mask("unimodal", num_queries, text_mask)
    causal = attention_mask("causal", num_queries, text_mask)[:, num_queries:]
    mask[:, both:, :num_queries] = causal[..., :num_queries]
    mask[:, both:, both:] = causal[..., num_queries:]
    return mask


class QFormerOutput(NamedTuple):
    """The outputs of both transformers. Q is 0 without images, T is 0 without text; outputs at padding are zero."""

    queries: Float[Tensor, "B Q D"]
    """Z of the paper."""
    text: Float[Tensor, "B T D"]


class FeedForward(nn.Module):
    """LayerNorm(x + W2 gelu(W1 x))."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.expand = Linear(config.hidden_size, config.intermediate_size)
        self.contract = Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        return self.norm(x + self.dropout(mlp(x, self.expand, self.contract)))


class Block(nn.Module):
    """One block of Figure 2: shared self-attention, cross-attention of the queries, and two feed-forwards.

    Args:
        config: sizes of the Q-Former.
        image_width: E, the width of the image features.
        has_cross_attention: whether the queries attend to the image in this block.
        has_text: whether the block has a feed-forward for text besides that for the queries.
    """

    def __init__(self, config: QFormerConfig, image_width: int, has_cross_attention: bool, has_text: bool) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config, config.hidden_size)
        self.cross_attention = CrossAttention(config, image_width) if has_cross_attention else None
        self.query_feed_forward = FeedForward(config)
        self.text_feed_forward = FeedForward(config) if has_text else None

    def forward(
        self,
        queries: Float[Tensor, "_ Q D"] | None,
        text: Float[Tensor, "_ D"] | None,
        mask: Bool[Tensor, "B 1 S S"] | None,
        image_kv: tuple[CrossAttentionKV, ...] | None,
        tokens: PackedTokens,
        keep: PackedTokens,
    ) -> tuple[Float[Tensor, "B Q D"] | None, Float[Tensor, "_ D"] | None]:
        """Return the outputs of queries and text.

        See :meth:`SelfAttention.forward` and :meth:`CrossAttention.forward` for the arguments. `image_kv` is None if
        the block has no cross-attention or there are no queries.
        """
        queries, text = self.self_attention(queries, text, mask, tokens, keep)
        if queries is not None:
            if self.cross_attention is not None and image_kv is not None:
                queries = self.cross_attention(queries, image_kv)
            queries = self.query_feed_forward(queries)
        if text is not None and self.text_feed_forward is not None:
            text = self.text_feed_forward(text)
        return queries, text


class QFormer(nn.Module):
    """The Querying Transformer of §3.1.

    Args:
        config: sizes. The last token id, ``config.vocab_size - 1``, is the [DEC] token.
        image_width: E, the width of the image features.
        has_text: whether to create the text transformer (text embeddings and text feed-forwards). Stage 2 needs it only
            if the queries are conditioned on a question (Figure 7).
    """

    def __init__(self, config: QFormerConfig, image_width: int, has_text: bool = True) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.image_width = image_width
        self.gradient_checkpointing = False
        """Whether to store only the inputs of each block, and to compute the rest again in the backward pass."""
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
        """Compile each block in place with dynamic shapes, so that a new length of text needs no new compilation."""
        # All blocks share one cache of graphs, with and without cross-attention, for training and for evaluation.
        settings: Any = torch._dynamo.config  # pyright: ignore[reportPrivateUsage]
        settings.recompile_limit = max(settings.recompile_limit, 64)
        for block in self.blocks:
            block.compile(dynamic=True)  # pyright: ignore[reportUnknownMemberType]  # its arguments have no types

    @property
    def decoder_start_token_id(self) -> int:
        """The id of [DEC], which replaces [CLS] to signal the decoding task (§3.2)."""
        return self.config.vocab_size - 1

    def project_image(
        self, features: Float[Tensor, "B P E"], norm: nn.LayerNorm, mask: Bool[Tensor, "B P"] | None = None
    ) -> ImageMemory:
        """Compute the keys and values of image features in all cross-attentions.

        Args:
            features: the output of the image encoder.
            norm: the LayerNorm that is applied to the features first. It belongs to the model around this Q-Former.
            mask: True for tokens, False for padding on the right, to which no query attends. None: there is no padding.
        """
        if mask is not None:
            longest = int(mask.sum(dim=1).max())
            features, mask = features[:, :longest], mask[:, :longest]
            if bool(mask.all()):
                mask = None
            else:  # padding is NaN, which would spread through products with zeros
                features = features.masked_fill(~mask[..., None], 0)
        normalized = NormalizedFeatures.create(features, norm)
        attentions = [block.cross_attention for block in self.blocks if block.cross_attention is not None]
        return ImageMemory(tuple((attention.project_image(normalized, mask),) for attention in attentions))

    @torch.no_grad()
    def attention_maps(
        self,
        memory: ImageMemory,
        input_ids: Int[Tensor, "N T"] | None = None,
        attention_mask: Bool[Tensor, "N S S"] | None = None,
        average_heads: bool = True,
    ) -> Float[Tensor, "N layers *heads Q P"]:
        """Return the attention weights of all cross-attentions.

        Args:
            memory: N rows.
            input_ids: token ids of the texts that the queries attend to; see :meth:`forward`.
            attention_mask: the mask over [queries; text]; see :meth:`forward`.
            average_heads: whether the weights are averaged over the heads. If False, the result has the heads as its
                third dimension.

        Returns:
            The weights of each row, cross-attention and query, which sum to 1 over the P image tokens.
        """
        maps: list[Tensor] = []
        thread = threading.get_ident()

        def save_map(attention: nn.Module, inputs: tuple[Tensor, tuple[CrossAttentionKV, ...]]) -> None:
            if threading.get_ident() != thread:  # a pass of another thread, with images of its own
                return
            assert isinstance(attention, CrossAttention)
            queries = split_heads(attention.query(inputs[0]), attention.num_heads)
            keys = torch.cat([kv.row_keys for kv in inputs[1]])
            scores = queries @ keys.mT / math.sqrt(keys.shape[-1])
            if any(kv.mask is not None for kv in inputs[1]):
                scores = scores.masked_fill(~torch.cat([kv.row_mask for kv in inputs[1]])[:, None, None], -torch.inf)
            weights = scores.softmax(dim=-1)
            maps.append(weights.mean(dim=1) if average_heads else weights)

        attentions = [block.cross_attention for block in self.blocks if block.cross_attention is not None]
        hooks = [attention.register_forward_pre_hook(save_map) for attention in attentions]
        try:
            self(memory, input_ids, attention_mask, output_tokens=False)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(maps, dim=1)

    def forward(
        self,
        memory: ImageMemory | None,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Bool[Tensor, "B S S"] | None = None,
        position_ids: Int[Tensor, "T"] | None = None,
        output_tokens: Bool[Tensor, "B T"] | bool = True,
    ) -> QFormerOutput:
        """Run queries and text through all blocks.

        Args:
            memory: keys and values of the images, B rows. None: only the text transformer runs, without queries.
            input_ids: token ids of the texts. None: only the queries run.
            attention_mask: a mask over [queries; text], made by :func:`attention_mask` or :func:`itc_itg_mask`. A text
                token that may not attend to itself is padding. None: all attend to all.
            position_ids: positions of the text tokens. None: 0 to T - 1. Queries have no position.
            output_tokens: True for the text tokens whose output is needed. The last block computes only these; the
                outputs of the other text tokens are zero. A single True selects all text tokens; with a single False
                the output has no text (T = 0).

        Raises:
            ValueError: `memory` and `input_ids` are both None, or this Q-Former has no text transformer for
                `input_ids`.
        """
        if memory is None and input_ids is None:
            raise ValueError("memory and input_ids are both None: give the Q-Former an image memory, text ids, or both")
        num_queries = 0 if memory is None else self.config.num_query_tokens
        num_rows = 0 if memory is None else len(memory)
        queries: Tensor | None = None if memory is None else self.queries
        text: Tensor | None = None
        text_mask: Tensor | None = None
        if input_ids is not None:
            num_rows = len(input_ids)
            # The diagonal of the mask is False for padding.
            text_mask = None if attention_mask is None else attention_mask.diagonal(0, 1, 2)[:, num_queries:]
            text_mask = torch.ones_like(input_ids, dtype=torch.bool) if text_mask is None else text_mask
            text = self._embed_text(input_ids, position_ids, text_mask)
        tokens = PackedTokens.from_mask(num_rows, num_queries, text_mask)
        x = self.embedding_norm(tokens.cat(queries, text))
        if self.dropout.active_p:
            x = self.dropout(tokens.expand_queries(x))  # makes the queries of each row different
        queries, text = tokens.split(x)

        mask = None if attention_mask is None else attention_mask[:, None]
        layer_kv = iter(() if memory is None else memory.layer_kv)
        output_layout = tokens.select(output_tokens)
        for block in self.blocks:
            image_kv = None if memory is None or block.cross_attention is None else next(layer_kv)
            keep = output_layout if block is self.blocks[-1] else tokens
            inputs = (queries, text, mask, image_kv, tokens, keep)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                queries, text = recompute(block, *inputs)
            else:
                queries, text = block(*inputs)
        out = output_layout.pad(output_layout.cat(queries, text))
        return QFormerOutput(out[:, :num_queries], out[:, num_queries:])

    def _embed_text(
        self, input_ids: Int[Tensor, "B T"], position_ids: Int[Tensor, "T"] | None, text_mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "_ D"]:
        """Return the embeddings of all text tokens that are not padding."""
        if self.word_embedding is None or self.position_embedding is None:
            raise ValueError(
                "this Q-Former was built without its text transformer: use has_text=True, or give no input_ids"
            )
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = position_ids.expand(len(input_ids), -1)[text_mask]
        return self.word_embedding(input_ids[text_mask]) + self.position_embedding(positions)

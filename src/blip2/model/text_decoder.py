"""Captions of stage 1: text that the Q-Former itself writes, token by token (paper §3.2, ITG).

In the causal mask, queries attend to queries only. Their keys and values in the self-attentions therefore depend on the
image alone and are computed once per image, and each new token is computed by itself: it attends to the keys and values
of the queries and of the tokens before it.

Legend: B images, N rows (each row is one text), M selected rows, Q queries, T text tokens, K tokens so far, H heads, d
width of a head, D width of the Q-Former, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from blip2.decoding.kv_cache import IncrementalDecoder
from blip2.model.attention import SelfAttention
from blip2.model.image_memory import ImageMemory
from blip2.model.kernels.packing import PackedTokens
from blip2.model.kernels.sdpa import merge_heads, sdpa, split_heads
from blip2.model.representation import RepresentationModel


@dataclass
class SelfAttentionKV:
    """Keys and values of the queries and of the text so far in one self-attention."""

    query_keys: Float[Tensor, "N H Q d"]
    query_values: Float[Tensor, "N H Q d"]
    text_keys: Float[Tensor, "N H K d"]
    text_values: Float[Tensor, "N H K d"]


class TextDecoder(IncrementalDecoder):
    """A Q-Former that has read images, one per row, and writes a text about each of them.

    Args:
        model: a stage-1 model.
        memory: the B images.
    """

    def __init__(self, model: RepresentationModel, memory: ImageMemory) -> None:
        self._model = model
        self._prompt_index = torch.arange(len(memory), device=model.qformer.queries.device)
        self._length = 0
        self._kv = self._read_images(memory)
        self._step(torch.full_like(self._prompt_index, model.qformer.decoder_start_token_id))

    def _read_images(self, memory: ImageMemory) -> list[SelfAttentionKV]:
        """Run the queries through all blocks, and keep their keys and values in each self-attention."""
        qformer = self._model.qformer
        tokens = PackedTokens.from_mask(len(memory), qformer.config.num_query_tokens, None)
        queries = qformer.embedding_norm(qformer.queries).expand(len(memory), -1, -1)
        layer_kv = iter(memory.layer_kv)
        kept: list[SelfAttentionKV] = []
        for block in qformer.blocks:
            keys, values = self._project(block.self_attention, queries)
            kept.append(SelfAttentionKV(keys, values, keys[:, :, :0], values[:, :, :0]))
            image_kv = None if block.cross_attention is None else next(layer_kv)
            queries, _ = block(queries, None, None, image_kv, tokens, tokens)
        return kept

    @staticmethod
    def _project(
        attention: SelfAttention, x: Float[Tensor, "N T D"]
    ) -> tuple[Float[Tensor, "N H T d"], Float[Tensor, "N H T d"]]:
        """Return the keys and values of tokens."""
        keys, values = (split_heads(part(x), attention.num_heads) for part in (attention.key, attention.value))
        return keys, values

    def _step(self, tokens: Int[Tensor, "N"]) -> None:
        qformer = self._model.qformer
        assert qformer.word_embedding is not None and qformer.position_embedding is not None
        position = torch.full_like(tokens, self._length)
        x = qformer.embedding_norm(qformer.word_embedding(tokens) + qformer.position_embedding(position))[:, None]
        for block, kv in zip(qformer.blocks, self._kv, strict=True):
            attention = block.self_attention
            keys, values = self._project(attention, x)
            kv.text_keys, kv.text_values = torch.cat([kv.text_keys, keys], 2), torch.cat([kv.text_values, values], 2)
            query = split_heads(attention.query(x), attention.num_heads)
            all_keys = torch.cat([kv.query_keys, kv.text_keys], dim=2)
            all_values = torch.cat([kv.query_values, kv.text_values], dim=2)
            x = attention.add_and_norm(x, merge_heads(sdpa(query, all_keys, all_values, None, 0.0)))
            assert block.text_feed_forward is not None
            x = block.text_feed_forward(x)
        self._length += 1
        self.logits = self._model.language_head(x[:, 0], qformer.word_embedding.weight).float()

    def _reorder(self, rows: Int[Tensor, "M"]) -> None:
        for kv in self._kv:
            kv.query_keys, kv.query_values = kv.query_keys[rows], kv.query_values[rows]
        self._reorder_suffix(rows)

    def _reorder_suffix(self, rows: Int[Tensor, "N"]) -> None:
        for kv in self._kv:
            kv.text_keys, kv.text_values = kv.text_keys[rows], kv.text_values[rows]

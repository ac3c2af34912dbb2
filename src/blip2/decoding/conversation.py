"""Decoding of a sequence that grows in turns, whose key-value cache is kept between the turns.

Shapes: S tokens of the sequence, L width of the LLM.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from blip2.decoding.kv_cache import CausalLMDecoder, PromptBatch, per_layer_inputs


def make_prompt(input_ids: Int[Tensor, "S"], inputs_embeds: Float[Tensor, "S L"]) -> PromptBatch:
    """Return a batch of one prompt of interleaved text and visual prompts, in any order.

    Args:
        input_ids: token ids of the text, and the id of the padding token in the place of visual prompts.
        inputs_embeds: embeddings of text and visual prompts.
    """
    return PromptBatch(
        visual_prompts=inputs_embeds[None, :0],
        text_embeds=inputs_embeds[None],
        input_ids=input_ids[None],
        attention_mask=torch.ones_like(input_ids[None], dtype=torch.bool),
        image_index=input_ids.new_zeros(1),
    )


class ConversationDecoder(CausalLMDecoder):
    """Incremental decoding of one sequence with a decoder-only LLM, which reads each token once.

    :meth:`read` replaces the sequence. It keeps the keys and values of the tokens with which both sequences begin, so
    that only the tokens after them are computed.

    Args:
        network: an LLM for which :func:`blip2.decoding.kv_cache.supports_kv_cache` is true.
        prompt: the sequence, made by :func:`make_prompt`.
        keys: the content of each of the S positions of the sequence: the id of a token, or any other value that is
            equal only for equal embeddings.
    """

    def __init__(self, network: Any, prompt: PromptBatch, keys: Sequence[Hashable]) -> None:
        super().__init__(network, prompt)
        self._keys = list(keys)

    def read(self, prompt: PromptBatch, keys: Sequence[Hashable]) -> None:
        """Continue with another sequence; see the class for the arguments."""
        # The last token is read even if it is in the cache, because the logits after it are not.
        pairs = zip(self._keys, keys[:-1], strict=False)
        common = next((n for n, (old, new) in enumerate(pairs) if old != new), min(len(self._keys), len(keys) - 1))
        # If an earlier call was interrupted, some layers are longer than others: all of them have these tokens.
        self._keys = self._keys[:common]
        for layer in self._cache.layers:
            layer.truncate(common)
        self._attention_mask = prompt.attention_mask[:, :common]
        ids, embeds = prompt.input_ids[:, common:], prompt.text_embeds[:, common:]
        extra = per_layer_inputs(self.network, 0, ids, embeds)
        self._forward(prompt.attention_mask[:, common:], inputs_embeds=embeds, **extra)
        self._keys = list(keys)

    def copy(self) -> ConversationDecoder:
        """Return a decoder that has read the same sequence, with a key-value cache of its own."""
        copied = copy.copy(self)
        copied._keys = list(self._keys)
        copied._cache = type(self._cache)()
        copied._cache.layers = [layer.copy(len(self._keys)) for layer in self._cache.layers]
        return copied

    def _step(self, tokens: Int[Tensor, "N"]) -> None:
        super()._step(tokens)
        self._keys += tokens.tolist()

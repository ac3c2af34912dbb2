"""A frozen LLM that has read prompts and goes on reading what is written after them, token by token.

It reads a prompt once, however many texts are written after it, and the soft visual prompt of a picture once, however
many prompts begin with it. What it keeps of them are the keys and values of its attention.

Legend: I pictures, B prompts, N rows (a row is one text being written), Q queries, T text tokens, L width of the LLM,
V vocabulary.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutput

ALIBI = {"bloom", "mpt"}
"""LLMs that look at distances between tokens and so need no positions."""
ROOM = 16
"""Tokens that keys and values have room for before they are copied to where there is more."""


@dataclass(frozen=True)
class Prompts:
    """What the LLM is to continue: for each prompt a picture, then text."""

    visual: Float[Tensor, "I Q L"]
    """Soft visual prompts."""
    text: Float[Tensor, "B T L"]
    """Embeddings of the text, padded on the right. T may be 0."""
    mask: Bool[Tensor, "B T"]
    """True where there is text."""
    image_of: Int[Tensor, "B"]
    """The row of `visual` that each prompt belongs to."""

    def joined(self) -> tuple[Float[Tensor, "B S L"], Bool[Tensor, "B S"]]:
        """The visual prompt before each text (S = Q + T), and the mask of both."""
        visual = self.visual[self.image_of]
        seen = self.mask.new_ones(visual.shape[:2])
        return torch.cat([visual, self.text], dim=1), torch.cat([seen, self.mask], dim=1)


def is_supported(network: Any) -> bool:
    """Whether :func:`write` can run an LLM: what it keeps of a text is the keys and values of each row, and no more.

    Not so for recurrent LLMs (Mamba and its hybrids), for those with steps of their own before each pass, and for those
    that cannot be told the positions of tokens.
    """
    config = network.config
    needed = {"attention_mask", "past_key_values", "use_cache"}
    if config.is_encoder_decoder:
        needed |= {"decoder_input_ids", "encoder_outputs"}
        if network.generation_config.decoder_start_token_id is None:
            return False
    else:
        needed |= {"input_ids", "inputs_embeds"}
        if config.model_type not in ALIBI:  # others would number tokens by column, padding too
            needed |= {"position_ids"}
    hooks = (
        "generate",
        "prepare_inputs_for_generation",
        "_prepare_position_ids_for_generation",
        "_update_model_kwargs_for_generation",
        "_reorder_cache",
    )
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return (
        needed <= set(inspect.signature(network.forward).parameters)
        and all(getattr(type(network), hook, None) is getattr(GenerationMixin, hook, None) for hook in hooks)
        and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    )


class Reader(ABC):
    """An LLM that has read the prompts, a row each, and goes on reading a token a row."""

    logits: Float[Tensor, "N V"]
    """Of the token that comes next in each row."""
    start: int | None = None
    """The token that each text begins with, if there is one."""

    def __init__(self, network: Any, prompts: Prompts) -> None:
        self.network = network
        self._prompt = torch.arange(len(prompts.text), device=prompts.text.device)  # of each row

    def read(self, tokens: Int[Tensor, "M"], rows: Int[Tensor, "M"]) -> None:
        """Read a token after each of these rows: one that is left out is gone, one that repeats goes on twice."""
        prompt = self._prompt[rows]
        if not torch.equal(prompt, self._prompt):
            self._prompt = prompt
            self._select(rows)
        elif not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
            self._exchange(rows)
        self._read(tokens)

    @abstractmethod
    def _read(self, tokens: Int[Tensor, "N"]) -> None:
        """Read a token a row."""

    @abstractmethod
    def _select(self, rows: Int[Tensor, "M"]) -> None:
        """Keep these rows."""

    @abstractmethod
    def _exchange(self, rows: Int[Tensor, "N"]) -> None:
        """Keep these rows, which have the same prompts as before: only what comes after those differs."""


class DecoderOnlyReader(Reader):
    """Of a decoder-only LLM."""

    def __init__(self, network: Any, prompts: Prompts) -> None:
        super().__init__(network, prompts)
        parameters = inspect.signature(network.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_places = "logits_to_keep" in parameters
        # Of all that was read, also where the LLM looks at a window of it: some of that may still be padding.
        self._cache: Any = DynamicCache()
        if len(prompts.visual) < len(prompts.text):
            self._read_visual_prompts_once(prompts)
        else:
            inputs, seen = prompts.joined()
            self._mask = seen[:, :0]
            self._run(seen, inputs_embeds=inputs)
        self._move_padding_to_the_front()
        self._cache.layers = [PromptLayer(layer.keys, layer.values) for layer in self._cache.layers]

    def _read_visual_prompts_once(self, prompts: Prompts) -> None:
        seen = prompts.mask.new_ones(prompts.visual.shape[:2])
        self._mask = seen[:, :0]
        self._run(seen, inputs_embeds=prompts.visual)
        after_visual = self.logits[prompts.image_of]
        self._mask = self._mask[prompts.image_of]
        self._cache.reorder_cache(prompts.image_of)
        if prompts.text.shape[1]:
            self._run(prompts.mask, inputs_embeds=prompts.text)
            after_visual = self.logits.where(prompts.mask.any(dim=1, keepdim=True), after_visual)
        self.logits = after_visual

    def _read(self, tokens: Int[Tensor, "N"]) -> None:
        self._run(self._mask.new_ones(len(tokens), 1), input_ids=tokens[:, None])

    def _select(self, rows: Int[Tensor, "M"]) -> None:
        self._mask = self._mask[rows]
        self._cache.reorder_cache(rows)

    def _exchange(self, rows: Int[Tensor, "N"]) -> None:
        for layer in self._cache.layers:
            layer.exchange(rows)

    def _run(self, seen: Bool[Tensor, "N S"], **inputs: Tensor) -> None:
        """Run the LLM over S more columns: those that are `seen`, and padding on their right."""
        self._mask = torch.cat([self._mask, seen], dim=1)
        last = (seen.sum(dim=1) - 1).clamp(min=0)
        given: dict[str, Any] = {}
        if self._takes_positions:
            given["position_ids"] = self._mask.long().cumsum(dim=1)[:, -seen.shape[1] :] - 1
        if self._takes_places and seen.shape[1] > 1:
            given["logits_to_keep"], last = last.unique(return_inverse=True)
        mask = self._mask.long()
        out = self.network(**inputs, **given, attention_mask=mask, past_key_values=self._cache, use_cache=True)
        self.logits = out.logits[torch.arange(len(last)), last].float()

    def _move_padding_to_the_front(self) -> None:
        """Leave no gap between a prompt and what comes next: some LLMs look a number of columns back."""
        if self._mask.all():
            return
        order = self._mask.long().argsort(dim=1, stable=True)
        self._mask = self._mask.gather(1, order)
        for layer in self._cache.layers:
            layer.keys, layer.values = (
                kept.gather(2, order[:, None, :, None].expand_as(kept)) for kept in (layer.keys, layer.values)
            )


class EncoderDecoderReader(Reader):
    """Of an encoder-decoder: the encoder reads the prompts, the decoder what is written, after a start token."""

    def __init__(self, network: Any, prompts: Prompts) -> None:
        super().__init__(network, prompts)
        inputs, seen = prompts.joined()
        decoder = network.config.get_text_config(decoder=True)
        start = network.generation_config.decoder_start_token_id
        self.start = start
        self._mask = seen.long()
        self._hidden = network.get_encoder()(inputs_embeds=inputs, attention_mask=self._mask).last_hidden_state
        self._cache: Any = EncoderDecoderCache(DynamicCache(config=decoder), DynamicCache(config=decoder))
        self._read(torch.full_like(self._prompt, start))

    def _read(self, tokens: Int[Tensor, "N"]) -> None:
        out = self.network(
            encoder_outputs=BaseModelOutput(last_hidden_state=self._hidden),
            attention_mask=self._mask,
            decoder_input_ids=tokens[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self.logits = out.logits[:, -1].float()

    def _select(self, rows: Int[Tensor, "M"]) -> None:
        self._mask, self._hidden = self._mask[rows], self._hidden[rows]
        self._cache.reorder_cache(rows)

    def _exchange(self, rows: Int[Tensor, "N"]) -> None:
        self._cache.self_attention_cache.reorder_cache(rows)


class PromptLayer(DynamicLayer):
    """Keys and values of one layer: those of the prompts and, after them, of what was written since."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._prompt = keys.shape[-2]
        self._room = [with_room(kept) for kept in (keys, values)]
        self._fill(self._prompt)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens, where there is room without copying those before."""
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if after > self._room[0].shape[-2]:
            self._room = [with_room(kept) for kept in self._room]
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., before:after, :] = new
        return self._fill(after)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows."""
        length = self.get_seq_length()
        self._room = [room.index_select(0, beam_idx) for room in self._room]
        self._fill(length)

    def exchange(self, rows: Int[Tensor, "N"]) -> None:
        """Keep these rows, whose prompts are those that stand there already."""
        written = slice(self._prompt, self.get_seq_length())
        for room in self._room:
            room[..., written, :] = room[rows, :, written]

    def _fill(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (room[..., :length, :] for room in self._room)
        self.keys, self.values = keys, values
        return keys, values


def with_room(kept: Tensor) -> Tensor:
    """A copy of keys or values [N, heads, tokens, width] that has room for more tokens."""
    roomy = kept.new_empty(*kept.shape[:-2], kept.shape[-2] + ROOM, kept.shape[-1])
    roomy[..., : kept.shape[-2], :] = kept
    return roomy

"""Token-by-token decoding with a frozen LLM and a key-value cache that sequences share.

Each prompt is computed once, even if several sequences continue it, and each soft visual prompt is computed once, even
if several prompts begin with it.

Shapes: I images, B prompts, N rows (each row is one sequence), M selected rows, Q queries, T text tokens, S = Q + T, C
columns, L width of the LLM, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutput

ALIBI_MODEL_TYPES = {"bloom", "mpt"}
"""Types of LLMs that encode distances between tokens (ALiBi) and therefore need no position ids."""
CACHE_GROWTH = 16
"""Number of tokens by which the buffers of a key-value cache grow, so that they are rarely copied."""


@dataclass(frozen=True)
class PromptBatch:
    """A batch of prompts, each a soft visual prompt followed by text.

    Prompts of interleaved text and images have all embeddings in `text_embeds`:
    :func:`~blip2.decoding.conversation.make_prompt`.
    """

    visual_prompts: Float[Tensor, "I Q L"]
    text_embeds: Float[Tensor, "B T L"]
    """Embeddings of the text, padded on the right. T may be 0."""
    input_ids: Int[Tensor, "B T"]
    """Token ids of the text."""
    attention_mask: Bool[Tensor, "B T"]
    """True for text, False for padding."""
    image_index: Int[Tensor, "B"]
    """Row of `visual_prompts` with which each prompt begins, in [0, I)."""

    def inputs_embeds(self) -> tuple[Float[Tensor, "B S L"], Bool[Tensor, "B S"]]:
        """Return the embeddings of visual prompt and text in one sequence, and the attention mask of the sequence."""
        visual = self.visual_prompts[self.image_index]
        visual_mask = self.attention_mask.new_ones(visual.shape[:2])
        return torch.cat([visual, self.text_embeds], dim=1), torch.cat([visual_mask, self.attention_mask], dim=1)

    def select(self, rows: Int[Tensor, "N"]) -> PromptBatch:
        """Return a batch of the prompts with the indices `rows`, without columns that contain only padding."""
        length = int(self.attention_mask[rows].sum(dim=1).max()) if len(rows) else 0
        images, image_index = self.image_index[rows].unique(return_inverse=True)
        text_embeds, input_ids, attention_mask = (
            each[rows, :length] for each in (self.text_embeds, self.input_ids, self.attention_mask)
        )
        return PromptBatch(self.visual_prompts[images], text_embeds, input_ids, attention_mask, image_index)


def per_layer_inputs(
    network: Any, num_visual_tokens: int, input_ids: Int[Tensor, "B T"], inputs_embeds: Float[Tensor, "B S L"]
) -> dict[str, Tensor]:
    """Return the inputs that an LLM needs besides ``inputs_embeds`` if each of its layers embeds the tokens.

    Such LLMs are Gemma 3n and Gemma 4 E2B and E4B. Their layers embed the tokens of the visual prompt as padding, as
    transformers' own models do with images.

    Args:
        network: the LLM.
        num_visual_tokens: number of embeddings before those of `input_ids`.
        input_ids: token ids of the text.
        inputs_embeds: embeddings of visual prompt and text.

    Returns:
        The keyword argument ``per_layer_inputs`` of the LLM's ``forward``; an empty dict for other LLMs.
    """
    if not has_per_layer_embeddings(network):
        return {}
    padding = input_ids.new_full((len(input_ids), num_visual_tokens), get_pad_token_id(network))
    embed = network.get_decoder().get_per_layer_inputs
    input_ids = torch.cat([padding, input_ids], dim=1)
    takes_embeds = "inputs_embeds" in inspect.signature(embed).parameters
    return {"per_layer_inputs": embed(input_ids, inputs_embeds) if takes_embeds else embed(input_ids)}


def text_config(config: Any) -> Any:
    """Return the text part of an LLM's configuration. It is the whole configuration if the LLM reads only text."""
    return config if config.is_encoder_decoder else config.get_text_config()


def has_per_layer_embeddings(network: Any) -> bool:
    """Return whether each layer of an LLM embeds the tokens (Gemma 3n, Gemma 4 E2B and E4B)."""
    return bool(getattr(text_config(network.config), "hidden_size_per_layer_input", None))


def get_pad_token_id(network: Any) -> int:
    """Return the id of the padding token, or 0 if the LLM has none."""
    token = getattr(text_config(network.config), "pad_token_id", None)
    return token if isinstance(token, int) and token >= 0 else 0


def forward_without_cache(
    network: Any, logits_to_keep: Int[Tensor, "C"] | None = None, **kwargs: Any
) -> Float[Tensor, "B C V"]:
    """Run an LLM over whole sequences without a key-value cache.

    Args:
        network: the LLM.
        logits_to_keep: indices of the C columns whose logits are returned: strictly increasing, and fewer than all
            columns. None: all columns.
        kwargs: arguments of the LLM's ``forward``. Arguments that it does not accept are left out.
    """
    accepted = set(inspect.signature(network.forward).parameters) | {"per_layer_inputs"}
    kwargs = {name: value for name, value in {**kwargs, "use_cache": False}.items() if name in accepted}
    if logits_to_keep is None:
        return network(**kwargs).logits
    if "logits_to_keep" in accepted:
        return network(**kwargs, logits_to_keep=_for_any_device(logits_to_keep, network)).logits
    return network(**kwargs).logits[:, logits_to_keep]


def _for_any_device(indices: Int[Tensor, "C"], network: Any) -> Any:
    """Return indices of columns; as a list for an LLM with hooks of accelerate, which would move a tensor to a device
    that may not be the one of the columns."""
    return indices.tolist() if hasattr(network, "_hf_hook") else indices


def supports_kv_cache(network: Any) -> bool:
    """Return whether an LLM is expected to work with the key-value cache of this module.

    This is false for LLMs that cache anything besides keys and values (Mamba and its hybrids), for LLMs that override
    the generation hooks of transformers, and for LLMs that need position ids but do not accept them as an argument.
    :mod:`blip2.backbones.checks` verifies the result by running the LLM.
    """
    config = network.config
    required = {"attention_mask", "past_key_values", "use_cache"}
    if config.is_encoder_decoder:
        required |= {"decoder_input_ids", "encoder_outputs"}
        if network.generation_config.decoder_start_token_id is None:
            return False
    else:
        required |= {"input_ids", "inputs_embeds"}
        if config.model_type not in ALIBI_MODEL_TYPES:  # without them, LLMs number tokens by column
            required |= {"position_ids"}
    hooks = (
        "generate",
        "prepare_inputs_for_generation",
        "_prepare_position_ids_for_generation",
        "_update_model_kwargs_for_generation",
        "_reorder_cache",
    )
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return (
        required <= set(inspect.signature(network.forward).parameters)
        and all(getattr(type(network), hook, None) is getattr(GenerationMixin, hook, None) for hook in hooks)
        and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    )


class IncrementalDecoder(ABC):
    """An LLM that has processed a batch of prompts, one per row, and continues the rows one token at a time."""

    logits: Float[Tensor, "N V"]
    """Logits of the next token of each row."""
    decoder_start_token_id: int | None = None
    """The token with which each generated sequence of an encoder-decoder begins; None for a decoder-only LLM."""

    def __init__(self, network: Any, prompts: PromptBatch) -> None:
        self.network = network
        self._prompt_index = torch.arange(len(prompts.text_embeds), device=prompts.text_embeds.device)  # per row

    def step(self, tokens: Int[Tensor, "M"], rows: Int[Tensor, "M"]) -> None:
        """Select rows of the batch, append a token to each selected row, and compute the logits of the next token.

        Args:
            tokens: the token to append to each selected row.
            rows: indices of the selected rows. A row that is not selected is dropped, and a row that is selected
                several times is duplicated.
        """
        prompt_index = self._prompt_index[rows]
        if not torch.equal(prompt_index, self._prompt_index):
            self._prompt_index = prompt_index
            self._reorder(rows)
        elif not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
            self._reorder_suffix(rows)
        self._step(tokens)

    @abstractmethod
    def _step(self, tokens: Int[Tensor, "N"]) -> None:
        """Append a token to each row."""

    @abstractmethod
    def _reorder(self, rows: Int[Tensor, "M"]) -> None:
        """Select rows of the batch."""

    @abstractmethod
    def _reorder_suffix(self, rows: Int[Tensor, "N"]) -> None:
        """Select rows of the batch. Row i of the result must have the same prompt as row i has now.

        The selection then changes only what was computed for the generated tokens.
        """


class CachedDecoder(IncrementalDecoder):
    """Incremental decoding with a key-value cache."""

    _attention_mask: Tensor
    _cache: Any

    def extend(
        self, tokens: Int[Tensor, "M U"], mask: Bool[Tensor, "M U"], rows: Int[Tensor, "M"]
    ) -> Float[Tensor, "M U V"]:
        """Append tokens to copies of rows, and return the logits after each token. This decoder stays as it is.

        Args:
            tokens: the tokens to append to each selected row, padded on the right.
            mask: True for tokens, False for padding.
            rows: indices of the selected rows. A row may be selected several times.
        """
        extended = copy.copy(self)
        extended._cache = _share_cache(self._cache)
        extended._reorder(rows)  # gives the new cache tensors of its own
        return extended._run(tokens, mask)

    @abstractmethod
    def _run(self, tokens: Int[Tensor, "N U"], mask: Bool[Tensor, "N U"]) -> Float[Tensor, "N U V"]:
        """Append tokens to each row, and return the logits after each token."""


class CausalLMDecoder(CachedDecoder):
    """Incremental decoding with a decoder-only LLM."""

    def __init__(self, network: Any, prompts: PromptBatch) -> None:
        super().__init__(network, prompts)
        parameters = inspect.signature(network.forward).parameters
        self._accepts_position_ids = "position_ids" in parameters
        self._accepts_logits_to_keep = "logits_to_keep" in parameters
        # The cache keeps all tokens even for an LLM with a sliding window, because the window may contain padding.
        self._cache: Any = DynamicCache()
        if len(prompts.visual_prompts) < len(prompts.text_embeds):
            self._prefill_shared_visual_prompts(prompts)
        else:
            inputs_embeds, mask = prompts.inputs_embeds()
            self._attention_mask = mask[:, :0]
            extra = per_layer_inputs(network, prompts.visual_prompts.shape[1], prompts.input_ids, inputs_embeds)
            self._forward(mask, inputs_embeds=inputs_embeds, **extra)
        self._move_padding_to_the_left()
        self._cache.layers = [PreallocatedCacheLayer(layer.keys, layer.values) for layer in self._cache.layers]

    def _prefill_shared_visual_prompts(self, prompts: PromptBatch) -> None:
        """Compute each visual prompt once, then the texts of all prompts."""
        visual = prompts.visual_prompts
        mask = prompts.attention_mask.new_ones(visual.shape[:2])
        self._attention_mask = mask[:, :0]
        no_text = prompts.input_ids.new_empty(len(mask), 0)
        self._forward(mask, inputs_embeds=visual, **per_layer_inputs(self.network, visual.shape[1], no_text, visual))
        logits = self.logits[prompts.image_index]
        self._attention_mask = self._attention_mask[prompts.image_index]
        self._cache.reorder_cache(prompts.image_index)
        if prompts.text_embeds.shape[1]:
            extra = per_layer_inputs(self.network, 0, prompts.input_ids, prompts.text_embeds)
            self._forward(prompts.attention_mask, inputs_embeds=prompts.text_embeds, **extra)
            logits = self.logits.where(prompts.attention_mask.any(dim=1, keepdim=True), logits)
        self.logits = logits

    def _step(self, tokens: Int[Tensor, "N"]) -> None:
        self._forward(self._attention_mask.new_ones(len(tokens), 1), input_ids=tokens[:, None])

    def _reorder(self, rows: Int[Tensor, "M"]) -> None:
        self._attention_mask = self._attention_mask[rows]
        self._cache.reorder_cache(rows)

    def _reorder_suffix(self, rows: Int[Tensor, "N"]) -> None:
        for layer in self._cache.layers:
            layer.reorder_suffix(rows)

    def select(self, rows: Int[Tensor, "M"]) -> None:
        """Select rows without appending a token. A row may be selected several times."""
        self._prompt_index = self._prompt_index[rows]
        self._reorder(rows)
        self.logits = self.logits[rows]

    def join(self, other: CausalLMDecoder) -> None:
        """Add the rows of another decoder of the same LLM after the rows of this one.

        Rows of different lengths are padded on the left, which changes nothing in their logits.
        """
        decoders = (self, other)
        # Columns that are padding in all rows are left over from longer rows that have ended.
        starts = [int(each._attention_mask.any(dim=0).int().argmax()) for each in decoders]
        masks = [each._attention_mask[:, start:] for each, start in zip(decoders, starts, strict=True)]
        length = max(mask.shape[1] for mask in masks)
        attention_mask = torch.cat([F.pad(mask, (length - mask.shape[1], 0)) for mask in masks])
        layers: list[PreallocatedCacheLayer] = []
        for own, others in zip(self._cache.layers, other._cache.layers, strict=True):
            states = [
                torch.cat(
                    [
                        F.pad(part[..., start:, :], (0, 0, length - part.shape[-2] + start, 0))
                        for part, start in zip(parts, starts, strict=True)
                    ]
                )
                for parts in ((own.keys, others.keys), (own.values, others.values))
            ]
            layers.append(PreallocatedCacheLayer(*states))
        logits = torch.cat([self.logits, other.logits])
        # Nothing is changed before, so that this decoder goes on if there is not enough memory.
        self._attention_mask, self._cache.layers, self.logits = attention_mask, layers, logits
        self._prompt_index = torch.arange(len(self.logits), device=self.logits.device)

    def _forward(self, new_mask: Bool[Tensor, "N S"], **inputs: Tensor) -> None:
        """Run the LLM over S new columns, padded on the right where `new_mask` is False."""
        last = (new_mask.sum(dim=1) - 1).clamp(min=0)
        if self._accepts_logits_to_keep and new_mask.shape[1] > 1:
            columns, last = last.unique(return_inverse=True)
            inputs["logits_to_keep"] = _for_any_device(columns, self.network)
        logits = self._append(new_mask, **inputs)
        self.logits = logits[torch.arange(len(last)), last].float()

    def _run(self, tokens: Int[Tensor, "N U"], mask: Bool[Tensor, "N U"]) -> Float[Tensor, "N U V"]:
        return self._append(mask, input_ids=tokens)

    def _append(self, new_mask: Bool[Tensor, "N S"], **inputs: Any) -> Float[Tensor, "N C V"]:
        """Run the LLM over S new columns, and return its logits."""
        self._attention_mask = torch.cat([self._attention_mask, new_mask], dim=1)
        if self._accepts_position_ids:
            inputs["position_ids"] = self._attention_mask.long().cumsum(dim=1)[:, -new_mask.shape[1] :] - 1
        mask = self._attention_mask.long()
        return self.network(**inputs, attention_mask=mask, past_key_values=self._cache, use_cache=True).logits

    def _move_padding_to_the_left(self) -> None:
        """Make prompts and generated tokens contiguous, because a sliding window is a fixed number of columns."""
        if self._attention_mask.all():
            return
        order = self._attention_mask.long().argsort(dim=1, stable=True)
        self._attention_mask = self._attention_mask.gather(1, order)
        for layer in self._cache.layers:
            layer.keys, layer.values = (
                states.gather(2, order.to(states.device)[:, None, :, None].expand_as(states))
                for states in (layer.keys, layer.values)
            )


class Seq2SeqLMDecoder(CachedDecoder):
    """Incremental decoding with an encoder-decoder, whose encoder reads the prompts."""

    def __init__(self, network: Any, prompts: PromptBatch) -> None:
        super().__init__(network, prompts)
        inputs_embeds, mask = prompts.inputs_embeds()
        self.decoder_start_token_id = start = network.generation_config.decoder_start_token_id
        self._attention_mask = mask.long()
        encoder = network.get_encoder()
        self._encoder_hidden_states = encoder(
            inputs_embeds=inputs_embeds, attention_mask=self._attention_mask
        ).last_hidden_state.to(inputs_embeds.device)
        # The cache keeps all tokens even for an LLM with a sliding window: cross-attention has no window.
        self._cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self._step(torch.full_like(self._prompt_index, start))

    def _step(self, tokens: Int[Tensor, "N"]) -> None:
        self.logits = self._append(tokens[:, None])[:, -1].float()

    def _run(self, tokens: Int[Tensor, "N U"], mask: Bool[Tensor, "N U"]) -> Float[Tensor, "N U V"]:
        return self._append(tokens)  # the decoder is causal, so padding on the right changes nothing before it

    def _append(self, tokens: Int[Tensor, "N U"]) -> Float[Tensor, "N U V"]:
        return self.network(
            encoder_outputs=BaseModelOutput(last_hidden_state=self._encoder_hidden_states),
            attention_mask=self._attention_mask,
            decoder_input_ids=tokens,
            past_key_values=self._cache,
            use_cache=True,
        ).logits

    def _reorder(self, rows: Int[Tensor, "M"]) -> None:
        self._attention_mask = self._attention_mask[rows]
        self._encoder_hidden_states = self._encoder_hidden_states[rows]
        self._cache.reorder_cache(rows)

    def _reorder_suffix(self, rows: Int[Tensor, "N"]) -> None:
        self._cache.self_attention_cache.reorder_cache(rows)


class UncachedDecoder(IncrementalDecoder):
    """Decoding without a cache, for any LLM: each step computes the whole sequence again, as in training."""

    def __init__(self, network: Any, prompts: PromptBatch) -> None:
        super().__init__(network, prompts)
        self._inputs_embeds, self._attention_mask = prompts.inputs_embeds()
        self._input_ids, self._num_visual_tokens = prompts.input_ids, prompts.visual_prompts.shape[1]
        self._generated = prompts.input_ids[:, :0]
        self._encoder_hidden_states: Tensor | None = None
        if network.config.is_encoder_decoder:
            self.decoder_start_token_id = network.generation_config.decoder_start_token_id
            encoder = network.get_encoder()
            self._encoder_hidden_states = encoder(
                inputs_embeds=self._inputs_embeds, attention_mask=self._attention_mask.long()
            ).last_hidden_state.to(self._inputs_embeds.device)
        self._forward()

    def _step(self, tokens: Int[Tensor, "N"]) -> None:
        self._generated = torch.cat([self._generated, tokens[:, None]], dim=1)
        self._forward()

    def _reorder(self, rows: Int[Tensor, "M"]) -> None:
        self._inputs_embeds = self._inputs_embeds[rows]
        self._attention_mask, self._input_ids = self._attention_mask[rows], self._input_ids[rows]
        if self._encoder_hidden_states is not None:
            self._encoder_hidden_states = self._encoder_hidden_states[rows]
        self._reorder_suffix(rows)

    def _reorder_suffix(self, rows: Int[Tensor, "N"]) -> None:
        self._generated = self._generated[rows]

    def _forward(self) -> None:
        if self._encoder_hidden_states is not None:
            start = self._generated.new_full((len(self._generated), 1), self.decoder_start_token_id or 0)
            logits = forward_without_cache(
                self.network,
                encoder_outputs=BaseModelOutput(last_hidden_state=self._encoder_hidden_states),
                attention_mask=self._attention_mask.long(),
                decoder_input_ids=torch.cat([start, self._generated], dim=1),
            )
            self.logits = logits[:, -1].float()
            return
        mask = torch.cat([self._attention_mask, self._attention_mask.new_ones(self._generated.shape)], dim=1)
        order = (~mask).long().argsort(dim=1, stable=True)  # moves padding from between prompt and text to the right
        embed = self.network.get_input_embeddings()
        inputs_embeds = torch.cat([self._inputs_embeds, embed(self._generated).to(self._inputs_embeds)], dim=1)
        inputs_embeds = inputs_embeds.gather(1, order[..., None].expand_as(inputs_embeds))
        padding = self._input_ids.new_full((len(mask), self._num_visual_tokens), get_pad_token_id(self.network))
        input_ids = torch.cat([padding, self._input_ids, self._generated], dim=1).gather(1, order)
        mask = mask.gather(1, order)
        extra = per_layer_inputs(self.network, 0, input_ids, inputs_embeds)
        logits = forward_without_cache(self.network, inputs_embeds=inputs_embeds, attention_mask=mask.long(), **extra)
        self.logits = logits[torch.arange(len(mask)), mask.sum(dim=1) - 1].float()


class PreallocatedCacheLayer(DynamicLayer):
    """The keys and values of one layer in buffers with spare space, so that appending a token rarely copies them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._prompt_length = keys.shape[-2]
        self._buffers = [preallocate(states) for states in (keys, values)]
        self._set_length(self._prompt_length)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [N, heads, tokens, width] of new tokens, and return keys and values of all tokens."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._buffers[0].shape[-2]:
            self._buffers = [preallocate(buffer, end) for buffer in self._buffers]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = states
        return self._set_length(end)

    def truncate(self, length: int) -> None:
        """Keep the keys and values of the first tokens."""
        self._set_length(length)

    def copy(self, length: int) -> PreallocatedCacheLayer:
        """Return a layer with the keys and values of the first tokens in buffers of its own."""
        keys, values = (buffer[..., :length, :] for buffer in self._buffers)
        return PreallocatedCacheLayer(keys, values)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows of the batch."""
        length = self.get_seq_length()
        self._buffers = [buffer.index_select(0, beam_idx.to(buffer.device)) for buffer in self._buffers]
        self._set_length(length)

    def reorder_suffix(self, rows: Int[Tensor, "N"]) -> None:
        """Select rows in the part of the cache after the prompts.

        Row i of the result must have the same prompt as row i has now, so the prompts' part of the cache stays as it
        is.
        """
        suffix = slice(self._prompt_length, self.get_seq_length())
        for buffer in self._buffers:
            buffer[..., suffix, :] = buffer[rows.to(buffer.device), :, suffix]

    def _set_length(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[..., :length, :] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


def _share_cache(cache: Any) -> Any:
    """Return another key-value cache with the tensors of `cache`.

    The caller has to select rows in it (``reorder_cache``) before it appends tokens to either of them, because an
    append writes into the tensors.
    """
    copied = copy.copy(cache)
    if isinstance(cache, EncoderDecoderCache):
        copied.self_attention_cache = _share_cache(cache.self_attention_cache)
        copied.cross_attention_cache = _share_cache(cache.cross_attention_cache)
        copied.is_updated = dict(cache.is_updated)
    else:
        copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def preallocate(states: Tensor, length: int = 0) -> Tensor:
    """Copy keys or values [N, heads, tokens, width] to a larger buffer.

    The buffer has space for `length` tokens, or all of `states` if these are more, and for :data:`CACHE_GROWTH` more.
    """
    tokens = max(states.shape[-2], length)
    buffer = states.new_empty(*states.shape[:-2], tokens + CACHE_GROWTH, states.shape[-1])
    buffer[..., : states.shape[-2], :] = states
    return buffer

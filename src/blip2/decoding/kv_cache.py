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
    ids: Int[Tensor, "B T"]
    """Tokens of the text."""
    mask: Bool[Tensor, "B T"]
    """True where there is text."""
    image_of: Int[Tensor, "B"]
    """The row of `visual` that each prompt belongs to."""

    def joined(self) -> tuple[Float[Tensor, "B S L"], Bool[Tensor, "B S"]]:
        """The visual prompt before each text (S = Q + T), and the mask of both."""
        visual = self.visual[self.image_of]
        seen = self.mask.new_ones(visual.shape[:2])
        return torch.cat([visual, self.text], dim=1), torch.cat([seen, self.mask], dim=1)

    def rows(self, which: Int[Tensor, "N"]) -> Prompts:
        """Some of the prompts, without columns that are padding in all of them."""
        columns = int(self.mask[which].sum(dim=1).max()) if len(which) else 0
        image, image_of = self.image_of[which].unique(return_inverse=True)
        text, ids, mask = (each[which, :columns] for each in (self.text, self.ids, self.mask))
        return Prompts(self.visual[image], text, ids, mask, image_of)


def beside_embeddings(
    network: Any, visual: int, ids: Int[Tensor, "B T"], embeddings: Float[Tensor, "B S L"]
) -> dict[str, Tensor]:
    """Return what an LLM has to be given beside the embeddings of a text, because it looks tokens up more than once.

    That is ``per_layer_inputs`` for those with an embedding in each layer (Gemma 3n, Gemma 4 E2B and E4B). A visual
    prompt counts as padding there, as the images do in transformers' own models.

    Args:
        visual: number of embeddings before those of `ids`.
    """
    if not has_embeddings_in_layers(network):
        return {}
    blank = ids.new_full((len(ids), visual), blank_token(network))
    look_up = network.get_decoder().get_per_layer_inputs
    ids = torch.cat([blank, ids], dim=1)
    by_both = "inputs_embeds" in inspect.signature(look_up).parameters
    return {"per_layer_inputs": look_up(ids, embeddings) if by_both else look_up(ids)}


def text_config(config: Any) -> Any:
    """Return the part of a configuration that is of the text: all of it but for LLMs that read images by themselves."""
    return config if config.is_encoder_decoder else config.get_text_config()


def has_embeddings_in_layers(network: Any) -> bool:
    """Return whether an LLM looks tokens up in each layer (Gemma 3n, Gemma 4 E2B and E4B)."""
    return bool(getattr(text_config(network.config), "hidden_size_per_layer_input", None))


def blank_token(network: Any) -> int:
    """Return the token that stands where there is none: that of padding, or else the first."""
    token = getattr(text_config(network.config), "pad_token_id", None)
    return token if isinstance(token, int) and token >= 0 else 0


def forward(network: Any, columns: Int[Tensor, "C"] | None = None, **arguments: Any) -> Float[Tensor, "B C V"]:
    """Run an LLM over whole texts, without anything kept of an earlier pass or for a later one.

    Args:
        columns: of which logits are wanted, in rising order and not all of them; None: all.
        arguments: of its own ``forward``; those that it does not have are left out.
    """
    known = set(inspect.signature(network.forward).parameters) | {"per_layer_inputs"}
    arguments = {name: value for name, value in {**arguments, "use_cache": False}.items() if name in known}
    if columns is None:
        return network(**arguments).logits
    if "logits_to_keep" in known:
        return network(**arguments, logits_to_keep=columns).logits
    return network(**arguments).logits[:, columns]


def is_supported(network: Any) -> bool:
    """Whether what an LLM keeps of a text may be the keys and values of each row, and no more.

    Not so for recurrent LLMs (Mamba and its hybrids), for those with steps of their own before each pass, and for those
    that cannot be told the positions of tokens. Whether it is really so is tried in :mod:`blip2.backbones.checks`.
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
            beside = beside_embeddings(network, prompts.visual.shape[1], prompts.ids, inputs)
            self._run(seen, inputs_embeds=inputs, **beside)
        self._move_padding_to_the_front()
        self._cache.layers = [PromptLayer(layer.keys, layer.values) for layer in self._cache.layers]

    def _read_visual_prompts_once(self, prompts: Prompts) -> None:
        seen = prompts.mask.new_ones(prompts.visual.shape[:2])
        self._mask = seen[:, :0]
        nothing = prompts.ids.new_empty(len(seen), 0)
        beside = beside_embeddings(self.network, prompts.visual.shape[1], nothing, prompts.visual)
        self._run(seen, inputs_embeds=prompts.visual, **beside)
        after_visual = self.logits[prompts.image_of]
        self._mask = self._mask[prompts.image_of]
        self._cache.reorder_cache(prompts.image_of)
        if prompts.text.shape[1]:
            beside = beside_embeddings(self.network, 0, prompts.ids, prompts.text)
            self._run(prompts.mask, inputs_embeds=prompts.text, **beside)
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
        start = network.generation_config.decoder_start_token_id
        self.start = start
        self._mask = seen.long()
        self._hidden = network.get_encoder()(inputs_embeds=inputs, attention_mask=self._mask).last_hidden_state
        # Of all that was read, also where the LLM looks at a window of it: the encoder's output is no window.
        self._cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
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


class Rereader(Reader):
    """Of an LLM of any kind: it reads everything again for each token, exactly as it does in training."""

    def __init__(self, network: Any, prompts: Prompts) -> None:
        super().__init__(network, prompts)
        self._inputs, self._seen = prompts.joined()
        self._ids, self._visual = prompts.ids, prompts.visual.shape[1]
        self._written = prompts.ids[:, :0]
        self._hidden: Tensor | None = None
        if network.config.is_encoder_decoder:
            self.start = network.generation_config.decoder_start_token_id
            encoder = network.get_encoder()
            self._hidden = encoder(inputs_embeds=self._inputs, attention_mask=self._seen.long()).last_hidden_state
        self._run()

    def _read(self, tokens: Int[Tensor, "N"]) -> None:
        self._written = torch.cat([self._written, tokens[:, None]], dim=1)
        self._run()

    def _select(self, rows: Int[Tensor, "M"]) -> None:
        self._inputs, self._seen, self._ids = self._inputs[rows], self._seen[rows], self._ids[rows]
        if self._hidden is not None:
            self._hidden = self._hidden[rows]
        self._exchange(rows)

    def _exchange(self, rows: Int[Tensor, "N"]) -> None:
        self._written = self._written[rows]

    def _run(self) -> None:
        if self._hidden is not None:
            begun = self._written.new_full((len(self._written), 1), self.start or 0)
            logits = forward(
                self.network,
                encoder_outputs=BaseModelOutput(last_hidden_state=self._hidden),
                attention_mask=self._seen.long(),
                decoder_input_ids=torch.cat([begun, self._written], dim=1),
            )
            self.logits = logits[:, -1].float()
            return
        seen = torch.cat([self._seen, self._seen.new_ones(self._written.shape)], dim=1)
        order = (~seen).long().argsort(dim=1, stable=True)  # what was written follows its prompt without a gap
        embed = self.network.get_input_embeddings()
        inputs = torch.cat([self._inputs, embed(self._written).to(self._inputs.dtype)], dim=1)
        inputs = inputs.gather(1, order[..., None].expand_as(inputs))
        blank = self._ids.new_full((len(seen), self._visual), blank_token(self.network))
        ids = torch.cat([blank, self._ids, self._written], dim=1).gather(1, order)
        seen = seen.gather(1, order)
        beside = beside_embeddings(self.network, 0, ids, inputs)
        logits = forward(self.network, inputs_embeds=inputs, attention_mask=seen.long(), **beside)
        self.logits = logits[torch.arange(len(seen)), seen.sum(dim=1) - 1].float()


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

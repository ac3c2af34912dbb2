"""Frozen LLMs, decoder-only and encoder-decoder, behind one small class (paper §3.3, Figure 3).

Both kinds take a soft visual prompt before the embeddings of the text. They differ in where the text goes: a
decoder-only LLM reads prompt and caption as one sequence, an encoder-decoder reads the prompt (or the prefix of the
caption) in its encoder and writes the rest in its decoder.

Legend: B batch, Q queries, T text tokens, U target tokens, L width of the LLM, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.activations import ACT2FN

from blip2.errors import InputError
from blip2.model.frozen import Freezable
from blip2.model.objectives import IGNORED
from blip2.model.pretrained import read_config, read_model


@dataclass(frozen=True)
class Decoding:
    """How text is generated."""

    beams: int = 5
    """Beam width; 1 is greedy. Not used when sampling."""
    max_new_tokens: int = 30
    """Longest text, in tokens of the LLM."""
    min_new_tokens: int = 1
    """Shortest text, in tokens of the LLM."""
    length_penalty: float = 1.0
    """Beam scores are divided by length to this power: below 0 favours short texts (-1 for answers, §4.1)."""
    top_p: float | None = None
    """Nucleus sampling from the smallest set of tokens with this probability, instead of beam search."""
    temperature: float = 1.0
    """Of sampling."""
    repetition_penalty: float = 1.0
    """Above 1 discourages tokens that were written already (those of the prompt do not count)."""

    def __post_init__(self) -> None:
        for name, smallest in (("beams", 1), ("max_new_tokens", 1), ("min_new_tokens", 0)):
            if getattr(self, name) < smallest:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least {smallest}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}, expected a probability above 0")
        for name in ("temperature", "repetition_penalty"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected more than 0")


class LanguageModel(Freezable):
    """A pretrained LLM.

    Args:
        network: a ``...ForCausalLM`` or an encoder-decoder ``...ForConditionalGeneration`` of transformers.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network
        self.is_encoder_decoder: bool = bool(self.network.config.is_encoder_decoder)
        # What generation does is said by Decoding alone, not by defaults that came with the weights.
        start = getattr(self.network.config, "decoder_start_token_id", None)
        self.network.generation_config = GenerationConfig(decoder_start_token_id=start)
        self._attention: str = self.network.config._attn_implementation
        self.freeze()
        embedding: Any = self.network.get_input_embeddings()
        self.width: int = embedding.weight.shape[1]
        self.vocabulary: int = embedding.weight.shape[0]

    def embed(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T L"]:
        return self.network.get_input_embeddings()(ids)

    @torch.no_grad()
    def embedding_scale(self) -> float:
        """Root mean square of the token embeddings as the LLM sees them (some models scale them inside)."""
        step = max(self.vocabulary // 4096, 1)
        ids = torch.arange(0, self.vocabulary, step, device=self.network.device)
        return float(self.embed(ids[None]).float().square().mean().sqrt())

    def states(
        self,
        visual: Float[Tensor, "B Q L"],
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        labels: Int[Tensor, "B U"],
    ) -> tuple[Float[Tensor, "M S"], Int[Tensor, "M"]]:
        """What :meth:`head` makes logits of, and the labels, at the M positions that carry a label and no others.

        Args:
            visual: the soft visual prompt, put before the text.
            ids, mask: the text, padded on the right: all of it for a decoder-only LLM, the encoder's part for an
                encoder-decoder.
            labels: for a decoder-only LLM one for each id (U = T), saying the id itself where it is to be predicted;
                for an encoder-decoder the decoder's targets. Other places hold -100.
        """
        inputs, seen = self._inputs(visual, ids, mask)
        counted = labels != IGNORED
        columns = counted.any(dim=0).nonzero().squeeze(1)
        arguments: dict[str, Any] = {"inputs_embeds": inputs, "attention_mask": seen, "use_cache": False}
        if self.is_encoder_decoder:
            arguments["decoder_input_ids"] = self.network.prepare_decoder_input_ids_from_labels(labels=labels)
        else:
            # The token at column t is predicted one position before it.
            arguments["logits_to_keep"] = visual.shape[1] + columns - 1
            counted, labels = counted[:, columns], labels[:, columns]
        with self.own_precision(inputs.device), self._without_head():
            states = self.network(**arguments).logits
        return states[counted], labels[counted]

    def head(self, states: Float[Tensor, "M S"]) -> Float[Tensor, "M V"]:
        """The logits of states."""
        with self.own_precision(states.device):
            return self._head(states)

    @property
    def _head(self) -> Any:
        """The output matrix; the identity where what an LLM does to its logits afterwards leaves no other way."""
        return self.network.get_output_embeddings() if self._ends_in_head else nn.Identity()

    @contextmanager
    def _without_head(self) -> Iterator[None]:
        """Have the network put out what its output matrix would read."""
        if not self._ends_in_head:
            yield
            return
        matrix = self.network.get_output_embeddings()
        matrix.forward = nn.Identity().forward
        try:
            yield
        finally:
            del matrix.forward

    @cached_property
    @torch.no_grad()
    def _ends_in_head(self) -> bool:
        """Whether logits are what the output matrix puts out, unscaled and uncapped: seen by handing on marked ones."""
        matrix = self.network.get_output_embeddings()
        if not isinstance(matrix, nn.Linear):
            return False
        marks = torch.linspace(-60, 60, matrix.out_features, device=matrix.weight.device).to(matrix.weight.dtype)
        matrix.forward = lambda states: marks.expand(*states.shape[:-1], -1)
        try:
            ids = torch.zeros(1, 1, dtype=torch.long, device=matrix.weight.device)
            decoder = {"decoder_input_ids": ids} if self.is_encoder_decoder else {}
            logits = self.network(input_ids=ids, use_cache=False, **decoder).logits
        finally:
            del matrix.forward
        return torch.equal(logits[0, 0], marks.to(logits.dtype))

    @torch.no_grad()
    def generate(
        self,
        visual: Float[Tensor, "B Q L"],
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        decoding: Decoding,
        end: int,
        copies: int = 1,
    ) -> Int[Tensor, "N U"]:
        """Write the continuation of each prompt.

        Args:
            ids, mask: prompts, padded on the left for a decoder-only LLM and on the right for an encoder-decoder.
                T may be 0.
            decoding: how.
            end: id of the token that ends a text; it also pads the result.
            copies: how many texts for each prompt; N = B * copies.

        Returns:
            New tokens only.
        """
        inputs, seen = self._inputs(visual, ids, mask)
        if not self.is_encoder_decoder:
            # Padding goes before everything: what comes next is read off the last position, which would be padding
            # where a prompt is empty and others are not.
            order = seen.argsort(dim=1, stable=True)
            inputs = inputs.gather(1, order[..., None].expand_as(inputs))
            seen = seen.gather(1, order)
        # Some chat models end in one of several tokens; where the end asked for is one of them, so are the others.
        own = getattr(self.network.config, "eos_token_id", None)
        sampling = decoding.top_p is not None
        settings = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            min_new_tokens=decoding.min_new_tokens,
            do_sample=sampling,
            num_beams=1 if sampling else max(decoding.beams, copies),
            top_p=decoding.top_p,
            top_k=0 if sampling else None,
            temperature=decoding.temperature if sampling else None,
            length_penalty=None if sampling or decoding.beams == 1 else decoding.length_penalty,
            num_return_sequences=copies,
            eos_token_id=own if isinstance(own, list) and end in own else end,
            pad_token_id=end,
            decoder_start_token_id=self.network.generation_config.decoder_start_token_id,
        )
        # Not among the settings, where padding before the prompt would be taken for padding of the new tokens.
        penalty = RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty)
        with self.own_precision(inputs.device):
            new = self.network.generate(
                inputs_embeds=inputs,
                attention_mask=seen,
                generation_config=settings,
                logits_processor=LogitsProcessorList([penalty] if decoding.repetition_penalty != 1 else []),
            )
        return new[:, 1:] if self.is_encoder_decoder else new  # a decoder's text begins with its start token

    def _inputs(
        self, visual: Float[Tensor, "B Q L"], ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B Q+T L"], Int[Tensor, "B Q+T"]]:
        text = self.embed(ids)
        if self._attention == "sdpa":
            # The backward of the CPU's fused kernel is slow in bfloat16, as in the Q-Former.
            slow = text.device.type == "cpu" and text.dtype == torch.bfloat16
            fitting = "eager" if slow else "sdpa"
            if self.network.config._attn_implementation != fitting:
                self.network.set_attn_implementation(fitting)
        seen = torch.cat([mask.new_ones(visual.shape[:2]), mask], dim=1).long()
        return torch.cat([visual.to(text.dtype), text], dim=1), seen


def load_language_model(name: str, dtype: torch.dtype = torch.float32, activation: str | None = None) -> LanguageModel:
    """Load any ``AutoModelForCausalLM`` or ``AutoModelForSeq2SeqLM``, frozen.

    Args:
        name: a folder or hub name in transformers' format.
        dtype: of the weights and of the computation. The paper used float16 for OPT, bfloat16 for FlanT5.
        activation: of its feed-forwards, in place of its own.

    Raises:
        InputError: there is no such model, or it is not a language model.
    """
    return LanguageModel(read_network(name, dtype, activation))


def read_network(name: str, dtype: torch.dtype | str, activation: str | None = None) -> Any:
    """The network of :func:`load_language_model` alone; `dtype` may be ``auto``, that of its files."""
    config = read_config(name, "language model")
    set_activation(config, activation)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return read_model(auto, name, "language model", dtype, config=config)[0]


def set_activation(config: Any, activation: str | None) -> None:
    """Have the feed-forwards of an LLM use another activation than its own; None leaves it as it is.

    Raises:
        InputError: transformers has no such activation, or the LLM does not say which it has.
    """
    if activation is None:
        return
    if activation not in ACT2FN:
        raise InputError(f"language.activation is {activation!r}, expected one that transformers has, such as gelu")
    key = next((k for k in ("dense_act_fn", "hidden_act", "activation_function") if hasattr(config, k)), None)
    if key is None:
        raise InputError(f"an LLM of type {config.model_type} has no activation to set: leave out language.activation")
    setattr(config, key, activation)

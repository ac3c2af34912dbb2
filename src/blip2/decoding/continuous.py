"""Decode many texts at the same time; each begins and ends at its own time and has its own options.

Between two tokens, texts that are complete leave the batch and new ones join it (continuous batching). Each text is the
same as :func:`blip2.decoding.search.sample` generates for its prompt alone.

Legend: S tokens of a prompt, L width of the LLM, U new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blip2.decoding.kv_cache import CausalLMDecoder, IncrementalDecoder, PromptBatch, get_pad_token_id
from blip2.decoding.options import Decoding
from blip2.decoding.search import process_logits, sample_tokens
from blip2.errors import InputError


@dataclass(eq=False)
class Row:
    """A text that is generated."""

    decoding: Decoding
    """Options of text generation, without beam search. :class:`ContinuousBatch` does not look for stop strings: the
    code that reads the tokens sets `is_done`."""
    uniforms: Float[Tensor, "max_new_tokens"] | None = None
    """Random numbers in [0, 1), one for each token, so that a sampled text does not depend on the others. They are
    needed if the decoding samples."""
    num_alternatives: int | None = None
    """Number of most likely tokens to return for each token. None: no probabilities are computed."""
    tokens: list[int] = field(default_factory=list)
    """The tokens so far."""
    is_done: bool = False
    """Whether the text is complete or no longer needed."""

    def __post_init__(self) -> None:
        if self.decoding.beam_width(1) > 1:
            raise InputError("beam search cannot stream tokens: set num_beams to 1, or sample")


class NewToken(NamedTuple):
    """A token that was added to a text, with its probability if requested."""

    row: Row
    token: int
    log_prob: float | None = None
    """Natural logarithm of the probability in training; penalties and temperature do not change it."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The most likely tokens, and their log-probabilities."""


class ContinuousBatch:
    """Texts that one LLM generates at the same time.

    Repeat :meth:`choose`, which adds a token to each text, and :meth:`advance`, which runs the LLM; between them,
    :meth:`join` adds texts.

    Args:
        decoder_class: the class that runs the LLM. Rows are joined into one pass if it is
            :class:`~blip2.decoding.kv_cache.CausalLMDecoder`; otherwise each prompt has a pass of its own.
        network: the LLM.
        eos_token_ids: tokens that end a text.
    """

    def __init__(
        self, decoder_class: type[IncrementalDecoder], network: torch.nn.Module, eos_token_ids: Sequence[int]
    ) -> None:
        self._decoder_class, self._network, self._eos = decoder_class, network, tuple(eos_token_ids)
        self._groups: list[tuple[IncrementalDecoder, list[Row]]] = []

    def __len__(self) -> int:
        """Return the number of texts that are not complete."""
        return sum(not row.is_done for _, rows in self._groups for row in rows)

    @torch.no_grad()
    def join(self, prompts: Sequence[PromptBatch], rows: Sequence[Sequence[Row]]) -> None:
        """Add texts.

        Args:
            prompts: batches of one prompt each, made by :func:`blip2.decoding.conversation.make_prompt` for a
                decoder-only LLM.
            rows: the texts that continue each prompt, at least one.
        """
        if self._decoder_class is not CausalLMDecoder:
            self._groups += [
                (self._decoder_class(self._network, prompt), [row])
                for prompt, texts in zip(prompts, rows, strict=True)
                for row in texts
            ]
            return
        merged = merge_prompts(prompts, get_pad_token_id(self._network))
        copies = torch.tensor([i for i, texts in enumerate(rows) for _ in texts], device=merged.input_ids.device)
        new = CausalLMDecoder(self._network, merged)
        if len(copies) > len(prompts):
            new.select(copies)
        texts = [row for each in rows for row in each]
        if self._groups:
            decoder, running = self._groups[0]
            assert isinstance(decoder, CausalLMDecoder)
            decoder.join(new)
            running += texts
        else:
            self._groups.append((new, texts))

    @torch.no_grad()
    def choose(self) -> list[NewToken]:
        """Add the next token to each text. A text is complete if this is an end token or the last token allowed."""
        return [new for decoder, rows in self._groups for new in self._choose(decoder, rows)]

    def _choose(self, decoder: IncrementalDecoder, rows: list[Row]) -> list[NewToken]:
        device = decoder.logits.device
        eos = torch.tensor(self._eos, device=device)
        chosen: list[NewToken] = []
        indices = [i for i, row in enumerate(rows) if not row.is_done]
        # Texts of equal options and length are processed together.
        by_options = sorted(indices, key=lambda i: (hash(rows[i].decoding), len(rows[i].tokens)))
        for (decoding, length), group in groupby(by_options, lambda i: (rows[i].decoding, len(rows[i].tokens))):
            members = list(group)
            logits = decoder.logits[members]
            written = torch.tensor([rows[i].tokens for i in members], dtype=torch.long, device=device)
            written = written.view(len(members), length)
            scores = process_logits(logits, written, decoder.decoder_start_token_id, decoding, eos)
            if decoding.do_sample:
                uniforms = [rows[i].uniforms for i in members]
                assert all(each is not None for each in uniforms)
                tokens = sample_tokens(scores, decoding, torch.stack([each[length] for each in uniforms]))  # pyright: ignore
            else:
                tokens = scores.argmax(dim=-1)
            for i, token in zip(members, tokens.tolist(), strict=True):
                row = rows[i]
                row.tokens.append(token)
                if token in self._eos or len(row.tokens) == decoding.max_new_tokens:
                    row.is_done = True  # never False: another thread may have given the text up meanwhile
                chosen.append(self._describe(row, token, decoder.logits[i]))
        return chosen

    @staticmethod
    def _describe(row: Row, token: int, logits: Float[Tensor, "V"]) -> NewToken:
        if row.num_alternatives is None:
            return NewToken(row, token)
        log_probs = logits.log_softmax(dim=-1)
        best = log_probs.topk(min(row.num_alternatives, len(log_probs)))
        alternatives = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return NewToken(row, token, float(log_probs[token]), alternatives)

    @torch.no_grad()
    def advance(self) -> None:
        """Drop the texts that are done, and run the LLM over the last token of each of the others."""
        groups: list[tuple[IncrementalDecoder, list[Row]]] = []
        for decoder, rows in self._groups:
            kept = [i for i, row in enumerate(rows) if not row.is_done]
            if kept:
                device = decoder.logits.device
                tokens = torch.tensor([rows[i].tokens[-1] for i in kept], device=device)
                decoder.step(tokens, torch.tensor(kept, device=device))
                groups.append((decoder, [rows[i] for i in kept]))
        self._groups = groups


def merge_prompts(prompts: Sequence[PromptBatch], pad_token_id: int) -> PromptBatch:
    """Return batches of one prompt each as one batch.

    Args:
        prompts: the prompts; visual prompts become a part of the text.
        pad_token_id: the token in the place of visual prompts and padding.
    """
    embeds, ids = [], []
    for prompt in prompts:
        sequence, mask = prompt.inputs_embeds()
        num_visual = prompt.visual_prompts.shape[1]
        embeds.append(sequence[0, mask[0]])
        placeholder = prompt.input_ids.new_full((num_visual,), pad_token_id)
        ids.append(torch.cat([placeholder, prompt.input_ids[0]])[mask[0]])
    lengths = torch.tensor([len(each) for each in ids], device=ids[0].device)
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_token_id)
    text_embeds = pad_sequence(embeds, batch_first=True)
    return PromptBatch(
        visual_prompts=text_embeds[:, :0],
        text_embeds=text_embeds,
        input_ids=input_ids,
        attention_mask=torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None],
        image_index=torch.arange(len(ids), device=input_ids.device),
    )

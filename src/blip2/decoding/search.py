"""From a frozen LLM to whole texts: beam search, greedy search and nucleus sampling (paper §4.1, §4.2).

The texts are those of transformers' ``generate``; what differs is how much the LLM computes for them. It reads a prompt
once, not once a beam, and a soft visual prompt once a picture however many texts follow it. The keys and values that it
keeps of them are repeated for the beams. A prompt whose texts are settled leaves the batch.

Legend: I pictures, B prompts, N rows (a row is one text being written), Q queries, T text tokens, K beams, U new
tokens, L width of the LLM, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from blip2.decoding.kv_cache import (
    DecoderOnlyReader,
    EncoderDecoderReader,
    Prompts,
    Reader,
    Rereader,
    beside_embeddings,
)
from blip2.errors import InputError

UNWRITTEN = -1
"""In place of a token that a text does not have."""


@dataclass(frozen=True)
class Decoding:
    """How text is generated."""

    num_beams: int = 5
    """Beam width; 1 is greedy. Not used when sampling."""
    max_new_tokens: int = 30
    """Longest text, in tokens of the LLM."""
    min_new_tokens: int = 1
    """Shortest text, in tokens of the LLM."""
    length_penalty: float = 1.0
    """Beam scores are divided by length to this power: below 0 favors short texts (-1 for answers, §4.1)."""
    top_p: float | None = None
    """Nucleus sampling from the smallest set of tokens with this probability, instead of beam search."""
    temperature: float = 1.0
    """Of sampling."""
    repetition_penalty: float = 1.0
    """Above 1 discourages tokens that were written already (those of the prompt do not count)."""

    def __post_init__(self) -> None:
        for name, smallest in (("num_beams", 1), ("max_new_tokens", 1), ("min_new_tokens", 0)):
            if getattr(self, name) < smallest:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least {smallest}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}, expected a probability above 0")
        for name in ("temperature", "repetition_penalty"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected more than 0")

    def width(self, copies: int) -> int:
        """Beams that are needed for so many texts a prompt; 1 when sampling."""
        return 1 if self.top_p is not None else max(self.num_beams, copies)


Way = Callable[..., Tensor]
"""One of the ways in which an LLM writes, with the arguments of :func:`write`."""


@torch.no_grad()
def write(
    network: Any,
    prompts: Prompts,
    decoding: Decoding,
    ends: Sequence[int],
    copies: int = 1,
    dice: Float[Tensor, "N longest"] | None = None,
    kind: type[Reader] | None = None,
) -> Int[Tensor, "N U"]:
    """The continuation of each prompt, `copies` of each beside each other.

    Args:
        network: an LLM of which :func:`blip2.decoding.kv_cache.is_supported` holds.
        ends: ids of the tokens that end a text; the first of them pads the result.
        dice: of sampling: see :func:`draw`, one number a token; None: PyTorch's own random numbers.
        kind: of reader; None: the one that keeps keys and values.

    Returns:
        New tokens only; U is the length of the longest text, its end included.
    """
    reader = (kind or reader_of(network))(network, prompts)
    tokens = torch.tensor(ends, device=prompts.text.device)
    if decoding.width(copies) > 1:
        texts = beam_search(reader, decoding, tokens, copies)
    else:
        texts = follow(reader, decoding, tokens, copies, dice)
    longest = int((texts != UNWRITTEN).any(dim=0).sum())
    return texts[:, :longest].masked_fill(texts[:, :longest] == UNWRITTEN, ends[0])


def reader_of(network: Any) -> type[Reader]:
    """Return the reader that keeps keys and values of an LLM."""
    return EncoderDecoderReader if network.config.is_encoder_decoder else DecoderOnlyReader


write_again: Way = partial(write, kind=Rereader)
"""The same by an LLM that reads everything again for each token; much slower, and for any LLM that trains."""


@torch.no_grad()
def write_by_length(
    network: Any,
    prompts: Prompts,
    decoding: Decoding,
    ends: Sequence[int],
    copies: int = 1,
    dice: Float[Tensor, "N longest"] | None = None,
) -> Int[Tensor, "N U"]:
    """The same by transformers' own ``generate``, with prompts of one length at once, so that there is no padding."""
    lengths = prompts.mask.sum(dim=1)
    texts: list[Tensor] = [lengths] * len(lengths)
    for length in lengths.unique():
        which = (lengths == length).nonzero().squeeze(1)
        own = None if dice is None else dice.unflatten(0, (-1, copies))[which.to(dice.device)].flatten(0, 1)
        new = write_plainly(network, prompts.rows(which), decoding, ends, copies, own)
        for i, rows in zip(which.tolist(), new.split(copies), strict=True):
            texts[i] = rows
    longest = max(rows.shape[1] for rows in texts)
    return torch.cat([F.pad(rows, (0, longest - rows.shape[1]), value=ends[0]) for rows in texts])


@torch.no_grad()
def write_plainly(
    network: Any,
    prompts: Prompts,
    decoding: Decoding,
    ends: Sequence[int],
    copies: int = 1,
    dice: Float[Tensor, "N longest"] | None = None,
    also: Sequence[LogitsProcessor] = (),
) -> Int[Tensor, "N U"]:
    """The same by transformers' own ``generate``, which any LLM has; slower.

    Args:
        also: processors of its logits before all others.
    """
    inputs, seen = prompts.joined()
    beside = beside_embeddings(network, prompts.visual.shape[1], prompts.ids, inputs)
    if not network.config.is_encoder_decoder:
        # Padding goes before everything: what comes next is read off the last position.
        order = seen.long().argsort(dim=1, stable=True)
        inputs = inputs.gather(1, order[..., None].expand_as(inputs))
        seen = seen.gather(1, order)
        beside = {name: each.gather(1, order[..., None, None].expand_as(each)) for name, each in beside.items()}
    sampling, beams = decoding.top_p is not None, decoding.width(copies)
    settings = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=decoding.min_new_tokens,
        do_sample=sampling,
        num_beams=beams,
        top_p=decoding.top_p,
        top_k=0 if sampling else None,
        temperature=decoding.temperature if sampling else None,
        length_penalty=decoding.length_penalty if beams > 1 else None,
        num_return_sequences=copies,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
        decoder_start_token_id=network.generation_config.decoder_start_token_id,
    )
    # Not among the settings, where padding before the prompt would be taken for padding of the new tokens.
    processors = LogitsProcessorList(also)
    if decoding.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    if sampling and dice is not None:
        processors.append(DrawnTokens(dice, decoding))
    new = network.generate(
        inputs_embeds=inputs,
        attention_mask=seen.long(),
        **beside,
        generation_config=settings,
        logits_processor=processors,
    )
    return new[:, 1:] if network.config.is_encoder_decoder else new  # a decoder's text begins with its start token


# -- search --------------------------------------------------------------------------------------------------------


def beam_search(reader: Reader, decoding: Decoding, ends: Int[Tensor, "ends"], copies: int) -> Int[Tensor, "N U"]:
    """The best `copies` texts of each prompt among those that a beam meets.

    The score of a text of n tokens is log P / n ** length_penalty. A text is finished when it ends while it is among
    the K best. A prompt is settled when it has K finished texts and the best of those that go on, if it ended where it
    is, would not be among them; or when nothing that goes on can come before the `copies` best, for P only falls.
    """
    count, beams, longest = len(reader.logits), decoding.width(copies), decoding.max_new_tokens
    device = reader.logits.device
    prompts = torch.arange(count, device=device)  # those that are not settled: n of B
    texts = torch.full((count, 1, longest), UNWRITTEN, device=device)  # that go on: one a prompt, then K
    chances = torch.zeros(count, 1, device=device)  # log P of each
    finished = torch.full((count, beams, longest), UNWRITTEN, device=device)
    scores = torch.full((count, beams), -torch.inf, device=device)
    settled = finished.clone()
    for step in range(longest):
        n, k, _ = texts.shape
        new = adjust(reader.logits.log_softmax(dim=-1), texts.flatten(0, 1)[:, :step], reader.start, decoding, ends)
        totals = (chances[..., None] + new.view(n, k, -1)).flatten(1)  # [n, k * V]
        # So many that K of them go on whatever ends.
        totals, best = totals.topk(min((1 + len(ends)) * beams, totals.shape[1]))
        parents, tokens = best // new.shape[1], best % new.shape[1]
        candidates = pick(texts, parents)
        candidates[:, :, step] = tokens
        ended = torch.isin(tokens, ends) if step + 1 < longest else torch.ones_like(tokens, dtype=torch.bool)

        length = (step + 1) ** decoding.length_penalty
        ending = (totals / length).masked_fill(~ended, -torch.inf)[:, :beams]
        scores, order = torch.cat([scores, ending], dim=1).topk(beams)
        finished = pick(torch.cat([finished, candidates[:, :beams]], dim=1), order)

        chances, order = totals.masked_fill(ended, -torch.inf).topk(min(beams, totals.shape[1]))
        texts, parents = pick(candidates, order), pick(parents, order)
        longer = max((step + 2) ** decoding.length_penalty, longest**decoding.length_penalty)
        goes_on = chances[:, 0] / length > scores[:, -1]
        goes_on &= chances[:, 0] / longer >= scores[:, copies - 1]
        settled[prompts[~goes_on]] = finished[~goes_on]
        if not goes_on.any():
            break
        rows = (parents + k * torch.arange(n, device=device)[:, None])[goes_on].flatten()
        prompts, texts, chances, finished, scores = (
            kept[goes_on] for kept in (prompts, texts, chances, finished, scores)
        )
        reader.read(texts[:, :, step].flatten(), rows)
    return settled[:, :copies].flatten(0, 1)


def follow(
    reader: Reader,
    decoding: Decoding,
    ends: Int[Tensor, "ends"],
    copies: int,
    dice: Float[Tensor, "N longest"] | None = None,
) -> Int[Tensor, "N U"]:
    """Texts written token by token: the likeliest each time, or one drawn from the nucleus."""
    device = reader.logits.device
    rows = torch.arange(len(reader.logits), device=device).repeat_interleave(copies)  # of the reader, for each text
    texts = torch.full((len(rows), decoding.max_new_tokens), UNWRITTEN, device=device)
    live = torch.arange(len(rows), device=device)  # texts that go on
    for step in range(decoding.max_new_tokens):
        scores = adjust(reader.logits[rows], texts[live, :step], reader.start, decoding, ends)
        if decoding.top_p is None:
            tokens = scores.argmax(dim=-1)
        else:
            die = None if dice is None else dice[live.to(dice.device), step]
            tokens = draw(scores, decoding.top_p, decoding.temperature, die)
        texts[live, step] = tokens
        goes_on = ~torch.isin(tokens, ends)
        if step + 1 == decoding.max_new_tokens or not goes_on.any():
            break
        live = live[goes_on]
        reader.read(tokens[goes_on], rows[goes_on])
        rows = torch.arange(len(live), device=device)
    return texts


def adjust(
    scores: Float[Tensor, "N V"],
    written: Int[Tensor, "N U"],
    start: int | None,
    decoding: Decoding,
    ends: Int[Tensor, "ends"],
) -> Float[Tensor, "N V"]:
    """Scores of the next token with what a :class:`Decoding` says of repetitions and of the shortest text."""
    if decoding.repetition_penalty != 1:
        # As in transformers the start of a decoder's text is one of its tokens.
        before = written if start is None else torch.cat([written.new_full((len(written), 1), start), written], dim=1)
        old = scores.gather(1, before)
        new = torch.where(old < 0, old * decoding.repetition_penalty, old / decoding.repetition_penalty)
        scores = scores.scatter(1, before, new)
    if written.shape[1] < decoding.min_new_tokens:
        tokens = torch.arange(scores.shape[1], device=scores.device)
        scores = scores.masked_fill(torch.isin(tokens, ends), -torch.inf)
    return scores


def draw(
    scores: Float[Tensor, "N V"], top_p: float, temperature: float, die: Float[Tensor, "N"] | None = None
) -> Int[Tensor, "N"]:
    """A token of each row, from the smallest set of the likeliest that together have probability `top_p`.

    Args:
        die: a number in [0, 1) a row, which decides what is drawn, whatever the other rows are: the tokens of the set
            stand beside each other from the likeliest on, each as wide as it is likely, and that is where one is
            taken. None: PyTorch's own random numbers.
    """
    chances, order = (scores / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    likelier = chances.cumsum(dim=-1) - chances  # all that come before
    chances = chances.masked_fill(likelier >= top_p, 0.0)
    if die is None:
        drawn = torch.multinomial(chances, 1)
    else:
        sums = chances.double().cumsum(dim=-1)
        place = die.to(sums.device, torch.float64)[:, None] * sums[:, -1:]
        # Rounded up to the sum itself it would be behind the last.
        drawn = torch.minimum(torch.searchsorted(sums, place, right=True), (chances > 0).sum(dim=-1, keepdim=True) - 1)
    return order.gather(1, drawn).squeeze(1)


class DrawnTokens(LogitsProcessor):
    """Has transformers' ``generate`` sample the tokens that :func:`draw` gives: it leaves no others."""

    def __init__(self, dice: Float[Tensor, "N longest"], decoding: Decoding) -> None:
        self._dice, self._decoding = dice, decoding
        self._step = 0

    def __call__(self, input_ids: Int[Tensor, "N T"], scores: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        assert self._decoding.top_p is not None
        tokens = draw(scores, self._decoding.top_p, self._decoding.temperature, self._dice[:, self._step])
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def pick(rows: Tensor, which: Int[Tensor, "n k"]) -> Tensor:
    """``rows[i, which[i, j]]`` at [i, j]."""
    return rows[torch.arange(len(rows), device=rows.device)[:, None], which]

"""Generate text with a frozen LLM: beam search, greedy search and nucleus sampling (paper §4.1, §4.2).

The sequences are those of transformers' ``generate``, with less computation: a prompt is computed once instead of once
per beam, a soft visual prompt is computed once even if several prompts begin with it, and a prompt whose sequences are
complete leaves the batch.

Shapes: I images, B prompts, n prompts whose search is not done, N rows (each row is one sequence), T text tokens, K
beams, k candidates, U new tokens, L width of the LLM, V vocabulary, eos number of tokens that end a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
)

from blip2.decoding.kv_cache import (
    CachedDecoder,
    CausalLMDecoder,
    IncrementalDecoder,
    PromptBatch,
    Seq2SeqLMDecoder,
    UncachedDecoder,
    per_layer_inputs,
)
from blip2.decoding.options import Decoding

PAD = -1
"""Placeholder for the tokens after the end of a sequence."""


GenerateFn = Callable[..., Tensor]
"""One of the functions below that generate text, with the arguments of :func:`generate`."""


@torch.no_grad()
def generate(
    network: Any,
    prompts: PromptBatch,
    decoding: Decoding,
    eos_token_ids: Sequence[int],
    num_return_sequences: int = 1,
    uniforms: Float[Tensor, "N max_new_tokens"] | None = None,
    stopping_criteria: StoppingCriteria | None = None,
    decoder_class: type[IncrementalDecoder] | None = None,
) -> Int[Tensor, "N U"]:
    """Generate continuations of prompts.

    Args:
        network: an LLM for which :func:`blip2.decoding.kv_cache.supports_kv_cache` is true.
        prompts: the prompts.
        decoding: how to generate.
        eos_token_ids: tokens that end a sequence; the first of them pads the result.
        num_return_sequences: number of sequences per prompt (N = B * num_return_sequences).
        uniforms: random numbers in [0, 1) for sampling, one per token of each sequence; see :func:`sample_top_p`. None:
            the numbers are drawn from PyTorch's generator.
        stopping_criteria: says after which new tokens a sequence ends, besides `eos_token_ids`: for
            ``decoding.stop_strings``, transformers' ``StopStringCriteria`` with the LLM's tokenizer. None: after no
            others.
        decoder_class: the class that runs the LLM. None: the class with a key-value cache.

    Returns:
        Token ids of the new tokens, without the prompts. The sequences of a prompt are in consecutive rows. U is the
        length of the longest sequence, including the token that ends it.
    """
    decoder = (decoder_class or cached_decoder_class(network))(network, prompts)
    return search(decoder, decoding, eos_token_ids, num_return_sequences, uniforms, stopping_criteria)


def search(
    decoder: IncrementalDecoder,
    decoding: Decoding,
    eos_token_ids: Sequence[int],
    num_return_sequences: int = 1,
    uniforms: Float[Tensor, "N max_new_tokens"] | None = None,
    stopping_criteria: StoppingCriteria | None = None,
) -> Int[Tensor, "N U"]:
    """Generate with a decoder that has processed the prompts, one per row; see :func:`generate`."""
    eos = torch.tensor(eos_token_ids, device=decoder.logits.device)
    if decoding.beam_width(num_return_sequences) > 1:
        sequences = beam_search(decoder, decoding, eos, num_return_sequences, stopping_criteria)
    else:
        sequences = sample(decoder, decoding, eos, num_return_sequences, uniforms, stopping_criteria)
    max_length = int((sequences != PAD).any(dim=0).sum())
    return sequences[:, :max_length].masked_fill(sequences[:, :max_length] == PAD, eos_token_ids[0])


def cached_decoder_class(network: Any) -> type[CachedDecoder]:
    """Return the class that runs an LLM with a key-value cache."""
    return Seq2SeqLMDecoder if network.config.is_encoder_decoder else CausalLMDecoder


def generate_without_cache(
    network: Any,
    prompts: PromptBatch,
    decoding: Decoding,
    eos_token_ids: Sequence[int],
    num_return_sequences: int = 1,
    uniforms: Float[Tensor, "N max_new_tokens"] | None = None,
    stopping_criteria: StoppingCriteria | None = None,
) -> Int[Tensor, "N U"]:
    """Like :func:`generate`, but compute the whole sequence for each new token: much slower, works with every LLM."""
    return generate(
        network, prompts, decoding, eos_token_ids, num_return_sequences, uniforms, stopping_criteria, UncachedDecoder
    )


@torch.no_grad()
def generate_by_length(
    network: Any,
    prompts: PromptBatch,
    decoding: Decoding,
    eos_token_ids: Sequence[int],
    num_return_sequences: int = 1,
    uniforms: Float[Tensor, "N max_new_tokens"] | None = None,
    stopping_criteria: StoppingCriteria | None = None,
) -> Int[Tensor, "N U"]:
    """Like :func:`generate_with_transformers`, but with a batch for each prompt length, so that there is no padding."""
    lengths = prompts.attention_mask.sum(dim=1)
    sequences: list[Tensor] = [lengths] * len(lengths)
    for length in lengths.unique():
        rows = (lengths == length).nonzero().squeeze(1)
        row_uniforms = None
        if uniforms is not None:
            row_uniforms = uniforms.unflatten(0, (-1, num_return_sequences))[rows.to(uniforms.device)].flatten(0, 1)
        new = generate_with_transformers(
            network, prompts.select(rows), decoding, eos_token_ids, num_return_sequences, row_uniforms,
            stopping_criteria,
        )  # fmt: skip
        for i, tokens in zip(rows.tolist(), new.split(num_return_sequences), strict=True):
            sequences[i] = tokens
    max_length = max(tokens.shape[1] for tokens in sequences)
    return torch.cat([F.pad(tokens, (0, max_length - tokens.shape[1]), value=eos_token_ids[0]) for tokens in sequences])


@torch.no_grad()
def generate_with_transformers(
    network: Any,
    prompts: PromptBatch,
    decoding: Decoding,
    eos_token_ids: Sequence[int],
    num_return_sequences: int = 1,
    uniforms: Float[Tensor, "N max_new_tokens"] | None = None,
    stopping_criteria: StoppingCriteria | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
) -> Int[Tensor, "N U"]:
    """Like :func:`generate`, but call transformers' own ``generate``: slower, works with most LLMs.

    Args:
        logits_processors: processors that are applied before the processors for the options in `decoding`.
    """
    inputs_embeds, mask = prompts.inputs_embeds()
    extra = per_layer_inputs(network, prompts.visual_prompts.shape[1], prompts.input_ids, inputs_embeds)
    if not network.config.is_encoder_decoder:
        # Padding goes to the left: the next token is predicted at the last position.
        order = mask.long().argsort(dim=1, stable=True)
        inputs_embeds = inputs_embeds.gather(1, order[..., None].expand_as(inputs_embeds))
        mask = mask.gather(1, order)
        extra = {name: each.gather(1, order[..., None, None].expand_as(each)) for name, each in extra.items()}
    do_sample, num_beams = decoding.do_sample, decoding.beam_width(num_return_sequences)
    generation_config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=decoding.min_new_tokens,
        do_sample=do_sample,
        num_beams=num_beams,
        top_p=decoding.top_p,
        top_k=(decoding.top_k or 0) if do_sample else None,
        min_p=decoding.min_p,
        temperature=decoding.temperature if do_sample else None,
        length_penalty=decoding.length_penalty if num_beams > 1 else None,
        num_return_sequences=num_return_sequences,
        eos_token_id=list(eos_token_ids),
        pad_token_id=eos_token_ids[0],
        decoder_start_token_id=network.generation_config.decoder_start_token_id,
    )
    # The penalty is not in the GenerationConfig, because transformers would then exempt the first new tokens, one for
    # each padding token of the prompt.
    processors = LogitsProcessorList(logits_processors)
    if decoding.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    if decoding.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size))
    if do_sample and uniforms is not None:
        processors.append(SampledTokenLogitsProcessor(uniforms, decoding))
    new = network.generate(
        inputs_embeds=inputs_embeds,
        attention_mask=mask.long(),
        **extra,
        generation_config=generation_config,
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([] if stopping_criteria is None else [stopping_criteria]),
    )
    return new[:, 1:] if network.config.is_encoder_decoder else new  # without decoder_start_token_id


# -- search --------------------------------------------------------------------------------------------------------


def beam_search(
    decoder: IncrementalDecoder,
    decoding: Decoding,
    eos_token_ids: Int[Tensor, "eos"],
    num_return_sequences: int,
    stopping_criteria: StoppingCriteria | None = None,
) -> Int[Tensor, "N U"]:
    """Return the best sequences of each prompt that beam search finds.

    The score of a sequence with U tokens and probability P is log P / U ** length_penalty. A sequence that ends is
    finished if it is among the K most probable candidates of its step. The search for a prompt stops in either case:

    - The prompt has K finished sequences, and the most probable active sequence would not be among the K best if it
      ended now.
    - No active sequence can still become one of the best `num_return_sequences`, because P only decreases.

    Args:
        decoder: the LLM after the prompts; one row per prompt.
        decoding: number of beams, maximum length, length penalty and repetition penalty.
        eos_token_ids: tokens that end a sequence.
        num_return_sequences: number of sequences to return per prompt, at most K.
        stopping_criteria: says which other sequences end; see :func:`generate`.

    Returns:
        The sequences of a prompt in consecutive rows, best first. :data:`PAD` follows the end of a sequence.
    """
    batch_size, max_length = len(decoder.logits), decoding.max_new_tokens
    num_beams, device = decoding.beam_width(num_return_sequences), decoder.logits.device
    prompts = torch.arange(batch_size, device=device)  # the n of B prompts that are not done
    sequences = torch.full((batch_size, 1, max_length), PAD, device=device)  # active: 1 per prompt at first, then K
    log_probs = torch.zeros(batch_size, 1, device=device)
    finished = torch.full((batch_size, num_beams, max_length), PAD, device=device)
    scores = torch.full((batch_size, num_beams), -torch.inf, device=device)
    done = finished.clone()
    for step in range(max_length):
        n, k, _ = sequences.shape
        generated = sequences.flatten(0, 1)[:, :step]
        token_log_probs = process_logits(
            decoder.logits.log_softmax(dim=-1), generated, decoder.decoder_start_token_id, decoding, eos_token_ids
        )
        vocab_size = token_log_probs.shape[1]
        totals = (log_probs[..., None] + token_log_probs.view(n, k, -1)).flatten(1)  # [n, k * V]
        # Enough candidates that K of them are active, even if all tokens that end a sequence are among them.
        totals, best = totals.topk(min((1 + len(eos_token_ids)) * num_beams, totals.shape[1]))
        parents, tokens = best // vocab_size, best % vocab_size
        candidates = gather_beams(sequences, parents)
        candidates[:, :, step] = tokens
        is_last = step + 1 == max_length
        ended = torch.ones_like(tokens, dtype=torch.bool) if is_last else torch.isin(tokens, eos_token_ids)
        if stopping_criteria is not None:
            ended |= stops(stopping_criteria, candidates.flatten(0, 1)[:, : step + 1]).view_as(ended)

        penalty = (step + 1) ** decoding.length_penalty
        ended_scores = (totals / penalty).masked_fill(~ended, -torch.inf)[:, :num_beams]
        scores, order = torch.cat([scores, ended_scores], dim=1).topk(num_beams)
        finished = gather_beams(torch.cat([finished, candidates[:, :num_beams]], dim=1), order)

        log_probs, order = totals.masked_fill(ended, -torch.inf).topk(min(num_beams, totals.shape[1]))
        sequences, parents = gather_beams(candidates, order), gather_beams(parents, order)
        max_penalty = max((step + 2) ** decoding.length_penalty, max_length**decoding.length_penalty)
        active = log_probs[:, 0] / penalty > scores[:, -1]
        active &= log_probs[:, 0] / max_penalty >= scores[:, num_return_sequences - 1]
        done[prompts[~active]] = finished[~active]
        if not active.any():
            break
        rows = (parents + k * torch.arange(n, device=device)[:, None])[active].flatten()
        prompts, sequences, log_probs, finished, scores = (
            each[active] for each in (prompts, sequences, log_probs, finished, scores)
        )
        decoder.step(sequences[:, :, step].flatten(), rows)
    return done[:, :num_return_sequences].flatten(0, 1)


def sample(
    decoder: IncrementalDecoder,
    decoding: Decoding,
    eos_token_ids: Int[Tensor, "eos"],
    num_return_sequences: int,
    uniforms: Float[Tensor, "N max_new_tokens"] | None = None,
    stopping_criteria: StoppingCriteria | None = None,
) -> Int[Tensor, "N U"]:
    """Generate sequences token by token, by greedy search or by sampling if ``decoding.do_sample``.

    See :func:`generate` for the arguments. `decoder` has one row per prompt.

    Returns:
        The sequences of a prompt in consecutive rows. :data:`PAD` follows the end of a sequence.
    """
    steps = sample_steps(decoder, decoding, eos_token_ids, num_return_sequences, uniforms, stopping_criteria)
    *_, sequences = steps
    return sequences


def sample_steps(
    decoder: IncrementalDecoder,
    decoding: Decoding,
    eos_token_ids: Int[Tensor, "eos"],
    num_return_sequences: int = 1,
    uniforms: Float[Tensor, "N max_new_tokens"] | None = None,
    stopping_criteria: StoppingCriteria | None = None,
) -> Iterator[Int[Tensor, "N max_new_tokens"]]:
    """Like :func:`sample`, but yield the sequences after each token. The same tensor is yielded each time."""
    device = decoder.logits.device
    rows = torch.arange(len(decoder.logits), device=device).repeat_interleave(num_return_sequences)  # decoder rows
    sequences = torch.full((len(rows), decoding.max_new_tokens), PAD, device=device)
    active = torch.arange(len(rows), device=device)  # sequences that have not ended
    for step in range(decoding.max_new_tokens):
        scores = process_logits(
            decoder.logits[rows], sequences[active, :step], decoder.decoder_start_token_id, decoding, eos_token_ids
        )
        if not decoding.do_sample:
            tokens = scores.argmax(dim=-1)
        else:
            step_uniforms = None if uniforms is None else uniforms[active.to(uniforms.device), step]
            tokens = sample_tokens(scores, decoding, step_uniforms)
        sequences[active, step] = tokens
        continues = ~torch.isin(tokens, eos_token_ids)
        if stopping_criteria is not None:
            continues &= ~stops(stopping_criteria, sequences[active, : step + 1])
        yield sequences
        if step + 1 == decoding.max_new_tokens or not continues.any():
            return
        active = active[continues]
        decoder.step(tokens[continues], rows[continues])
        rows = torch.arange(len(active), device=device)


def stops(stopping_criteria: StoppingCriteria, sequences: Int[Tensor, "N U"]) -> Bool[Tensor, "N"]:
    """Return whether each sequence of new tokens ends."""
    return stopping_criteria(sequences, None).to(sequences.device)  # pyright: ignore[reportArgumentType]


def process_logits(
    logits: Float[Tensor, "N V"],
    generated: Int[Tensor, "N U"],
    decoder_start_token_id: int | None,
    decoding: Decoding,
    eos_token_ids: Int[Tensor, "eos"],
) -> Float[Tensor, "N V"]:
    """Apply repetition penalty, n-gram limit and minimum length to the logits or log-probabilities of the next token.

    Args:
        logits: logits or log-probabilities of each row.
        generated: the tokens that were generated so far.
        decoder_start_token_id: the token before `generated`, for an encoder-decoder.
        decoding: repetition penalty, n-gram limit and minimum length.
        eos_token_ids: tokens that end a sequence, which get -inf until the minimum length is reached.
    """
    # As in transformers, decoder_start_token_id counts as a generated token.
    start = [] if decoder_start_token_id is None else [generated.new_full((len(generated), 1), decoder_start_token_id)]
    generated_ids = torch.cat([*start, generated], dim=1)
    if decoding.repetition_penalty != 1:
        old = logits.gather(1, generated_ids)
        new = torch.where(old < 0, old * decoding.repetition_penalty, old / decoding.repetition_penalty)
        logits = logits.scatter(1, generated_ids, new)
    if decoding.no_repeat_ngram_size:
        ids: Any = generated_ids
        logits = NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size)(ids, logits)
    if generated.shape[1] < decoding.min_new_tokens:
        tokens = torch.arange(logits.shape[1], device=logits.device)
        logits = logits.masked_fill(torch.isin(tokens, eos_token_ids), -torch.inf)
    return logits


def sample_tokens(
    logits: Float[Tensor, "N V"], decoding: Decoding, uniforms: Float[Tensor, "N"] | None = None
) -> Int[Tensor, "N"]:
    """Sample a token for each row with the options ``temperature``, ``top_k``, ``top_p`` and ``min_p`` of `decoding`.

    As in transformers, the limits are applied in this order. See :func:`sample_top_p` for `uniforms`.
    """
    if decoding.top_k is not None:
        no_ids: Any = None
        logits = TopKLogitsWarper(decoding.top_k)(no_ids, logits)
    top_p = 1.0 if decoding.top_p is None else decoding.top_p
    return sample_top_p(logits, top_p, decoding.temperature, uniforms, decoding.min_p)


def sample_top_p(
    logits: Float[Tensor, "N V"],
    top_p: float,
    temperature: float,
    uniforms: Float[Tensor, "N"] | None = None,
    min_p: float | None = None,
) -> Int[Tensor, "N"]:
    """Sample a token for each row from the smallest set of tokens with total probability `top_p` (the nucleus).

    Args:
        logits: logits or log-probabilities.
        top_p: total probability of the nucleus, in (0, 1].
        temperature: divisor of the logits, above 0.
        uniforms: a random number in [0, 1) for each row, which determines the token of the row independently of the
            other rows: it is the point at which the cumulative distribution of the nucleus, most likely token first, is
            inverted. None: the numbers are drawn from PyTorch's generator.
        min_p: share of the probability of the most likely token, in [0, 1]; tokens of the nucleus with a smaller
            probability are left out. None: none is left out.
    """
    probs, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    preceding = probs.cumsum(dim=-1) - probs
    probs = probs.masked_fill(preceding >= top_p, 0.0)
    if min_p is not None:
        probs = probs.masked_fill(probs < min_p * probs[:, :1], 0.0)
    if uniforms is None:
        sampled = torch.multinomial(probs, 1)
    else:
        cumulative = probs.double().cumsum(dim=-1)
        target = uniforms.to(cumulative.device, torch.float64)[:, None] * cumulative[:, -1:]
        # If the product is rounded up to the total, searchsorted returns the index after the last token.
        last = (probs > 0).sum(dim=-1, keepdim=True) - 1
        sampled = torch.minimum(torch.searchsorted(cumulative, target, right=True), last)
    return order.gather(1, sampled).squeeze(1)


class SampledTokenLogitsProcessor(LogitsProcessor):
    """A logits processor that makes transformers' ``generate`` sample with given random numbers.

    For each row, the processor samples a token with :func:`sample_tokens` and excludes all other tokens.

    Args:
        uniforms: random numbers in [0, 1), one for each token of each sequence.
        decoding: the options of sampling.
    """

    def __init__(self, uniforms: Float[Tensor, "N max_new_tokens"], decoding: Decoding) -> None:
        self._uniforms, self._decoding = uniforms, decoding
        self._step = 0

    def __call__(self, input_ids: Int[Tensor, "N T"], scores: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        tokens = sample_tokens(scores, self._decoding, self._uniforms[:, self._step])
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def gather_beams(values: Tensor, beams: Int[Tensor, "n k"]) -> Tensor:
    """Return a tensor whose element [i, j] is ``values[i, beams[i, j]]``."""
    return values[torch.arange(len(values), device=values.device)[:, None], beams]

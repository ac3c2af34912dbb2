"""Run an LLM on a few tokens when it is loaded, so that an unsupported LLM fails at once and not during a run.

LLMs differ in the inputs that they accept (embeddings, attention mask, positions) and in what they cache (keys and
values, recurrent states), and a list of the supported model types would never be complete. So each LLM is run for about
ten short passes, on the device and in the data type in which it is used. After the same tokens, the predictions of the
LLM have to be the same in every use:

- training: sequences of different lengths in a batch, after a soft visual prompt that is given as embeddings;
- a single sequence given entirely as tokens;
- generation: token by token, prompts of different lengths in a batch, with beams.

The functions of :mod:`blip2.decoding.search` that generate text are tried from the fastest to the slowest, and the
first one that agrees with training is used.

Shapes: B prompts, N rows (a prompt with one of two continuations), n some of these rows, T text tokens, U tokens of a
continuation, Q visual prompt tokens, L width of the LLM, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from blip2.backbones.pretrained import short_message
from blip2.decoding.kv_cache import (
    IncrementalDecoder,
    PromptBatch,
    UncachedDecoder,
    forward_without_cache,
    get_pad_token_id,
    has_per_layer_embeddings,
    supports_kv_cache,
    text_config,
)
from blip2.decoding.search import (
    Decoding,
    GenerateFn,
    cached_decoder_class,
    generate,
    generate_by_length,
    generate_with_transformers,
    generate_without_cache,
)
from blip2.errors import InputError
from blip2.model.losses import IGNORE_INDEX

NUM_VISUAL_TOKENS, NUM_NEW_TOKENS = 3, 3
"""Length of the visual prompt, and number of predicted tokens."""
TEXT_LENGTHS = (0, 4)
"""Number of text tokens of each prompt."""
TOLERANCES = {torch.float32: (0.01, 4e-6), torch.float16: (0.05, 2e-3), torch.bfloat16: (0.15, 0.015)}
"""Allowed difference between two results by data type: as a share of the difference between rows, plus a share of the
size of the log-probabilities (see :meth:`Probe.agrees`)."""

TrainingForward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Maps visual prompts, token ids, attention mask and labels to the logits of the labels, as in training."""


@dataclass(frozen=True)
class Probe:
    """Input for checking that an LLM generates as it was trained: two prompts, the same two continuations for each, and
    the log-probabilities of the training forward pass."""

    network: Any
    visual_ids: Int[Tensor, "1 Q"]
    """Tokens whose embeddings are the visual prompt."""
    prompts: PromptBatch
    continuations: Int[Tensor, "2 U"]
    expected: Float[Tensor, "N U V"] = field(default_factory=lambda: torch.empty(0))
    """Log-probabilities in training, for each token of a continuation. The rows are: first prompt with first
    continuation, first prompt with second continuation, second prompt with first continuation, second with second."""

    def agrees(self, logits: Float[Tensor, "n V"], rows: Sequence[int], step: int) -> bool:
        """Return whether logits agree with those of training.

        Args:
            logits: logits of one token for some of the rows.
            rows: the indices of these rows in `expected`.
            step: the index of the token in the continuation.
        """
        expected = self.expected[list(rows), step]
        variation = _rms(self.expected - self.expected.mean(dim=(0, 1)))
        size = _rms(self.expected - self.expected.mean(dim=-1, keepdim=True))
        dtype = torch.bfloat16 if getattr(self.network, "is_quantized", False) else self.network.dtype
        rtol, atol = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])
        return bool(_rms(_log_softmax(logits) - expected) <= rtol * variation + atol * size)


def select_generate_fn(network: Any, training_forward: TrainingForward) -> GenerateFn:
    """Return the fastest function for text generation with which an LLM predicts the same as in training.

    Args:
        network: an LLM in evaluation mode.
        training_forward: the forward pass of the LLM in training.

    Raises:
        InputError: the LLM cannot be trained with a soft visual prompt, or cannot generate text after one.
    """
    probe = _make_probe(network, training_forward)
    logits = _forward_single(probe, NUM_NEW_TOKENS)
    if not all(probe.agrees(logits[step, None], [0], step) for step in range(NUM_NEW_TOKENS)):
        shorter = _forward_single(probe, 1)
        if not network.config.is_encoder_decoder and not torch.allclose(shorter[0], logits[0], atol=1e-2, rtol=1e-2):
            raise _unsupported(network, "its predictions depend on tokens that come later: it is an encoder")
        raise _unsupported(
            network,
            "its predictions for a sequence that is given as tokens differ from those for the embeddings of the same"
            " tokens in a batch",
        )
    reason = "its predictions during generation differ from those in training"
    candidates: list[tuple[GenerateFn, Callable[[], bool]]] = [
        (generate_with_transformers, lambda: _agrees_with_transformers(probe, (0, 1))),
        (generate_by_length, lambda: all(_agrees_with_transformers(probe, (row,)) for row in (0, 1))),
        (generate_without_cache, lambda: _agrees_step_by_step(probe, UncachedDecoder)),
    ]
    if supports_kv_cache(network):
        candidates.insert(0, (generate, lambda: _agrees_step_by_step(probe, cached_decoder_class(network))))
    for generate_fn, agrees in candidates:
        try:
            if agrees():
                return generate_fn
        except Exception as error:  # LLMs raise any type of error for what they do not support
            reason = _describe(error)
    raise _unsupported(network, reason)


@torch.no_grad()
def scores_continuations(network: Any, training_forward: TrainingForward) -> bool:
    """Return whether an LLM predicts the same as in training for continuations of prompts that were computed before.

    The keys and values of each prompt are then shared by all texts that continue it, which saves most of the work of
    comparing many texts.

    Args:
        network: an LLM in evaluation mode that generates with a key-value cache (:func:`select_generate_fn`).
        training_forward: the forward pass of the LLM in training.
    """
    probe = _make_probe(network, training_forward)
    tokens = probe.continuations[:, :-1].repeat(len(TEXT_LENGTHS), 1)
    rows = torch.arange(len(TEXT_LENGTHS), device=tokens.device).repeat_interleave(len(probe.continuations))
    try:
        decoder = cached_decoder_class(network)(network, probe.prompts)
        logits = decoder.extend(tokens, torch.ones_like(tokens, dtype=torch.bool), rows)
    except Exception:  # LLMs raise any type of error for what they do not support
        return False
    return all(probe.agrees(logits[:, step - 1], range(len(rows)), step) for step in range(1, NUM_NEW_TOKENS))


def check_gradient(network: Any, training_forward: TrainingForward) -> None:
    """Check that an LLM propagates a gradient to the visual prompt.

    Args:
        network: an LLM in evaluation mode.
        training_forward: the forward pass of the LLM in training.

    Raises:
        InputError: there is no gradient, or it is zero or not finite.
    """
    probe = _make_probe(network, training_forward)
    ids, mask, labels = _training_inputs(probe)
    visual = probe.prompts.visual_prompts.expand(len(ids), -1, -1).clone().requires_grad_()
    try:
        with torch.enable_grad():
            loss = _log_softmax(training_forward(visual, ids, mask, labels)).square().mean()
            (gradient,) = torch.autograd.grad(loss, visual)
    except Exception as error:
        raise _unsupported(network, f"no gradient goes through it: {_describe(error)}") from error
    if not gradient.isfinite().all() or not gradient.flatten(1).any(dim=1).all():
        raise _unsupported(network, "its gradient for the visual prompt is zero or not finite")


def _make_probe(network: Any, training_forward: TrainingForward) -> Probe:
    num_text_tokens = sum(TEXT_LENGTHS)
    tokens = _regular_tokens(network, NUM_VISUAL_TOKENS + num_text_tokens + 2 * NUM_NEW_TOKENS)
    device = network.get_input_embeddings().weight.device
    visual_ids, text, first, second = torch.tensor(tokens, device=device).split(
        [NUM_VISUAL_TOKENS, num_text_tokens, NUM_NEW_TOKENS, NUM_NEW_TOKENS]
    )
    ids = torch.stack([text, text])
    mask = torch.arange(max(TEXT_LENGTHS), device=device) < torch.tensor(TEXT_LENGTHS, device=device)[:, None]
    try:
        embed = network.get_input_embeddings()
        if has_per_layer_embeddings(network):
            visual_ids = torch.full_like(visual_ids, get_pad_token_id(network))  # as in per_layer_inputs
        prompts = PromptBatch(embed(visual_ids[None]), embed(ids), ids, mask, torch.zeros_like(ids[:, 0]))
        probe = Probe(network, visual_ids[None], prompts, torch.stack([first, second]))
        inputs = _training_inputs(probe)
        num_rows = len(inputs[0])
        with torch.no_grad():
            logits = training_forward(prompts.visual_prompts.expand(num_rows, -1, -1), *inputs)
    except InputError:
        raise
    except Exception as error:
        raise _unsupported(network, _describe(error)) from error
    if not logits.isfinite().any() or logits.isnan().any():
        raise _unsupported(
            network, "its logits are not finite: its weights are damaged, or need another language.dtype"
        )
    return replace(probe, expected=_log_softmax(logits).unflatten(0, (num_rows, -1)))


def _training_inputs(probe: Probe) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids, attention mask and labels of each prompt with each continuation."""
    rows, labels = [], []
    is_encoder_decoder = probe.network.config.is_encoder_decoder
    for i, length in enumerate(TEXT_LENGTHS):
        prompt = probe.prompts.input_ids[i, :length]
        for continuation in probe.continuations:
            rows.append(prompt if is_encoder_decoder else torch.cat([prompt, continuation]))
            ignored = torch.full_like(prompt, IGNORE_INDEX)
            labels.append(continuation if is_encoder_decoder else torch.cat([ignored, continuation]))
    pad_token_id = get_pad_token_id(probe.network)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return ids, mask, torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)


def _regular_tokens(network: Any, count: int) -> list[int]:
    """Return `count` tokens, evenly spread over the vocabulary, that are not special tokens of the LLM's config."""
    special: set[int] = set()
    for config in (network.config, text_config(network.config)):
        for name, value in config.to_dict().items():
            if name.endswith(("token_id", "token_index", "_ids")):
                special |= {each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)}
    vocab_size = network.get_input_embeddings().weight.shape[0]
    regular = [token for token in range(vocab_size) if token not in special] or [0]
    return [regular[(len(regular) * (2 * i + 1)) // (2 * count)] for i in range(count)]


# -- the uses that are compared with training --------------------------------------------------------------------------


@torch.no_grad()
def _forward_single(probe: Probe, count: int) -> Float[Tensor, "U V"]:
    """Return the logits of the first `count` tokens of the first continuation, after the visual prompt alone.

    The visual prompt is given as token ids instead of embeddings.
    """
    network, previous = probe.network, probe.continuations[:1, : count - 1]
    kwargs: dict[str, Any] = {"input_ids": probe.visual_ids}
    if network.config.is_encoder_decoder:
        start = torch.full_like(probe.continuations[:1, :1], network.generation_config.decoder_start_token_id)
        kwargs["decoder_input_ids"] = torch.cat([start, previous], dim=1)
    else:
        kwargs["input_ids"] = torch.cat([probe.visual_ids, previous], dim=1)
    kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
    try:
        return forward_without_cache(network, **kwargs)[0, -count:]
    except Exception as error:
        raise _unsupported(network, _describe(error)) from error


@torch.no_grad()
def _agrees_step_by_step(probe: Probe, decoder_class: type[IncrementalDecoder]) -> bool:
    """Return whether incremental decoding agrees with training.

    Decoding runs twice: with one visual prompt that all prompts share, and with one visual prompt for each prompt.
    """
    first, second = probe.continuations
    device = first.device
    for is_shared in (True, False):
        prompts = probe.prompts
        if not is_shared:
            image_index = torch.arange(len(TEXT_LENGTHS), device=device)
            visual_prompts = prompts.visual_prompts.repeat(len(image_index), 1, 1)
            prompts = replace(prompts, visual_prompts=visual_prompts, image_index=image_index)
        decoder = decoder_class(probe.network, prompts)
        if not probe.agrees(decoder.logits, [0, 2], 0):
            return False
        decoder.step(torch.stack([first[0], second[0]]).repeat(2), torch.tensor([0, 0, 1, 1], device=device))
        if not probe.agrees(decoder.logits, range(4), 1):
            return False
        # The two rows of each prompt change places, as beams do.
        decoder.step(torch.stack([second[1], first[1]]).repeat(2), torch.tensor([1, 0, 3, 2], device=device))
        if not probe.agrees(decoder.logits, [1, 0, 3, 2], 2):
            return False
    return True


def _agrees_with_transformers(probe: Probe, rows: Sequence[int]) -> bool:
    """Return whether transformers' ``generate`` agrees with training, with one beam and with two beams.

    The two beams change places during generation.
    """
    device = probe.continuations.device
    eos_token_id = next(token for token in range(3 * NUM_NEW_TOKENS) if not (probe.continuations == token).any())
    for num_beams in (1, 2):
        forced = ForcedLogitsProcessor(probe.continuations, num_beams)
        generate_with_transformers(
            probe.network, probe.prompts.select(torch.tensor(rows, device=device)),
            Decoding(num_beams=num_beams, max_new_tokens=NUM_NEW_TOKENS, min_new_tokens=0), [eos_token_id],
            logits_processors=[forced],
        )  # fmt: skip
        for step, (sequence_ids, logits) in enumerate(forced.steps):
            if step and sorted(set(sequence_ids.tolist())) != list(range(num_beams)):
                return False
            prompt = torch.tensor(rows, device=device).repeat_interleave(num_beams)
            if not probe.agrees(logits, (2 * prompt + sequence_ids).tolist(), step):
                return False
        if len(forced.steps) != NUM_NEW_TOKENS:
            return False
    return True


class ForcedLogitsProcessor(LogitsProcessor):
    """A logits processor that forces transformers' ``generate`` to return given sequences, and records the logits.

    With two beams, both sequences are generated. The first sequence is the more likely one at the first token and the
    less likely one afterwards, so that the beams change places.

    Args:
        sequences: two sequences. With one beam, only the first sequence is generated.
        num_beams: number of beams, 1 or 2.
    """

    def __init__(self, sequences: Int[Tensor, "2 U"], num_beams: int) -> None:
        self._sequences, self._num_beams = sequences, num_beams
        self.steps: list[tuple[Int[Tensor, "N"], Float[Tensor, "N V"]]] = []
        """For each generated token: the index of the sequence in each row, and the logits of each row."""

    def __call__(self, input_ids: Int[Tensor, "N T"], scores: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        step = len(self.steps)
        sequence_ids = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        if step:
            sequence_ids = (input_ids[:, -step] == self._sequences[1, 0]).long()
        self.steps.append((sequence_ids, scores.clone()))
        forced = torch.full_like(scores, -torch.inf)
        if step == 0:
            for i in range(self._num_beams):
                forced[:, self._sequences[i, 0]] = -float(i)
        else:
            log_probs = torch.zeros_like(scores[:, 0])
            if self._num_beams > 1 and step == 1:
                log_probs[sequence_ids == 0] = -5.0
            forced.scatter_(1, self._sequences[sequence_ids, step][:, None], log_probs[:, None])
        return forced


# -- helpers -----------------------------------------------------------------------------------------------------------


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(dim=-1).clamp(min=-100.0)


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {short_message(error)[:160]}"


def _unsupported(network: Any, reason: str) -> InputError:
    return InputError(
        f"the LLM, a {type(network).__name__}, cannot be used after a soft visual prompt ({reason}): set language.name"
        " to another LLM, see docs/models.md"
    )

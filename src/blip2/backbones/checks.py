"""Trying an LLM once when it is loaded, so that what it cannot do is said then and not in the middle of a run.

LLMs differ in what they take and keep: embeddings, a mask, positions, keys and values, states of a recurrence. No list
of names says which can do what, so each is run for a few tokens, as it is and where it is, which needs no memory beside
its own and about ten short passes. A few tokens go through it in all the ways in which it is used, and what it
predicts after the same text has to be the same each time:

- in training: texts of unlike lengths in a batch, the soft visual prompt before them as embeddings;
- alone, all of it as tokens;
- while it writes: token by token, prompts of unlike lengths in a batch, with beams.

The ways of writing are tried from the fastest to the slowest, and the first that gives what training gives is taken.

Legend: B prompts, N rows (a prompt with one of two continuations), T text tokens, U tokens of a continuation, Q length
of the visual prompt, L width of the LLM, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from blip2.backbones.pretrained import first_line
from blip2.decoding.kv_cache import (
    Prompts,
    Reader,
    Rereader,
    blank_token,
    forward,
    has_embeddings_in_layers,
    is_supported,
    text_config,
)
from blip2.decoding.search import (
    Decoding,
    Way,
    reader_of,
    write,
    write_again,
    write_by_length,
    write_plainly,
)
from blip2.errors import InputError
from blip2.model.losses import IGNORED

VISUAL, WRITTEN = 3, 3
"""Length of the visual prompt, and number of tokens that are predicted."""
LENGTHS = (0, 4)
"""Of the prompts' texts, in tokens."""
TOLERANCE = {torch.float32: (0.01, 4e-6), torch.float16: (0.05, 2e-3), torch.bfloat16: (0.15, 0.015)}
"""How far two results may be apart: as a share of what other texts change, and of the size of the logits."""

Teach = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From visual prompts, ids, their mask and labels to the logits of the labels, as in training."""


@dataclass(frozen=True)
class Trial:
    """Two prompts, each with two continuations, and what an LLM in training predicts of them."""

    network: Any
    visual_ids: Int[Tensor, "1 Q"]
    """Tokens whose embeddings are the visual prompt."""
    prompts: Prompts
    continuations: Int[Tensor, "2 U"]
    expected: Float[Tensor, "N U V"] = field(default_factory=lambda: torch.empty(0))
    """Log-probabilities; rows are (first prompt, first continuation), (first, second), (second, first) ..."""

    def is_expected(self, logits: Float[Tensor, "n V"], rows: Sequence[int], place: int) -> bool:
        """Whether logits are those that training gives at a place of a continuation."""
        expected = self.expected[list(rows), place]
        varies, size = _rms(self.expected - self.expected.mean(dim=(0, 1))), _rms(_centered(self.expected))
        share, floor = TOLERANCE.get(self.network.dtype, TOLERANCE[torch.bfloat16])
        if getattr(self.network, "is_quantized", False):
            share, floor = TOLERANCE[torch.bfloat16]
        return bool(_rms(_log_softmax(logits) - expected) <= share * varies + floor * size)


def find_way(network: Any, teach: Teach) -> Way:
    """Return the fastest way of writing in which an LLM predicts what it does in training.

    Args:
        network: an LLM in evaluation mode.
        teach: how it is trained.

    Raises:
        InputError: it cannot be trained behind a soft visual prompt, or it cannot write.
    """
    trial = _prepare(network, teach)
    logits = _alone(trial, WRITTEN)
    if not all(trial.is_expected(logits[place, None], [0], place) for place in range(WRITTEN)):
        shorter = _alone(trial, 1)
        if not network.config.is_encoder_decoder and not torch.allclose(shorter[0], logits[0], atol=1e-2, rtol=1e-2):
            raise _refusal(network, "what it predicts depends on tokens that come later: it is an encoder")
        raise _refusal(
            network,
            "what it predicts of a text alone, given as tokens, is not what it predicts of the same text as embeddings"
            " in a batch",
        )
    said = "it predicts other tokens while it writes than in training"
    ways: list[tuple[Way, Callable[[Trial], bool]]] = [
        (write_plainly, lambda each: _generates(each, (0, 1))),
        (write_by_length, lambda each: _generates(each, (0,)) and _generates(each, (1,))),
        (write_again, lambda each: _reads(each, Rereader)),
    ]
    if is_supported(network):
        ways.insert(0, (write, lambda each: _reads(each, reader_of(network))))
    for way, is_right in ways:
        try:
            if is_right(trial):
                return way
        except Exception as error:  # what an LLM raises that cannot do something is not said anywhere
            said = _said(error)
    raise _refusal(network, said)


def check_gradient(network: Any, teach: Teach) -> None:
    """See that an LLM hands a gradient on to the visual prompt.

    Raises:
        InputError: it does not.
    """
    trial = _prepare(network, teach)
    ids, mask, labels = _as_trained(trial)
    visual = trial.prompts.visual.expand(len(ids), -1, -1).clone().requires_grad_()
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(_log_softmax(teach(visual, ids, mask, labels)).square().mean(), visual)
    except Exception as error:
        raise _refusal(network, f"no gradient goes through it: {_said(error)}") from error
    if not gradient.isfinite().all() or not gradient.flatten(1).any(dim=1).all():
        raise _refusal(network, "the gradient that it hands on to the visual prompt is zero or not finite")


def _prepare(network: Any, teach: Teach) -> Trial:
    tokens = _ordinary_tokens(network, VISUAL + sum(LENGTHS) + 2 * WRITTEN)
    device = network.get_input_embeddings().weight.device
    visual, text, first, second = torch.tensor(tokens, device=device).split([VISUAL, sum(LENGTHS), WRITTEN, WRITTEN])
    ids = torch.stack([text, text])
    mask = torch.arange(max(LENGTHS), device=device) < torch.tensor(LENGTHS, device=device)[:, None]
    try:
        embed = network.get_input_embeddings()
        if has_embeddings_in_layers(network):
            visual = torch.full_like(visual, blank_token(network))  # for which a visual prompt counts there
        prompts = Prompts(embed(visual[None]), embed(ids), ids, mask, torch.zeros_like(ids[:, 0]))
        trial = Trial(network, visual[None], prompts, torch.stack([first, second]))
        arguments = _as_trained(trial)
        rows = len(arguments[0])
        with torch.no_grad():
            logits = teach(prompts.visual.expand(rows, -1, -1), *arguments)
    except InputError:
        raise
    except Exception as error:
        raise _refusal(network, _said(error)) from error
    if not logits.isfinite().any() or logits.isnan().any():
        raise _refusal(network, "its logits are not finite: its weights are damaged, or need another language.dtype")
    return Trial(network, trial.visual_ids, prompts, trial.continuations, _log_softmax(logits).unflatten(0, (rows, -1)))


def _as_trained(trial: Trial) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels of each prompt with each continuation."""
    prompts, rows, labels = trial.prompts, [], []
    for i, length in enumerate(LENGTHS):
        for continuation in trial.continuations:
            prompt = prompts.ids[i, :length]
            is_whole = trial.network.config.is_encoder_decoder
            rows.append(prompt if is_whole else torch.cat([prompt, continuation]))
            labels.append(continuation if is_whole else torch.cat([torch.full_like(prompt, IGNORED), continuation]))
    fill = blank_token(trial.network)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return ids, mask, torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)


def _ordinary_tokens(network: Any, count: int) -> list[int]:
    """Tokens from all over the vocabulary, none of which its configuration gives a meaning."""
    special: set[int] = set()
    for config in (network.config, text_config(network.config)):
        for name, value in config.to_dict().items():
            if name.endswith(("token_id", "token_index", "_ids")):
                special |= {each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)}
    size = network.get_input_embeddings().weight.shape[0]
    free = [token for token in range(size) if token not in special] or [0]
    return [free[(len(free) * (2 * i + 1)) // (2 * count)] for i in range(count)]


# -- what is tried -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _alone(trial: Trial, count: int) -> Float[Tensor, "U V"]:
    """Logits of the first tokens of the first continuation behind the shorter prompt, alone and all of it as tokens."""
    network, read = trial.network, trial.continuations[:1, : count - 1]
    arguments: dict[str, Any] = {"input_ids": trial.visual_ids}
    if network.config.is_encoder_decoder:
        start = torch.full_like(trial.continuations[:1, :1], network.generation_config.decoder_start_token_id)
        arguments["decoder_input_ids"] = torch.cat([start, read], dim=1)
    else:
        arguments["input_ids"] = torch.cat([trial.visual_ids, read], dim=1)
    arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
    try:
        return forward(network, **arguments)[0, -count:]
    except Exception as error:
        raise _refusal(network, _said(error)) from error


@torch.no_grad()
def _reads(trial: Trial, kind: type[Reader]) -> bool:
    """A reader, with one visual prompt for both and with one each."""
    first, second = trial.continuations
    device = first.device
    for shared in (True, False):
        prompts = trial.prompts
        if not shared:
            each = torch.arange(len(LENGTHS), device=device)
            prompts = Prompts(prompts.visual.repeat(len(each), 1, 1), prompts.text, prompts.ids, prompts.mask, each)
        reader = kind(trial.network, prompts)
        if not trial.is_expected(reader.logits, [0, 2], 0):
            return False
        reader.read(torch.stack([first[0], second[0]]).repeat(2), torch.tensor([0, 0, 1, 1], device=device))
        if not trial.is_expected(reader.logits, range(4), 1):
            return False
        # As beams that change places.
        reader.read(torch.stack([second[1], first[1]]).repeat(2), torch.tensor([1, 0, 3, 2], device=device))
        if not trial.is_expected(reader.logits, [1, 0, 3, 2], 2):
            return False
    return True


def _generates(trial: Trial, which: Sequence[int]) -> bool:
    """transformers' ``generate`` of some of the prompts, with one beam and with two that change places."""
    end = next(token for token in range(3 * WRITTEN) if not (trial.continuations == token).any())
    for beams in (1, 2):
        dictation = Dictation(trial.continuations, beams)
        write_plainly(
            trial.network, trial.prompts.rows(torch.tensor(which, device=trial.continuations.device)),
            Decoding(num_beams=beams, max_new_tokens=WRITTEN, min_new_tokens=0), [end], also=[dictation],
        )  # fmt: skip
        for place, (continuations, logits) in enumerate(dictation.read):
            if place and sorted(set(continuations.tolist())) != list(range(beams)):
                return False
            prompt = torch.tensor(which, device=continuations.device).repeat_interleave(beams)
            if not trial.is_expected(logits, (2 * prompt + continuations).tolist(), place):
                return False
        if len(dictation.read) != WRITTEN:
            return False
    return True


class Dictation(LogitsProcessor):
    """Has transformers' ``generate`` write given texts, and notes what it predicts of each token.

    With two beams both are written, the first of them the likelier at first and the less likely afterwards.

    Args:
        texts: one a beam.
    """

    def __init__(self, texts: Int[Tensor, "2 U"], beams: int) -> None:
        self._texts, self._beams = texts, beams
        self.read: list[tuple[Int[Tensor, "N"], Float[Tensor, "N V"]]] = []
        """For each token which of the texts a row holds, and the logits."""

    def __call__(self, input_ids: Int[Tensor, "N T"], scores: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        place = len(self.read)
        row = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        if place:
            row = (input_ids[:, -place] == self._texts[1, 0]).long()
        self.read.append((row, scores.clone()))
        wanted = torch.full_like(scores, -torch.inf)
        if place == 0:
            for text in range(self._beams):
                wanted[:, self._texts[text, 0]] = -float(text)
        else:
            chance = torch.where(row == 0, -5.0, 0.0) if self._beams > 1 and place == 1 else torch.zeros_like(row)
            wanted.scatter_(1, self._texts[row, place][:, None], chance[:, None].to(wanted.dtype))
        return wanted


# -- small things ------------------------------------------------------------------------------------------------------


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(dim=-1).clamp(min=-100.0)


def _centered(logits: Tensor) -> Tensor:
    return logits - logits.mean(dim=-1, keepdim=True)


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)[:160]}"


def _refusal(network: Any, reason: str) -> InputError:
    return InputError(
        f"the LLM, a {type(network).__name__}, cannot be used behind a soft visual prompt ({reason}): set language.name"
        " to another, see docs/models.md"
    )

"""Generated texts with their evidence: probabilities, alternatives, and what the queries attended to.

Legend: Q queries, P image tokens, U tokens of a text.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from blip2.data.images import ImageLike, read_image
from blip2.decoding.search import stops
from blip2.errors import InputError


class Alternative(NamedTuple):
    """Another text that the beam search found, or another token in place of a token."""

    text: str
    log_prob: float
    """Natural logarithm of the probability: of a text with its end token if it has one, or of a token."""


@dataclass(frozen=True)
class Generated:
    """A text that was generated about an image, with its evidence."""

    text: str
    """The text that is returned without ``details``."""
    log_prob: float
    """Natural logarithm of the probability of the text: the sum of `token_log_probs`."""
    tokens: tuple[str, ...]
    """The text of each token. The last one is the end token, unless the text reached its maximum length."""
    token_log_probs: tuple[float, ...]
    """Natural logarithm of the probability of each token, given the image, the prompt and the tokens before. It is the
    probability in training: penalties and the temperature of the decoding do not change it."""
    alternatives: tuple[Alternative, ...]
    """The other texts that the beam search found, best first: at most ``num_beams - 1``, and none when sampling."""
    attention_map: Float[Tensor, "Q P"] = field(compare=False, repr=False)
    """Attention of each query over the image tokens in the last cross-attention, averaged over the heads. If the
    Q-Former reads questions, it depends on the question."""
    temperature: float = 1.0
    """Temperature of the confidence: that of the model's calibration for answers, otherwise 1."""

    @property
    def confidence(self) -> float:
        """The geometric mean of the probabilities of the tokens to the power of 1 / temperature, in (0, 1].

        For an answer of a calibrated model, it is an estimate of the probability that the answer is right.
        """
        return math.exp(self.log_prob / len(self.token_log_probs) / self.temperature)

    def is_unsure(self, threshold: float = 0.5) -> bool:
        """Return whether the confidence is below a threshold.

        Args:
            threshold: a number in [0, 1]. The confidence is calibrated only in answers of a model for which
                ``blip2 calibrate`` was run (docs/calibration.md); otherwise choose the threshold on data with known
                answers.
        """
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold is {threshold}, expected a number from 0 to 1: correct it")
        return self.confidence < threshold

    @classmethod
    def make(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        sequences: Sequence[Sequence[int]],
        token_log_probs: Sequence[Sequence[float]],
        attention_map: Float[Tensor, "Q P"],
        temperature: float | None = None,
    ) -> Generated:
        """Return the first of several texts, with the others as its alternatives. Texts that are equal count once.

        Args:
            tokenizer: the tokenizer of the texts.
            texts: the texts about one image, best first.
            sequences: the token ids of each text.
            token_log_probs: the log-probability of each token of each text.
            attention_map: the attention of the queries.
            temperature: the temperature of the confidence. None: 1.
        """
        others: dict[str, float] = {}
        for text, values in zip(texts[1:], token_log_probs[1:], strict=True):
            if text != texts[0]:
                others.setdefault(text, math.fsum(values))
        tokens = tuple(str(tokenizer.decode([token])) for token in sequences[0])
        values = tuple(token_log_probs[0])
        alternatives = tuple(Alternative(*each) for each in others.items())
        log_prob = math.fsum(values)
        return cls(texts[0], log_prob, tokens, values, alternatives, attention_map, temperature or 1.0)


@dataclass(frozen=True)
class Explanation:
    """The queries that each token of a text about an image depends on.

    It is made by ``GenerationPipeline.explain``, and for the last answer of a conversation by ``Chat.explain``.
    """

    tokens: tuple[str, ...]
    """The text of each of the U tokens. The last one is the end token, but for an answer of a conversation, and for
    token ids that were given without it."""
    token_log_probs: tuple[float, ...]
    """Natural logarithm of the probability of each token, given the image, the prompt and the tokens before."""
    blank_log_probs: tuple[float, ...]
    """The same with a blank image. A token that the LLM would write without the image has a similar value in both."""
    alternatives: tuple[tuple[Alternative, ...], ...]
    """For each token, the four most likely other tokens in its place, best first."""
    effects: Float[Tensor, "U Q"] = field(compare=False, repr=False)
    """The effect of each query on each token, in nats: by how much the log-probability of the token falls without the
    query. It is negative if the query makes the token less likely."""
    attention_map: Float[Tensor, "Q P"] = field(compare=False, repr=False)
    """Attention of each query over the image tokens in the last cross-attention, averaged over the heads."""

    def token_maps(self) -> Float[Tensor, "U P"]:
        """Return the attention of the queries for each token, weighted by their positive effects on it.

        Each row sums to 1. For a token that no query makes more likely, all queries have the same weight.
        """
        weights = self.effects.clamp(min=0)
        weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, torch.ones_like(weights))
        return weights / weights.sum(dim=1, keepdim=True) @ self.attention_map


def until_end(
    sequence: list[int], end_tokens: Container[int], stopping_criteria: StoppingCriteria | None = None
) -> list[int]:
    """Return the tokens of a sequence without its padding, which consists of end tokens.

    Args:
        sequence: the tokens of a sequence and padding.
        end_tokens: tokens that end a sequence. The first one belongs to the sequence unless a stop string is before it.
        stopping_criteria: says which other sequences end; see :func:`blip2.decoding.search.generate`.
    """
    end = next((i for i, token in enumerate(sequence) if token in end_tokens), len(sequence))
    if stopping_criteria is not None and 0 < end < len(sequence):
        end -= bool(stops(stopping_criteria, torch.tensor([sequence[:end]])))
    return sequence[: end + 1]


def to_grid(weights: Float[Tensor, "*maps P"]) -> Float[Tensor, "*maps side side"]:
    """Return attention maps as square grids.

    The last side * side tokens are the grid, where side is the integer square root of P; the tokens before it ([CLS],
    registers) have no place in the image.
    """
    side = math.isqrt(weights.shape[-1])
    return weights[..., -side * side :].unflatten(-1, (side, side))


def draw_attention(image: ImageLike, attention_map: Float[Tensor, "*queries P"]) -> Image.Image:
    """Draw an attention map over an image: the more attention a place has, the brighter it is.

    Args:
        image: the image of which the map was made.
        attention_map: weights over the image tokens of one query [P], or of several queries [Q, P], which are averaged:
            ``maps[0, -1]`` of :meth:`~blip2.GenerationPipeline.attention_maps`, or the ``attention_map`` of a
            :class:`Generated`. The last n * n tokens are a square grid, where n is the integer square root of P; the
            tokens before it ([CLS], registers) have no place in the image.

    Returns:
        An RGB image of the size of `image`.

    Raises:
        InputError: the image cannot be decoded, or the map has another shape or is not finite.
    """
    weights = torch.as_tensor(attention_map).detach().float().cpu()
    if weights.ndim not in (1, 2) or not weights.numel() or not bool(weights.isfinite().all()):
        raise InputError(
            f"the attention map has the shape {list(weights.shape)}, expected finite weights [P] or [Q, P]: select an"
            " image and a layer, as in maps[0, -1]"
        )
    weights = weights.mean(dim=0) if weights.ndim == 2 else weights
    grid = to_grid(weights)
    original = read_image(image)
    heat = Image.fromarray((grid / grid.max().clamp(min=1e-12)).numpy()).resize(original.size, Image.Resampling.BICUBIC)
    brightness = 0.25 + 0.75 * np.asarray(heat, np.float32).clip(0, 1)[..., None]
    return Image.fromarray((np.asarray(original, np.float32) * brightness).round().astype(np.uint8))

"""Options of text generation. This module does not import PyTorch, because the command line is built from it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from blip2.config import MAX_COUNT, DecodingOptions, bounded, check_ranges


@dataclass(frozen=True)
class Decoding:
    """Options of text generation; the fields have the names of transformers' ``GenerationConfig``."""

    num_beams: int = 5
    """Number of beams; 1 is greedy search. Not used when sampling."""
    max_new_tokens: int = 30
    """Maximum number of generated tokens."""
    min_new_tokens: int = bounded(1, 0, MAX_COUNT)
    """Minimum number of generated tokens."""
    length_penalty: float = 1.0
    """Length penalty of beam search: the score of a text is log-probability / length ** penalty. Values below 0 favor
    short texts (-1 for answers, §4.1)."""
    top_p: float | None = None
    """Sample from the smallest set of tokens with this total probability (nucleus sampling). None: beam search."""
    temperature: float = 1.0
    """Temperature of sampling, by which logits are divided."""
    repetition_penalty: float = bounded(1.0, 1e-6, MAX_COUNT)
    """Values above 1 make tokens that were already generated less likely; tokens of the prompt do not count."""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_ranges(self.options)

    @property
    def options(self) -> DecodingOptions:
        """The values of the fields that are options of the command line."""
        return DecodingOptions(**{field.name: getattr(self, field.name) for field in fields(DecodingOptions)})

    def override(self, options: DecodingOptions) -> Decoding:
        """Return a copy in which the options that are not None in `options` replace those of this object."""
        given = {field.name: getattr(options, field.name) for field in fields(DecodingOptions)}
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def beam_width(self, num_return_sequences: int) -> int:
        """Return the number of beams: at least `num_return_sequences` in beam search, and 1 when sampling."""
        return 1 if self.top_p is not None else max(self.num_beams, num_return_sequences)


CAPTION_DECODING = Decoding()
"""Default decoding of captions: beam search of width 5."""
ANSWER_DECODING = Decoding(length_penalty=-1.0, max_new_tokens=10)
"""Default decoding of answers: a negative length penalty favors short answers (§4.1)."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The randomness of text generation."""

    seed: int = bounded(0, 0, 2**32 - 1)
    """Seed of the random numbers for sampling."""

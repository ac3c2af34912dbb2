"""Options of text generation. This module does not import PyTorch, because the command line is built from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from blip2.config import MAX_COUNT, DecodingOptions, bounded, check_ranges, check_stop_strings
from blip2.errors import InputError

NUM_BEAMS = 5
"""The default number of beams (§4.2)."""


@dataclass(frozen=True)
class Decoding:
    """Options of text generation; the fields have the names of transformers' ``GenerationConfig``."""

    num_beams: int | None = None
    """Number of beams; 1 is greedy search. None: 5, or 1 when sampling."""
    max_new_tokens: int = 30
    """Maximum number of generated tokens."""
    min_new_tokens: int = bounded(1, 0, MAX_COUNT)
    """Minimum number of generated tokens."""
    length_penalty: float = 1.0
    """Length penalty of beam search: the score of a text is log-probability / length ** penalty. Values below 0 favor
    short texts (-1 for answers, §4.1)."""
    top_p: float | None = None
    """Sample from the smallest set of tokens with this total probability (nucleus sampling). None: no such limit; if
    ``top_k`` and ``min_p`` are None too, nothing is sampled."""
    temperature: float = 1.0
    """Temperature of sampling, by which logits are divided."""
    repetition_penalty: float = 1.0
    """Values above 1 make tokens that were already generated less likely; tokens of the prompt do not count."""
    top_k: int | None = None
    """Sample from this number of most likely tokens. None: no such limit."""
    min_p: float | None = None
    """Sample from the tokens whose probability is at least this share of that of the most likely token, in [0, 1].
    None: no such limit."""
    no_repeat_ngram_size: int = 0
    """Number n of tokens: no n consecutive tokens are generated twice; tokens of the prompt do not count. 0: no such
    limit."""
    stop_strings: str | Sequence[str] | None = None
    """Texts that end a sequence. The sequence keeps the tokens of the stop string, as in transformers; the texts that a
    pipeline returns end before it. None: only the end token ends a sequence."""

    def __post_init__(self) -> None:
        if isinstance(self.stop_strings, str):
            object.__setattr__(self, "stop_strings", (self.stop_strings,))
        if self.stop_strings is not None:
            check_stop_strings(self.stop_strings)
            object.__setattr__(self, "stop_strings", tuple(self.stop_strings))  # so that this object can be hashed
        missing = [each.name for each in fields(self) if each.default is not None and getattr(self, each.name) is None]
        if missing:
            raise InputError(f"{missing[0]} is None, expected a number: give a number, or leave {missing[0]} out")
        check_ranges(self)
        self.options.check_beams()

    @property
    def options(self) -> DecodingOptions:
        """The values of the fields that are options of the command line."""
        values = {field.name: getattr(self, field.name) for field in fields(DecodingOptions)}
        return DecodingOptions(**{**values, "stop_strings": self.stop_strings and list(self.stop_strings)})

    @property
    def do_sample(self) -> bool:
        """Whether tokens are sampled: ``top_k``, ``top_p`` or ``min_p`` is set."""
        return self.options.do_sample

    def override(self, options: DecodingOptions) -> Decoding:
        """Return a copy in which the options that are not None in `options` replace those of this object."""
        given = {field.name: getattr(options, field.name) for field in fields(DecodingOptions)}
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def beam_width(self, num_return_sequences: int) -> int:
        """Return the number of beams: at least `num_return_sequences` in beam search, and 1 when sampling."""
        if self.do_sample:
            return 1
        return max(NUM_BEAMS if self.num_beams is None else self.num_beams, num_return_sequences)

    def without_beams(self) -> Decoding:
        """Return options for writing token by token: those of this object, with greedy search if it sets no beams.

        Raises:
            InputError: the options ask for beam search.
        """
        if self.num_beams is None and not self.do_sample:
            return replace(self, num_beams=1)
        if self.beam_width(1) > 1:
            raise InputError(
                f"num_beams is {self.num_beams}, but beam search cannot stream tokens: set num_beams to 1, or"
                " sample with top_p"
            )
        return self


CAPTION_DECODING = Decoding()
"""Default decoding of captions: beam search of width 5."""
ANSWER_DECODING = Decoding(length_penalty=-1.0, max_new_tokens=10)
"""Default decoding of answers: a negative length penalty favors short answers (§4.1)."""
CHAT_DECODING = Decoding(num_beams=1, max_new_tokens=100)
"""Default decoding of conversations: greedy search, because beam search cannot stream tokens."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The randomness of text generation."""

    seed: int = bounded(0, 0, 2**32 - 1)
    """Seed of the random numbers for sampling."""

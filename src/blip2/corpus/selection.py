"""Select the captions of an image that are kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blip2.config import MAX_COUNT, bounded, check_ranges
from blip2.errors import InputError

MIN_CONFIDENCE = 0.5
"""Probability above which the detected language of a caption counts; short captions rarely reach it."""


@dataclass(frozen=True)
class SelectionRules:
    """Conditions for a caption to be kept."""

    keep: int = bounded(2, 1, MAX_COUNT)
    """K, the maximum number of captions to keep per image (§3.4)."""
    min_words: int = bounded(1, 1, MAX_COUNT)
    """Minimum number of words; shorter captions are dropped."""
    max_words: int | None = bounded(None, 1, MAX_COUNT)
    """Maximum number of words; longer captions are dropped. null: no limit."""
    language: str | None = None
    """ISO 639-1 code of the language to keep, such as en; captions of unclear language are kept. null: any."""
    max_word_overlap: float = bounded(1.0, 1e-6, 1)
    """Of captions that share at least this fraction of their words, the best is kept. With 1, they are those of equal
    words."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.max_words is not None and self.max_words < self.min_words:
            raise InputError(f"max_words is {self.max_words}, expected at least min_words, {self.min_words}")


@dataclass(frozen=True)
class Caption:
    """A caption of an image."""

    text: str
    score: float
    """Cosine similarity with the image."""
    is_original: bool
    """Whether the caption comes from the corpus rather than from the captioner."""


@dataclass(frozen=True)
class Selection:
    """The kept and dropped captions of an image, the best first."""

    kept: tuple[Caption, ...]
    dropped: tuple[tuple[Caption, str], ...]
    """Each dropped caption with the reason."""


def select_captions(
    captions: Sequence[Caption], rules: SelectionRules, language_of: Callable[[str], str | None]
) -> Selection:
    """Rank captions by score, and keep the best that the rules allow. Ties keep their order.

    Args:
        captions: the captions of an image.
        rules: conditions for a caption to be kept.
        language_of: returns the language of a text; None if it is unclear.
    """
    kept: list[Caption] = []
    dropped: list[tuple[Caption, str]] = []
    for caption in sorted(captions, key=lambda caption: -caption.score):
        count = len(caption.text.split())
        if count < rules.min_words:
            reason = "too short"
        elif rules.max_words is not None and count > rules.max_words:
            reason = "too long"
        elif rules.language is not None and language_of(caption.text) not in (rules.language, None):
            reason = "another language"
        elif any(word_overlap(caption.text, other.text) >= rules.max_word_overlap for other in kept):
            reason = "same words"
        elif len(kept) == rules.keep:
            reason = "ranked lower"
        else:
            kept.append(caption)
            continue
        dropped.append((caption, reason))
    return Selection(tuple(kept), tuple(dropped))


def word_overlap(one: str, other: str) -> float:
    """Return the Jaccard similarity of the words of two texts, ignoring order, case and punctuation."""
    first, second = (set(re.findall(r"\w+", text.casefold())) or {text} for text in (one, other))
    return len(first & second) / len(first | second)


def load_language_detector(language: str | None) -> Callable[[str], str | None]:
    """Return a function that detects the language of a text, or returns None if it is unclear.

    Args:
        language: the language to keep. If None, nothing is loaded, and the function always returns None.

    Raises:
        InputError: py3langid is missing, or does not know the language.
    """
    if language is None:
        return lambda text: None
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise InputError("--language needs the extra blip2[capfilt]: pip install 'blip2[capfilt]'") from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if language not in identifier.nb_classes:
        raise InputError(f"the language {language!r} is not known: give an ISO 639-1 code such as en")

    def detect(text: str) -> str | None:
        detected, probability = identifier.classify(text)
        return detected if probability > MIN_CONFIDENCE else None

    return detect

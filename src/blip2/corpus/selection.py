"""Select the captions of an image to keep."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blip2.config import MAX_COUNT, bounded, check_ranges
from blip2.errors import InputError

MIN_CONFIDENCE = 0.5
"""A detected language is used only if its probability is above this; that of short captions is often lower."""


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
    """ISO 639-1 code of the language to keep, such as en. Captions whose language is unclear are kept too. null: all
    languages are kept."""
    max_word_overlap: float = bounded(1.0, 1e-6, 1)
    """Word overlap from which on only the best of several captions is kept. The word overlap of two captions is the
    number of their common words divided by the number of all their words, counting each word once."""
    min_itm: float | None = bounded(None, 0, 1)
    """Minimum probability of a match (ITM) under the ranker; captions below it are dropped. BLIP's filter has 0.5. It
    needs a ranker of stage 1. null: no filter by ITM."""
    min_pmi: float | None = bounded(None, -1000, 1000)
    """Minimum of the caption's log-likelihood minus that given a blank image (PMI), in nats, under the captioner;
    captions below it are dropped. Texts such as "image", which are as likely without the image, have about 0. It
    needs a captioner of stage 2. null: no filter by PMI."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.max_words is not None and self.max_words < self.min_words:
            raise InputError(
                f"--max-words is {self.max_words}, expected at least --min-words, which is {self.min_words}: raise"
                " --max-words or lower --min-words"
            )


@dataclass(frozen=True)
class Caption:
    """A caption of an image."""

    text: str
    score: float
    """Cosine similarity with the image."""
    is_original: bool
    """Whether the caption comes from the corpus rather than from the captioner."""
    itm: float | None = None
    """Probability that caption and image match; None if captions are not filtered by it."""
    pmi: float | None = None
    """Log-likelihood minus that given a blank image; None if captions are not filtered by it."""


@dataclass(frozen=True)
class Selection:
    """The kept and dropped captions of an image, each in the order of falling scores."""

    kept: tuple[Caption, ...]
    dropped: tuple[tuple[Caption, str], ...]
    """Each dropped caption with the reason for dropping it."""


def select_captions(
    captions: Sequence[Caption], rules: SelectionRules, language_of: Callable[[str], str | None]
) -> Selection:
    """Rank captions by score, and keep the best captions that meet the rules. Ties keep their order.

    Args:
        captions: the captions of an image.
        rules: conditions for a caption to be kept.
        language_of: returns the ISO 639-1 code of the language of a text, or None if the language is unclear.
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
        elif rules.min_itm is not None and caption.itm is not None and caption.itm < rules.min_itm:
            reason = "no match (ITM)"
        elif rules.min_pmi is not None and caption.pmi is not None and caption.pmi < rules.min_pmi:
            reason = "not about the image (PMI)"
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
    """Return the Jaccard similarity of the sets of words of two texts, in [0, 1], ignoring case and punctuation."""
    first, second = (set(re.findall(r"\w+", text.casefold())) or {text} for text in (one, other))
    return len(first & second) / len(first | second)


def load_language_detector(language: str | None) -> Callable[[str], str | None]:
    """Return a function that detects the language of a text.

    Args:
        language: ISO 639-1 code of the language to keep. None: nothing is loaded, and the function always returns None.

    Returns:
        A function that returns the ISO 639-1 code of the language of a text, or None if the language is unclear.

    Raises:
        InputError: py3langid is not installed, or does not know `language`.
    """
    if language is None:
        return lambda text: None
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise InputError("--language needs py3langid, which is not installed: pip install 'blip2[capfilt]'") from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if language not in identifier.nb_classes:
        raise InputError(f"the language {language!r} is not known: give an ISO 639-1 code such as en")

    def detect(text: str) -> str | None:
        detected, probability = identifier.classify(text)
        return detected if probability > MIN_CONFIDENCE else None

    return detect

"""Which captions of a picture stay."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blip2.errors import InputError

SURE = 0.5
"""A caption is taken for one of another language if that is likelier than this; of a few words one can seldom be."""


@dataclass(frozen=True)
class Rules:
    """What a caption has to be to stay."""

    keep: int = 2
    """K, the most of a picture (§3.4)."""
    fewest_words: int = 1
    """Shorter ones go."""
    most_words: int | None = None
    """Longer ones go; None: none do."""
    language: str | None = None
    """ISO 639-1 code of the only one that is kept (``en``), where it can be told; None: any."""
    alike: float = 1.0
    """Of two captions that share so many of their words, the better stays; at 1, of two with the same words."""

    def __post_init__(self) -> None:
        for name in ("keep", "fewest_words"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.most_words is not None and self.most_words < self.fewest_words:
            raise InputError(f"most_words is {self.most_words}, expected at least fewest_words, {self.fewest_words}")
        if not 0 < self.alike <= 1:
            raise InputError(f"alike is {self.alike}, expected a share of words above 0 and up to 1")


@dataclass(frozen=True)
class Caption:
    """What is said about a picture."""

    text: str
    score: float
    """Its cosine with the picture."""
    is_original: bool


@dataclass(frozen=True)
class Chosen:
    """The captions of a picture, the best first."""

    kept: tuple[Caption, ...]
    dropped: tuple[tuple[Caption, str], ...]
    """With the cause."""


def choose(captions: Sequence[Caption], rules: Rules, language_of: Callable[[str], str | None]) -> Chosen:
    """Rank captions, and keep the best that the rules allow. Of equal ones the first comes first.

    Args:
        language_of: which a text is in; None where it cannot be told.
    """
    kept: list[Caption] = []
    dropped: list[tuple[Caption, str]] = []
    for caption in sorted(captions, key=lambda caption: -caption.score):
        count = len(caption.text.split())
        if count < rules.fewest_words:
            cause = "too short"
        elif rules.most_words is not None and count > rules.most_words:
            cause = "too long"
        elif rules.language is not None and language_of(caption.text) not in (rules.language, None):
            cause = "another language"
        elif any(share_of_words(caption.text, other.text) >= rules.alike for other in kept):
            cause = "said already"
        elif len(kept) == rules.keep:
            cause = "ranked lower"
        else:
            kept.append(caption)
            continue
        dropped.append((caption, cause))
    return Chosen(tuple(kept), tuple(dropped))


def share_of_words(one: str, other: str) -> float:
    """Words that two texts have in common, of all that they have, whatever their order, case and signs."""
    first, second = (set(re.findall(r"\w+", text.casefold())) or {text} for text in (one, other))
    return len(first & second) / len(first | second)


def read_language(wanted: str | None) -> Callable[[str], str | None]:
    """What tells the language of a text, or None where it is not sure. It is read only if one is wanted.

    Raises:
        InputError: py3langid is missing, or does not know the language.
    """
    if wanted is None:
        return lambda text: None
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise InputError("to tell languages needs the extra blip2[capfilt]: pip install 'blip2[capfilt]'") from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if wanted not in identifier.nb_classes:
        raise InputError(f"the language {wanted!r} is not known: give an ISO 639-1 code such as en")

    def tell(text: str) -> str | None:
        language, probability = identifier.classify(text)
        return language if probability > SURE else None

    return tell

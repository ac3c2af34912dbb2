"""How close captions come to the truth."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """Lower-case words of a text, without punctuation."""
    return re.findall(r"\w+", text.lower())


def token_f1(written: str, truth: str) -> float:
    """Harmonic mean of the precision and recall of the words of a caption, in [0, 1]."""
    there, wanted = Counter(words(written)), Counter(words(truth))
    shared = sum((there & wanted).values())
    if not shared:
        return float(there == wanted)
    return 2 * shared / (there.total() + wanted.total())


ARTICLES = {"a", "an", "the", "some", "of", "and", "is"}


def content_f1(written: str, truth: str) -> float:
    """:func:`token_f1` without the words that nearly every caption has (a, an, the, some, of, and, is)."""
    kept = [" ".join(word for word in words(text) if word not in ARTICLES) for text in (written, truth)]
    return token_f1(*kept)


def score_captions(written: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """Means over all captions, each in [0, 1]: ``token_f1``, ``content_f1``, and ``exact``, the share that has the
    same words as the truth."""
    pairs = list(zip(written, truth, strict=True))
    return {
        "token_f1": sum(token_f1(a, b) for a, b in pairs) / len(pairs),
        "content_f1": sum(content_f1(a, b) for a, b in pairs) / len(pairs),
        "exact": sum(words(a) == words(b) for a, b in pairs) / len(pairs),
    }

"""Parse the facts that free-text captions of scenes state, and compare the facts with the truth."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

from blip2.data.scene_kinds import COLORS, KINDS, SYNONYMS, plural
from blip2.data.scene_texts import Truth

FACTS = ("objects", "relation", "color", "count", "size", "order")
"""The facts that :func:`score_caption` judges."""
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COUNT_WORDS = {
    **{word: n for n, word in enumerate(NUMBER_WORDS)}, **{str(n): n for n in range(len(NUMBER_WORDS))},
    "a": 1, "an": 1, "single": 1, "no": 0, "pair": 2, "couple": 2, "both": 2,
}  # fmt: skip
SIZE_WORDS = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large", "huge": "large"}
RELATION_AXES = {
    "left": ("left", 0),
    "right": ("left", 1),
    **dict.fromkeys(("above", "over", "atop"), ("above", 0)),
    **dict.fromkeys(("below", "under", "beneath", "underneath"), ("above", 1)),
}
RELATION_PATTERNS = [
    (r"\b(?:directly |just )?(?:to|on|at) (?:the|its) (left|right)(?:hand)?(?: side)? of\b", None),
    (r"\b(left|right) of\b", None),
    (r"\bon top of\b|\bhigher than\b", "above"),
    (r"\blower than\b|\bat the bottom of\b", "below"),
    (r"\b(above|below|under|beneath|underneath|over|atop)\b", None),
]
"""Patterns of relations between two objects, each with the relation, or with None if a group matches the relation."""
PLACE_PATTERNS = [
    (r"\bin the (?:middle|center|centre)\b|\bbetween\b|\bin between\b", "middle"),
    (
        r"\b(?:on|at|to|in) (?:the )?(?:far )?(left|right|top|bottom)(?:hand)?(?: side)?\b|\b(left|right|top|bottom)\b",
        None,
    ),
]
"""Patterns of the place of one object in the image, each with the place, or with None if a group matches the place."""
SIDE_POSITIONS = {"left": ("left", 0), "right": ("left", 2), "top": ("above", 0), "bottom": ("above", 2)}


@dataclass(frozen=True)
class Facts:
    """The facts that a caption states; ``None`` for facts that are absent or ambiguous."""

    kinds: tuple[str, ...]
    """The kinds that are named, in the order of their first mention."""
    relation: tuple[str, str, str] | None = None
    """(A, ``left`` or ``above``, B) for two kinds: A is to the left of B, or above B."""
    color: str | None = None
    """Color of the background."""
    count: int | None = None
    """Number of objects; None unless exactly one kind is named."""
    size: str | None = None
    order: tuple[str, tuple[str, ...]] | None = None
    """(``left``, the kinds from left to right) or (``above``, the kinds from top to bottom) for three kinds."""


def parse_caption(text: str, kinds: Collection[str] = KINDS) -> Facts:
    """Parse the facts that a caption states. Punctuation, case and words that state no facts are ignored.

    Args:
        text: the caption.
        kinds: the nouns to find. Plurals and :data:`~blip2.data.scene_kinds.SYNONYMS` are found as well.
    """
    words = " ".join(re.findall(r"[a-z0-9]+", text.lower().replace("grey", "gray")))
    nouns = {form: kind for kind in kinds for form in (kind, plural(kind))}
    nouns |= {form: kind for word, kind in SYNONYMS.items() if kind in kinds for form in (word, plural(word))}
    color, words = _parse_color(words, nouns)
    tokens = words.split()
    named = tuple(dict.fromkeys(nouns[token] for token in tokens if token in nouns))
    count, size = _parse_count_and_size(tokens, nouns) if len(named) == 1 else (None, None)
    mentions = _find_mentions(words, nouns)
    relation = _parse_relation(mentions) if len(named) == 2 else None
    order = _parse_order(words, mentions) if len(named) == 3 else None
    return Facts(named, relation, color, count, size, order)


def score_caption(text: str, truth: Truth, kinds: Collection[str] = KINDS) -> dict[str, bool | None]:
    """Judge whether a caption states each fact of an image correctly.

    Facts are judged independently: a caption that names one wrong object can still state the correct relation. An order
    is correct if at most one of the three places has a wrong kind.

    Args:
        text: the caption.
        truth: the facts of the image.
        kinds: the nouns to find in the caption, in addition to those of the image.

    Returns:
        For each of :data:`FACTS`: True if the caption states the fact correctly, False if not, None if the image has no
        such fact.
    """
    facts = parse_caption(text, {*kinds, *truth.kinds})
    scores: dict[str, bool | None] = dict.fromkeys(FACTS)
    scores["objects"] = set(facts.kinds) == set(truth.kinds)
    scores["color"] = facts.color == truth.color
    if truth.type == "pair":
        scores["relation"] = facts.relation is not None and (
            facts.relation[1] == truth.relation
            and (facts.relation[0] == truth.kinds[0] or facts.relation[2] == truth.kinds[1])
        )
    elif truth.type == "triple":
        axis, order = facts.order or ("", ())
        right = sum(named == kind for named, kind in zip(order, truth.kinds, strict=False))
        scores["order"] = axis == truth.relation and right >= len(truth.kinds) - 1
    else:
        scores["count"] = facts.count == truth.count
        scores["size"] = facts.size == truth.size if truth.size else None
    return scores


def _parse_color(words: str, nouns: Collection[str]) -> tuple[str | None, str]:
    """Return the color of the background, and the words without phrases about the background or the whole image."""
    colors = "|".join(COLORS)
    ground = r"(?:background|backdrop|ground|surface|wall)"
    between = r"(?:(?:is|was|in|of|color|a|all|very|light|dark|bright|plain|solid|mostly) )*"
    noun = rf"(?!\s+(?:{'|'.join(sorted(nouns))})\b)"
    words = re.sub(r"\b(?:of|in|on) (?:the|this) (?:image|picture|photo|scene|frame)\b", "", words)
    if re.search(rf"\b({colors}) (?:and|or) ({colors})(?: \w+)?? {ground}\b", words):
        return None, words
    for pattern in (
        rf"\b(?:(?:on|against|with|in front of|over|has|and) )?(?:an? |the )?({colors})(?: \w+)?? {ground}\b",
        rf"\b(?:(?:on|against|with|and) )?(?:an? |the )?{ground} {between}({colors})\b{noun}",
        rf"\b(?:on|against|over|in front of) (?:an? |the )?({colors})\b{noun}",
    ):
        found = re.findall(pattern, words)
        if found:
            color = found[0] if len(set(found)) == 1 else None
            return color, re.sub(pattern, " | ", words)
    return None, words


def _parse_count_and_size(tokens: list[str], nouns: dict[str, str]) -> tuple[int | None, str | None]:
    """Return the count and the size of objects in a caption that names one kind."""
    counts: list[int] = []
    sizes: set[str] = set()
    singular = False
    for i, token in enumerate(tokens):
        if token not in nouns:
            continue
        count = None
        for before in reversed(tokens[max(0, i - 4) : i]):
            if before in nouns or before == "|" or before in ("is", "are", "with", "on"):
                break
            if before in SIZE_WORDS:
                sizes.add(SIZE_WORDS[before])
            if before in COUNT_WORDS and (count is None or before in ("pair", "couple")):
                count = COUNT_WORDS[before]
        if count is not None:
            counts.append(count)
        else:
            singular |= token != plural(token) and token in (nouns[token], *SYNONYMS)  # as in "the cat"
        after = tokens[i + 1 : i + 4]
        if len(after) > 1 and after[0] in ("is", "are", "looks"):
            sizes |= {SIZE_WORDS[word] for word in after[1:] if word in SIZE_WORDS}
    count = counts[0] if counts else 1 if singular else None
    if len(counts) > 1 and (len(set(counts)) > 1 or count == 1):  # "a cat and a cat"
        count = None
    return count, (sizes.pop() if len(sizes) == 1 else None)


def _find_mentions(words: str, nouns: dict[str, str]) -> list[tuple[str, str]]:
    """Return ("noun", kind), ("relation", word) and ("place", word) for the phrases of a caption, in their order."""
    found: list[tuple[int, str, str]] = []
    taken = [False] * len(words)
    patterns = [(p, m, "relation") for p, m in RELATION_PATTERNS] + [(p, m, "place") for p, m in PLACE_PATTERNS]
    for pattern, meaning, sort in patterns:
        for match in re.finditer(pattern, words):
            if any(taken[match.start() : match.end()]):
                continue
            taken[match.start() : match.end()] = [True] * (match.end() - match.start())
            found.append((match.start(), sort, meaning or next(group for group in match.groups() if group)))
    for match in re.finditer(r"\w+", words):
        if match[0] in nouns and not taken[match.start()]:
            found.append((match.start(), "noun", nouns[match[0]]))
    return [(sort, word) for _, sort, word in sorted(found)]


def _explicit_relations(mentions: list[tuple[str, str]]) -> set[tuple[str, str, str]]:
    """Return the relations between two kinds that a caption states with a relation word, such as "above".

    Args:
        mentions: the phrases of the caption, as :func:`_find_mentions` returns them.

    Returns:
        Triples as in :attr:`Facts.relation`.
    """
    out = set()
    for i, (sort, word) in enumerate(mentions):
        if sort != "relation":
            continue
        axis, turned = RELATION_AXES[word]
        after = [kind for what, kind in mentions[i + 1 :] if what == "noun"]
        before = [kind for what, kind in mentions[:i] if what == "noun"]
        if before and after:
            y = after[0]
            x = next((kind for kind in reversed(before) if kind != y), y)
        elif len(after) > 1:  # "above a cat is a dog"
            y, x = after[:2]
        else:
            continue
        if x != y:
            out.add((y, axis, x) if turned else (x, axis, y))
    return out


def _explicit_places(mentions: list[tuple[str, str]]) -> dict[str, str]:
    """Return the place of each kind: the place after the noun, or before the noun if a caption begins with a place."""
    mentions = [mark for mark in mentions if mark[0] != "relation"]
    places_first = bool(mentions) and mentions[0][0] == "place"
    out: dict[str, str] = {}
    for (sort, word), (next_sort, next_word) in pairwise(mentions):
        if places_first and (sort, next_sort) == ("place", "noun"):
            out.setdefault(next_word, word)
        elif not places_first and (sort, next_sort) == ("noun", "place"):
            out.setdefault(word, next_word)
    return out


def _parse_relation(mentions: list[tuple[str, str]]) -> tuple[str, str, str] | None:
    """Return the relation of two kinds; None if the caption states no relation or contradictory ones."""
    stated = _explicit_relations(mentions)
    if not stated:
        kinds = list(dict.fromkeys(word for sort, word in mentions if sort == "noun"))
        for kind, place in _explicit_places(mentions).items():
            if place in SIDE_POSITIONS:
                axis, where = SIDE_POSITIONS[place]
                other = kinds[1 - kinds.index(kind)]
                stated.add((kind, axis, other) if where == 0 else (other, axis, kind))
    return stated.pop() if len(stated) == 1 else None


def _parse_order(words: str, mentions: list[tuple[str, str]]) -> tuple[str, tuple[str, ...]] | None:
    """Return the order of three kinds; None if the caption states no order or contradictory places."""
    kinds = tuple(dict.fromkeys(word for sort, word in mentions if sort == "noun"))
    direction = re.search(r"\b(left|top|right|bottom) to (?:the )?(left|top|right|bottom)\b", words)
    if direction and direction[1] != direction[2]:
        axis, start = SIDE_POSITIONS[direction[1]]
        if axis == SIDE_POSITIONS[direction[2]][0]:
            return axis, kinds if start == 0 else kinds[::-1]
    placed = _explicit_places(mentions)
    axes = {SIDE_POSITIONS[place][0] for place in placed.values() if place in SIDE_POSITIONS}
    at = {kind: SIDE_POSITIONS[place][1] if place in SIDE_POSITIONS else 1 for kind, place in placed.items()}
    if len(at) == 2 and len(kinds) == 3:  # the third kind is at the remaining place
        at[next(kind for kind in kinds if kind not in at)] = 3 - sum(at.values())
    if len(axes) == 1 and sorted(at.values()) == [0, 1, 2]:
        return axes.pop(), tuple(sorted(kinds, key=at.__getitem__))
    stated = _explicit_relations(mentions)
    if len({axis for _, axis, _ in stated}) == 1:
        later = {kind: {second for first, _, second in stated if first == kind} for kind in kinds}
        for a in kinds:
            for b in later[a]:
                for c in later[b] - {a, b}:
                    return next(iter(stated))[1], (a, b, c)
    return None

"""The truth of a scene, and the captions and questions that are generated from the truth."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from blip2.data.scene_kinds import plural, with_article

RELATION_PHRASES = {
    ("left", 0): ("to the left of", "left of"),
    ("left", 1): ("to the right of", "right of"),
    ("above", 0): ("above",),
    ("above", 1): ("below", "under"),
}
"""Phrases of a relation, by (``left`` or ``above``, 0 if the first object is named first and 1 if the second is)."""
PLACE_PHRASES = {"left": ("on the left", "on the right"), "above": ("at the top", "at the bottom")}
DIRECTIONS = {"left": ("left", "right"), "above": ("above", "below")}
ENDS = {"left": ("left", "right"), "above": ("top", "bottom")}
NUMBER_WORDS = ("zero", "one", "two", "three")
CAPTIONS_PER_IMAGE = 4
"""Number of captions per image."""


@dataclass(frozen=True)
class Truth:
    """All facts about an image. Facts that the image does not have are empty or 0, so that all rows have one schema."""

    type: str
    """``pair``, ``count``, ``single`` or ``triple``."""
    color: str
    """Name of the color of the background."""
    texture: str
    """Name of the texture of the background."""
    kinds: tuple[str, ...]
    """Kinds from left to right or from top to bottom; one kind for the types ``count`` and ``single``."""
    relation: str
    """``left`` or ``above``: relation of each kind to the next kind; empty if there is one kind."""
    count: int
    """Number of objects if there is one kind; 0 if there are several kinds."""
    size: str
    """``small`` or ``large`` for the type ``single``, otherwise empty."""
    cutouts: tuple[str, ...] = ()
    """Name of the cut-out of each object."""
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    """Left, top, right and bottom of each object in pixels; right and bottom are exclusive."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(row: dict[str, Any]) -> Truth:
        """Create the truth of a scene from the column ``truth`` of its row."""
        lists = {name: tuple(row[name]) for name in ("kinds", "cutouts")}
        return Truth(**{**row, **lists, "boxes": tuple(tuple(box) for box in row["boxes"])})


def sentence(text: str) -> str:
    """Capitalize the first letter of a text and add a period."""
    return f"{text[0].upper()}{text[1:]}."


# -- captions ------------------------------------------------------------------------------------------------------

PAIR_TEMPLATES = (
    "{x} {relation} {y} on {color_background}",
    "{x} {relation} {y}, on {color}",
    "on {color_background}, {x} is {relation} {y}",
    "there is {x} {place_x} and {y} {place_y}; the background is {color}",
    "{x} {place_x} and {y} {place_y}, on {color_background}",
    "the background is {color}, and {x} is {relation} {y}",
    "{x} can be seen {relation} {y} against {color_background}",
    "{place_x} is {x}, {place_y} is {y}, and the background is {color}",
)
"""Templates of captions of pairs. Each template names ``x`` before ``y``."""
INVERTED_PAIR_TEMPLATE = "{relation} {y} is {x}, on {color_background}"
SINGLE_KIND_TEMPLATES = (
    "{things} on {color_background}",
    "{there} {things}; the background is {color}",
    "{color_background} with {things}",
    "{things}, on {color}",
    "on {color_background}, {there} {things}",
    "{things} can be seen against {color_background}",
    "the background is {color}, and {there} {things}",
)
TRIPLE_TEMPLATES = (
    "from {start} to {end}: {a}, {b} and {c}, on {color_background}",
    "{a} {place_a}, {b} in the middle and {c} {place_c}, on {color}",
    "on {color_background}, from {start} to {end}, {a}, {b} and {c}",
    "{b} between {a} {place_a} and {c} {place_c}, on {color}",
    "{place_a} is {a}, then {b}, and {place_c} {c}, on {color}",
)


def write_captions(truth: Truth, rng: np.random.Generator) -> list[str]:
    """Generate :data:`CAPTIONS_PER_IMAGE` captions with different templates.

    If there are several kinds, half of the captions name the kinds in reverse order.
    """
    templates = {"pair": PAIR_TEMPLATES, "triple": TRIPLE_TEMPLATES}.get(truth.type, SINGLE_KIND_TEMPLATES)
    chosen = rng.choice(len(templates), CAPTIONS_PER_IMAGE, replace=False)
    inverted = rng.permutation([False, False, True, True])
    return [_caption(truth, templates[i], bool(turn), rng) for i, turn in zip(chosen, inverted, strict=True)]


def describe(truth: Truth) -> str:
    """Return the canonical caption, which always states the facts of a scene in the same words and order."""
    template = {"pair": PAIR_TEMPLATES[0], "triple": TRIPLE_TEMPLATES[0]}.get(truth.type, SINGLE_KIND_TEMPLATES[0])
    return _caption(truth, template, False, None)


def _caption(truth: Truth, template: str, inverted: bool, rng: np.random.Generator | None) -> str:
    """Fill in a template. If `rng` is given, some words are drawn at random; otherwise the words are fixed."""
    words = {"color": truth.color, "color_background": f"{with_article(truth.color)} background"}
    kinds = [with_article(kind) for kind in truth.kinds]
    turn = -1 if inverted else 1
    if truth.type == "pair":
        if rng is not None and template == PAIR_TEMPLATES[0] and rng.random() < 0.5:
            template, inverted = INVERTED_PAIR_TEMPLATE, not inverted  # this template names the other object first
            turn = -turn
        words["x"], words["y"] = kinds[::turn]
        words["place_x"], words["place_y"] = PLACE_PHRASES[truth.relation][::turn]
        phrases = RELATION_PHRASES[truth.relation, int(inverted)]
        words["relation"] = phrases[0 if rng is None else rng.integers(len(phrases))]
    elif truth.type == "triple":
        words["a"], words["b"], words["c"] = kinds[::turn]
        words["place_a"], words["place_c"] = PLACE_PHRASES[truth.relation][::turn]
        words["start"], words["end"] = ENDS[truth.relation][::turn]
    else:
        counts_one = truth.type == "count" and rng is not None and rng.random() < 0.5
        words["things"] = count_words(truth, one=NUMBER_WORDS[1] if counts_one else "")
        words["there"] = "there is" if truth.count == 1 else "there are"
    return sentence(template.format(**words))


def count_words(truth: Truth, one: str = "") -> str:
    """Return a phrase for objects of one kind: ``two cats``, ``a small cat``.

    Args:
        truth: the truth of a scene with one kind.
        one: if this is not empty, a single object is ``one cat``, otherwise ``a cat``.
    """
    noun = truth.kinds[0] if truth.count == 1 else plural(truth.kinds[0])
    noun = f"{truth.size} {noun}".strip()
    if truth.count == 1 and not one:
        return with_article(noun)
    return f"{NUMBER_WORDS[truth.count]} {noun}"


# -- questions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question with an answer of one word."""

    question: str
    answer: str
    type: str
    """``what``, ``color``, ``count``, ``where``, ``size`` or ``yesno``."""
    fact: str
    """Fact that a yes-no question asks about: ``existence``, ``relation``, ``color`` or ``count``. For other questions,
    the same as `type`."""
    image: int
    """Index of the image in its split."""


def make_questions(truth: Truth, image: int, rng: np.random.Generator) -> list[Question]:
    """Generate all questions about an image except yes-no questions, which :class:`YesNoQuestions` generates.

    Args:
        truth: the truth of the image.
        image: the index of the image in its split.
        rng: the random number generator.
    """

    def question(kind: str, text: str, answer: str) -> Question:
        return Question(f"{text}?", answer, kind, kind, image)

    out = []
    if truth.type in ("pair", "triple"):
        i = int(rng.integers(len(truth.kinds) - 1))
        first, second = truth.kinds[i : i + 2]
        inverted = int(rng.integers(2))
        x, y = (second, first) if inverted else (first, second)
        phrase, direction = RELATION_PHRASES[truth.relation, inverted][0], DIRECTIONS[truth.relation]
        if truth.type == "pair":
            out.append(question("what", f"What is {phrase} the {y}", x))
        else:
            places = (PLACE_PHRASES[truth.relation][0], "in the middle", PLACE_PHRASES[truth.relation][1])
            place = int(rng.integers(3))
            out.append(question("what", f"What is {places[place]}", truth.kinds[place]))
        if rng.random() < 0.5:
            text = f"Where is the {x}, relative to the {y}"
        else:
            one, other = rng.permutation(direction)
            two = f"to the {one} or to the {other} of" if truth.relation == "left" else f"{one} or {other}"
            text = f"Is the {x} {two} the {y}"
        out.append(question("where", text, direction[inverted]))
    else:
        out.append(question("what", "What is in the image", truth.kinds[0]))
    if truth.type == "count":
        out.append(question("count", f"How many {plural(truth.kinds[0])} are there", NUMBER_WORDS[truth.count]))
    if truth.type == "single":
        one, other = rng.permutation(["small", "large"])
        out.append(question("size", f"Is the {truth.kinds[0]} {one} or {other}", truth.size))
    out.append(question("color", "What color is the background", truth.color))
    return out


class YesNoQuestions:
    """Generates yes-no questions whose words do not reveal the answer.

    A question about existence or color with the answer yes is stored, and asked again about a later image for which the
    answer is no. Every kind and every color is therefore named equally often with both answers. Questions about
    relations and counts name the kinds of the image itself; of every two consecutive questions, one has the answer yes.

    Args:
        allowed_counts: for each kind of object, the counts that a question may ask about ("Are there two cats?").
    """

    MAX_WAITING = 12
    """If this number of questions about a fact is stored, a stored one is asked whenever its answer would be no."""

    def __init__(self, allowed_counts: dict[str, list[int]]) -> None:
        self._allowed_counts = allowed_counts
        self._waiting: dict[str, list[tuple[str, Question]]] = {}
        self._unpaired: dict[str, Question] = {}

    def make(self, truth: Truth, image: int, rng: np.random.Generator) -> list[Question]:
        out = []
        kind = truth.kinds[int(rng.integers(len(truth.kinds)))]
        out.append(
            self._direct_or_deferred("existence", kind, f"Is there {with_article(kind)}?", truth.kinds, image, rng)
        )
        if truth.type in ("pair", "triple"):
            out.append(self._relation(truth, image, rng))
        if truth.type == "count":
            out += self._count(truth, image, rng)
        if truth.type == "single" or rng.random() < 0.4:
            text = f"Is the background {truth.color}?"
            out.append(self._direct_or_deferred("color", truth.color, text, (truth.color,), image, rng))
        return out

    def unpaired(self) -> set[Question]:
        """Return the questions that have no counterpart with the opposite answer, and therefore have to be removed."""
        waiting = {question for kept in self._waiting.values() for _, question in kept}
        return waiting | set(self._unpaired.values())

    def _direct_or_deferred(
        self, fact: str, value: str, text: str, true: tuple[str, ...], image: int, rng: np.random.Generator
    ) -> Question:
        waiting = self._waiting.setdefault(fact, [])
        others = [i for i, (kept, _) in enumerate(waiting) if kept not in true]
        if others and (len(waiting) >= self.MAX_WAITING or rng.random() < 0.5):
            _, asked = waiting.pop(others[int(rng.integers(len(others)))])
            return Question(asked.question, "no", "yesno", fact, image)
        question = Question(text, "yes", "yesno", fact, image)
        waiting.append((value, question))
        return question

    def _add(self, fact: str, image: int, texts: tuple[str, str], rng: np.random.Generator) -> Question:
        """Choose one of two texts, whose answers are yes and no.

        Of every two consecutive questions about a fact, one has the answer yes.
        """
        before = self._unpaired.pop(fact, None)
        yes = before.answer == "no" if before else bool(rng.integers(2))
        question = Question(texts[0] if yes else texts[1], "yes" if yes else "no", "yesno", fact, image)
        if before is None:
            self._unpaired[fact] = question
        return question

    def _relation(self, truth: Truth, image: int, rng: np.random.Generator) -> Question:
        i, inverted = int(rng.integers(len(truth.kinds) - 1)), int(rng.integers(2))
        x, y = truth.kinds[i : i + 2][:: -1 if inverted else 1]
        yes, no = (
            f"Is the {x} {RELATION_PHRASES[truth.relation, way][0]} the {y}?" for way in (inverted, 1 - inverted)
        )
        return self._add("relation", image, (yes, no), rng)

    def _count(self, truth: Truth, image: int, rng: np.random.Generator) -> list[Question]:
        kind = truth.kinds[0]
        others = [n for n in self._allowed_counts.get(kind, [1, 2, 3]) if n != truth.count]
        if not others:
            return []
        yes, no = (
            f"Is there exactly one {kind}?" if n == 1 else f"Are there exactly {NUMBER_WORDS[n]} {plural(kind)}?"
            for n in (truth.count, others[int(rng.integers(len(others)))])
        )
        return [self._add("count", image, (yes, no), rng)]


# -- twins ---------------------------------------------------------------------------------------------------------


def write_twins(truths: tuple[Truth, Truth], twin_type: str, rng: np.random.Generator) -> tuple[str, str]:
    """Generate a caption for each of two twins. The captions differ only in the fact in which the images differ.

    Args:
        truths: the truths of the two images.
        twin_type: the fact in which the images differ: ``order``, ``relation``, ``color`` or ``count``.
        rng: the random number generator.
    """
    templates = SINGLE_KIND_TEMPLATES if twin_type == "count" else PAIR_TEMPLATES
    if twin_type == "relation":
        templates = tuple(template for template in PAIR_TEMPLATES if "{relation}" in template)
    template, inverted = templates[int(rng.integers(len(templates)))], bool(rng.integers(2))
    state = rng.bit_generator.state
    first = _caption(truths[0], template, inverted, rng)
    rng.bit_generator.state = state
    return first, _caption(truths[1], template, inverted != (twin_type == "relation"), rng)

"""The truth of a scene, and the captions and questions that are made of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from blip2.data.scene_kinds import plural, with_article

SAID = {
    ("left", 0): ("to the left of", "left of"),
    ("left", 1): ("to the right of", "right of"),
    ("above", 0): ("above",),
    ("above", 1): ("below", "under"),
}
"""Words for a relation, by its axis and by whether the second object is named first."""
PLACES = {"left": ("on the left", "on the right"), "above": ("at the top", "at the bottom")}
DIRECTIONS = {"left": ("left", "right"), "above": ("above", "below")}
ENDS = {"left": ("left", "right"), "above": ("top", "bottom")}
NUMBERS = ("zero", "one", "two", "three")
CAPTIONS = 4
"""Captions of an image."""


@dataclass(frozen=True)
class Truth:
    """Everything that captions and questions can say of an image. Nothing is null, so that all rows have one schema."""

    type: str
    """``pair``, ``count``, ``single`` or ``triple``."""
    color: str
    """Name of the background's color."""
    texture: str
    """How the background is drawn."""
    kinds: tuple[str, ...]
    """Kinds in their order, from left to right or from top to bottom; one of counts and single objects."""
    relation: str
    """``left`` or ``above``: how each of several kinds lies to the next one; empty where there is one kind."""
    count: int
    """Objects of the one kind; 0 where there are several kinds."""
    size: str
    """``small`` or ``large`` of single objects, else empty."""
    cutouts: tuple[str, ...] = ()
    """Name of the cut-out of each object."""
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    """Left, top, right and bottom of each object in pixels; right and bottom lie behind the last one."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of_json(row: dict[str, Any]) -> Truth:
        """From a row's ``truth``."""
        lists = {name: tuple(row[name]) for name in ("kinds", "cutouts")}
        return Truth(**{**row, **lists, "boxes": tuple(tuple(box) for box in row["boxes"])})


def sentence(text: str) -> str:
    """The text with a capital and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


# -- captions ------------------------------------------------------------------------------------------------------

RELATED = (
    "{x} {said} {y} on {color_background}",
    "{x} {said} {y}, on {color}",
    "on {color_background}, {x} is {said} {y}",
    "there is {x} {place_x} and {y} {place_y}; the background is {color}",
    "{x} {place_x} and {y} {place_y}, on {color_background}",
    "the background is {color}, and {x} is {said} {y}",
    "{x} can be seen {said} {y} against {color_background}",
    "{place_x} is {x}, {place_y} is {y}, and the background is {color}",
)
"""Captions of pairs that name first what they are about."""
FRONTED = "{said} {y} is {x}, on {color_background}"
COUNTED = (
    "{things} on {color_background}",
    "{there} {things}; the background is {color}",
    "{color_background} with {things}",
    "{things}, on {color}",
    "on {color_background}, {there} {things}",
    "{things} can be seen against {color_background}",
    "the background is {color}, and {there} {things}",
)
ROWS = (
    "from {start} to {end}: {a}, {b} and {c}, on {color_background}",
    "{a} {place_a}, {b} in the middle and {c} {place_c}, on {color}",
    "on {color_background}, from {start} to {end}, {a}, {b} and {c}",
    "{b} between {a} {place_a} and {c} {place_c}, on {color}",
    "{place_a} is {a}, then {b}, and {place_c} {c}, on {color}",
)


def write_captions(truth: Truth, rng: np.random.Generator) -> list[str]:
    """Four captions in different words; where there are several objects two name the first before the last."""
    patterns = {"pair": RELATED, "triple": ROWS}.get(truth.type, COUNTED)
    chosen = rng.choice(len(patterns), CAPTIONS, replace=False)
    turned = rng.permutation([False, False, True, True])
    return [_caption(truth, patterns[i], bool(turn), rng) for i, turn in zip(chosen, turned, strict=True)]


def describe(truth: Truth) -> str:
    """Return the one sentence that always says a scene's facts in the same words and order."""
    pattern = {"pair": RELATED[0], "triple": ROWS[0]}.get(truth.type, COUNTED[0])
    a = with_article(truth.color)
    if truth.type == "pair":
        x, y = map(with_article, truth.kinds)
        text = pattern.format(x=x, said=SAID[truth.relation, 0][0], y=y, color_background=f"{a} background")
    elif truth.type == "triple":
        start, end = ENDS[truth.relation]
        first, second, third = map(with_article, truth.kinds)
        named = {"a": first, "b": second, "c": third}
        text = pattern.format(start=start, end=end, color_background=f"{a} background", **named)
    else:
        text = pattern.format(things=count_words(truth), color_background=f"{a} background")
    return sentence(text)


def _caption(truth: Truth, pattern: str, turned: bool, rng: np.random.Generator) -> str:
    color = {"color": truth.color, "color_background": f"{with_article(truth.color)} background"}
    kinds = [with_article(kind) for kind in truth.kinds]
    if truth.type == "pair":
        if pattern == RELATED[0] and rng.random() < 0.5:
            pattern, turned = FRONTED, not turned  # which names the other one first
        x, y = reversed(kinds) if turned else kinds
        said = SAID[truth.relation, int(turned)]
        place_x, place_y = reversed(PLACES[truth.relation]) if turned else PLACES[truth.relation]
        words = {"x": x, "y": y, "said": said[rng.integers(len(said))], "place_x": place_x, "place_y": place_y}
    elif truth.type == "triple":
        a, b, c = reversed(kinds) if turned else kinds
        places, ends = PLACES[truth.relation], ENDS[truth.relation]
        (place_a, place_c), (start, end) = (places[::-1], ends[::-1]) if turned else (places, ends)
        words = {"a": a, "b": b, "c": c, "place_a": place_a, "place_c": place_c, "start": start, "end": end}
    else:
        things = count_words(truth, one=NUMBERS[1] if truth.type == "count" and rng.random() < 0.5 else "")
        words = {"things": things, "there": "there is" if truth.count == 1 else "there are"}
    return sentence(pattern.format(**color, **words))


def count_words(truth: Truth, one: str = "") -> str:
    """The objects of one kind: ``two cats``, ``a small cat``.

    Args:
        one: the number before one object; an article where it is empty.
    """
    noun = truth.kinds[0] if truth.count == 1 else plural(truth.kinds[0])
    noun = f"{truth.size} {noun}".strip()
    if truth.count == 1 and not one:
        return with_article(noun)
    return f"{NUMBERS[truth.count]} {noun}"


# -- questions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question with the one word that answers it."""

    question: str
    answer: str
    type: str
    """``what``, ``color``, ``count``, ``where``, ``size`` or ``yesno``."""
    about: str
    """The fact that a question of yes and no is about: ``existence``, ``relation``, ``color`` or ``count``; of other
    questions the type again."""
    image: int
    """Number of the image."""


def ask(truth: Truth, image: int, rng: np.random.Generator) -> list[Question]:
    """The questions of an image whose answers are words; :class:`Doubts` asks those of yes and no."""

    def question(kind: str, text: str, answer: str) -> Question:
        return Question(f"{text}?", answer, kind, kind, image)

    out = []
    if truth.type in ("pair", "triple"):
        i = int(rng.integers(len(truth.kinds) - 1))
        first, second = truth.kinds[i : i + 2]
        turned = int(rng.integers(2))
        x, y = (second, first) if turned else (first, second)
        said, direction = SAID[truth.relation, turned][0], DIRECTIONS[truth.relation]
        if truth.type == "pair":
            out.append(question("what", f"What is {said} the {y}", x))
        else:
            places = (PLACES[truth.relation][0], "in the middle", PLACES[truth.relation][1])
            place = int(rng.integers(3))
            out.append(question("what", f"What is {places[place]}", truth.kinds[place]))
        if rng.random() < 0.5:
            text = f"Where is the {x}, relative to the {y}"
        else:
            one, other = rng.permutation(direction)
            two = f"to the {one} or to the {other} of" if truth.relation == "left" else f"{one} or {other}"
            text = f"Is the {x} {two} the {y}"
        out.append(question("where", text, direction[turned]))
    else:
        out.append(question("what", "What is in the image", truth.kinds[0]))
    if truth.type == "count":
        out.append(question("count", f"How many {plural(truth.kinds[0])} are there", NUMBERS[truth.count]))
    if truth.type == "single":
        one, other = rng.permutation(["small", "large"])
        out.append(question("size", f"Is the {truth.kinds[0]} {one} or {other}", truth.size))
    out.append(question("color", "What color is the background", truth.color))
    return out


class Doubts:
    """Asks questions of yes and no so that their words tell nothing of the answer.

    A fact of one image is asked as a question whose answer is yes, kept, and asked again of a later image of which it
    is not true: so whatever is named is named as often in both. Of relations both are asked of each image's own kinds.
    """

    WAITING = 12
    """So many facts of a sort wait at most."""

    def __init__(self, allowed_counts: dict[str, list[int]]) -> None:
        """``allowed_counts``: of each kind the counts that may be named."""
        self._allowed_counts = allowed_counts
        self._waiting: dict[str, list[tuple[str, Question]]] = {}
        self._unpaired: dict[str, Question] = {}

    def ask(self, truth: Truth, image: int, rng: np.random.Generator) -> list[Question]:
        out = []
        kind = truth.kinds[int(rng.integers(len(truth.kinds)))]
        out.append(self._own_or_kept("existence", kind, f"Is there {with_article(kind)}?", truth.kinds, image, rng))
        if truth.type in ("pair", "triple"):
            out.append(self._relation(truth, image, rng))
        if truth.type == "count":
            out += self._count(truth, image, rng)
        if truth.type == "single" or rng.random() < 0.4:
            text = f"Is the background {truth.color}?"
            out.append(self._own_or_kept("color", truth.color, text, (truth.color,), image, rng))
        return out

    def left_over(self) -> set[Question]:
        """Questions without one that answers them the other way, to be left out for the balance."""
        waiting = {question for kept in self._waiting.values() for _, question in kept}
        return waiting | set(self._unpaired.values())

    def _own_or_kept(
        self, about: str, fact: str, text: str, true: tuple[str, ...], image: int, rng: np.random.Generator
    ) -> Question:
        waiting = self._waiting.setdefault(about, [])
        others = [i for i, (kept, _) in enumerate(waiting) if kept not in true]
        if others and (len(waiting) >= self.WAITING or rng.random() < 0.5):
            _, asked = waiting.pop(others[int(rng.integers(len(others)))])
            return Question(asked.question, "no", "yesno", about, image)
        question = Question(text, "yes", "yesno", about, image)
        waiting.append((fact, question))
        return question

    def _add(self, about: str, image: int, texts: tuple[str, str], rng: np.random.Generator) -> Question:
        """One of two texts, whose answers are yes and no: of two questions that follow each other one is yes."""
        before = self._unpaired.pop(about, None)
        yes = before.answer == "no" if before else bool(rng.integers(2))
        question = Question(texts[0] if yes else texts[1], "yes" if yes else "no", "yesno", about, image)
        if before is None:
            self._unpaired[about] = question
        return question

    def _relation(self, truth: Truth, image: int, rng: np.random.Generator) -> Question:
        i, turned = int(rng.integers(len(truth.kinds) - 1)), int(rng.integers(2))
        x, y = truth.kinds[i : i + 2][:: -1 if turned else 1]
        yes, no = (f"Is the {x} {SAID[truth.relation, way][0]} the {y}?" for way in (turned, 1 - turned))
        return self._add("relation", image, (yes, no), rng)

    def _count(self, truth: Truth, image: int, rng: np.random.Generator) -> list[Question]:
        kind = truth.kinds[0]
        others = [n for n in self._allowed_counts.get(kind, [1, 2, 3]) if n != truth.count]
        if not others:
            return []
        yes, no = (
            f"Is there exactly one {kind}?" if n == 1 else f"Are there exactly {NUMBERS[n]} {plural(kind)}?"
            for n in (truth.count, others[int(rng.integers(len(others)))])
        )
        return [self._add("count", image, (yes, no), rng)]


# -- twins ---------------------------------------------------------------------------------------------------------


def write_twins(truths: tuple[Truth, Truth], twin_type: str, rng: np.random.Generator) -> tuple[str, str]:
    """A caption for each of two images in the same words, but for the word or the order that tells them apart.

    Args:
        twin_type: ``order``, ``relation``, ``color`` or ``count``.
    """
    patterns = COUNTED if twin_type == "count" else RELATED
    if twin_type == "relation":
        patterns = tuple(pattern for pattern in RELATED if "{said}" in pattern)
    pattern, turned = patterns[int(rng.integers(len(patterns)))], bool(rng.integers(2))
    state = rng.bit_generator.state
    first = _caption(truths[0], pattern, turned, rng)
    rng.bit_generator.state = state
    return first, _caption(truths[1], pattern, turned != (twin_type == "relation"), rng)

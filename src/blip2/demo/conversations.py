"""The page of the demo's conversations: instructed generation and its mistakes, as in the paper's Figures 4 and 6."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from blip2.data.scene_facts import parse_caption
from blip2.data.scene_kinds import COLORS, STAMPS
from blip2.data.scene_texts import Truth
from blip2.decoding.options import Decoding
from blip2.demo.report import DemoResults, is_close, is_right, wrong_facts
from blip2.evaluation.report import Card, Report
from blip2.pipelines import Alternative, Explanation, GenerationPipeline, draw_attention
from blip2.pipelines.chat import CHAT_TEMPLATE

FOLLOW_UP = Decoding(num_beams=1, max_new_tokens=32, no_repeat_ngram_size=4)
DESCRIBE = "Describe the image."
COLOR = "What color is the background?"
ANIMAL = "Which of them is an animal?"
STORY = "Write a short story about the image."
ANIMALS = frozenset(kind for kind, stamps in STAMPS.items() if stamps[0].startswith("animals/"))
"""The kinds that are animals: those of Tux Paint's folder of animals."""
MIN_GAIN = 1.0
"""Gain of an answer's log-probability from the image, in nats, below which the image is said to hardly matter."""
INTRODUCTION = (
    "Instructed generation, as in Figures 4 and 6 of the paper. The first answer is the caption, in the prompt of"
    " training. The later instructions are zero-shot: the frozen LLM reads the image, the conversation so far and the"
    " instruction in its own chat template, which training never showed. Green answers are right and red ones wrong by"
    " fixed rules on the known content of the image; black ones are not judged. The evidence below each answer: p, the"
    " geometric mean of the probabilities of its tokens, and the same with a blank image (if both are close, the answer"
    " does not come from the image); the least certain token and its most likely alternatives; and the token that gains"
    " most from the image. Bright parts of the image are what the queries that speak for this token looked at."
)
WRONG_TEXT = (
    "All wrong answers from above, and the first wrong answers of the model that was trained on questions, the most"
    " certain answers first. After the truth stands what the evidence says about the cause."
)


@dataclass(frozen=True)
class Turn:
    """An instruction about an image, and the model's answer with its evidence."""

    image: Image.Image
    instruction: str
    answer: str
    found: Explanation
    mistake: str | None = None
    """The mistake in the answer, with the truth; empty if the answer is right, None if there is no truth."""

    @property
    def confidence(self) -> float:
        """Return the geometric mean of the probabilities of the tokens."""
        return _mean_probability(self.found.token_log_probs)

    @property
    def cause(self) -> str:
        """Return what the evidence says about the cause of a mistake."""
        if math.fsum(self.found.token_log_probs) - math.fsum(self.found.blank_log_probs) < MIN_GAIN:
            return "the image hardly matters"
        return "the model is uncertain" if min(self.found.token_log_probs) < math.log(0.5) else "the model is certain"

    def card(self) -> Card:
        """Return the image, darkened where the queries did not look, and the lines of text below it."""
        found = self.found
        pairs = list(zip(found.token_log_probs, found.blank_log_probs, strict=True))
        words = [i for i, token in enumerate(found.tokens) if token.strip() in self.answer]  # without the end token
        seen = max(words or range(len(pairs)), key=lambda i: pairs[i][0] - pairs[i][1])
        unsure = min(range(len(pairs)), key=lambda i: pairs[i][0])
        tokens = [Alternative(found.tokens[unsure], pairs[unsure][0]), *found.alternatives[unsure][:3]]
        choices = ", ".join(f"{each.text.strip() or repr(each.text)} {math.exp(each.log_prob):.2f}" for each in tokens)
        token = found.tokens[seen].strip()
        lines = [
            ("strong", self.instruction),
            ("" if self.mistake is None else "wrong" if self.mistake else "right", self.answer or "(no words)"),
            *([("wrong", f"\N{BALLOT X} {self.mistake.rstrip('.')} ({self.cause})")] if self.mistake else []),
            ("dim", f"p {self.confidence:.2f}, blank image {_mean_probability(found.blank_log_probs):.2f}"),
            ("dim", f"least certain: {choices}"),
            ("dim", f"bright: looked at for \N{LEFT DOUBLE QUOTATION MARK}{token}\N{RIGHT DOUBLE QUOTATION MARK}"),
        ]
        return draw_attention(self.image, found.token_maps()[seen]), lines


def write_conversations(
    path: Path,
    writer: GenerationPipeline,
    answerer: GenerationPipeline | None,
    scenes: DemoResults | None,
    images: DemoResults | None,
    count: int,
) -> None:
    """Write an HTML page of conversations about held-out images, and of the mistakes in them.

    Args:
        path: the HTML file to write.
        writer: the stage-2 model, which holds the conversations.
        answerer: the model that was trained on questions about scenes; None if there is none.
        scenes: results on scenes; None if the demo trained on a user's images.
        images: results on images with captions; None if there are none.
        count: number of conversations about scenes, and of wrong answers of `answerer`. About `images`, there are a
            third as many.
    """
    report = Report("What the model says, and why", INTRODUCTION)
    wrong: list[Turn] = []
    for title, results, number in (
        ("Conversations about held-out compositions", scenes, count),
        ("Conversations about other held-out images", images, math.ceil(count / 3)),
    ):
        if results is None:
            continue
        cards: list[Card] = []
        for i in range(min(number, len(results.features))):
            turns = list(_converse(writer, results, i))
            wrong += [turn for turn in turns if turn.mistake]
            cards += [(turns[0].image, [("", f"Truth: {results.reference(i)}")]), *(turn.card() for turn in turns)]
        report.section(
            title, "A row is a conversation, from left to right. The first image is as the model was given it."
        )
        report.cards(cards, columns=5)
    if answerer is not None and scenes is not None:
        wrong += _wrong_answers(answerer, scenes, count)
    report.section("Wrong answers", WRONG_TEXT)
    report.cards([turn.card() for turn in sorted(wrong, key=lambda turn: -turn.confidence)], columns=5)
    report.save(path)


def _converse(writer: GenerationPipeline, results: DemoResults, i: int) -> Iterator[Turn]:
    """Yield the turns of a conversation about an image."""
    image, features, caption = results.image(i), results.features[i : i + 1], results.captions["stage 2"][i]
    truth = Truth.from_json(results.rows[i]["truth"]) if results.rows else None
    yield Turn(image, DESCRIBE, caption, writer.explain(features, caption), _caption_mistake(results, i, truth))
    messages = [{"role": "user", "content": DESCRIBE}, {"role": "assistant", "content": caption}]
    chat = writer.chat(features, messages, CHAT_TEMPLATE, FOLLOW_UP)
    for instruction in (COLOR, ANIMAL, STORY):
        answer = chat.ask(instruction)
        yield Turn(image, instruction, answer, chat.explain(), truth and judge(instruction, answer, truth))


def _caption_mistake(results: DemoResults, i: int, truth: Truth | None) -> str:
    caption = results.captions["stage 2"][i]
    if truth is None:
        return "" if is_close(caption, results.reference(i)) else f"it is: {results.reference(i)}"
    wrong = wrong_facts(caption, truth)
    return f"wrong {', '.join(wrong)}: {results.reference(i)}" if wrong else ""


def judge(instruction: str, answer: str, truth: Truth) -> str:
    """Return the mistake in an answer to one of the instructions; empty if it is right."""
    named = set(parse_caption(answer).kinds)
    if instruction == COLOR:
        colors = set(re.findall(r"[a-z]+", answer.lower())) & set(COLORS)
        return "" if colors == {truth.color} else f"it is {truth.color}"
    if instruction == ANIMAL:
        animals = [kind for kind in truth.kinds if kind in ANIMALS]
        return "" if named == set(animals) else f"the animals are: {', '.join(animals) or 'none'}"
    return "" if named & set(truth.kinds) else f"it tells of no {' and no '.join(truth.kinds)}"


def _wrong_answers(answerer: GenerationPipeline, scenes: DemoResults, count: int) -> Iterator[Turn]:
    """Yield the first wrong answers to questions about scenes."""
    asked = [(i, *each) for i, several in sorted(scenes.questions.items()) for each in several]
    wrong = [each for each in asked if not is_right(each[2], each[3])]
    for i, question, answer, expected, _ in wrong[:count]:
        found = answerer.explain(scenes.features[i : i + 1], answer, question=question)
        yield Turn(scenes.image(i), question, answer, found, f"it is {expected}")


def _mean_probability(log_probs: Sequence[float]) -> float:
    return math.exp(math.fsum(log_probs) / len(log_probs))

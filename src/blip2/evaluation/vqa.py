"""Answers to questions, scored as the benchmarks do (paper §4.1, §4.3): VQAv2, OK-VQA and GQA.

Two sets of rules exist, and published numbers are of either:

- ``official``: the scripts of the benchmarks as they are today. VQA's normalizes nothing where all ten people
  gave the same answer: there "Yes" and "a dog" are wrong beside "yes" and "dog". GQA's compares as is.
- ``lavis``: those of the reference implementation. It has an earlier script of VQA, which always normalizes the
  prediction, and never the numbers, articles and contractions of the truth. It normalizes GQA's predictions too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from blip2.errors import InputError
from blip2.evaluation.predictions import Id, check_ids

Rules = Literal["official", "lavis"]

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # neither the apostrophe nor the colon
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = frozenset({"a", "an", "the"})
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, sign in enumerate(word) if sign == "'"
} | {"somebody'd": "somebodyd"}
"""Words without one of their apostrophes, and the words. The last is the official script's own."""


@dataclass(frozen=True)
class Question:
    """What people answered."""

    answers: tuple[str, ...]
    """Ten for VQAv2 and OK-VQA, one for GQA."""
    question_type: str = ""
    """Such as ``how many``; empty: it has none."""
    answer_type: str = ""
    """``yes/no``, ``number`` or ``other``; empty: it has none."""


@dataclass(frozen=True)
class AnswerScores:
    """Shares in [0, 1]."""

    accuracy: float
    by_question_type: dict[str, float]
    by_answer_type: dict[str, float]
    each: dict[Any, float]
    """Of each question, by its id."""


def score_answers(
    predictions: Mapping[Any, str], questions: Mapping[Any, Question], rules: Rules = "official"
) -> AnswerScores:
    """VQA accuracy, of VQAv2 and OK-VQA: see :func:`accuracy`.

    For OK-VQA, whose answers are base forms, the reference implementation puts predictions through :func:`lemmatize`
    first.

    Raises:
        InputError: a question has no prediction or fewer than two answers, or a prediction has no question.
    """
    return _score(predictions, questions, lambda text, question: accuracy(text, question.answers, rules))


def score_exact(
    predictions: Mapping[Any, str], questions: Mapping[Any, Question], rules: Rules = "official"
) -> AnswerScores:
    """Exact match with the one answer, of GQA.

    Raises:
        InputError: a question has no prediction or not one answer, or a prediction has no question.
    """
    several = [key for key, question in questions.items() if len(question.answers) != 1]
    if several:
        raise InputError(
            f"question {several[0]!r} has {len(questions[several[0]].answers)} answers, expected one: VQAv2 and OK-VQA"
            " are scored by score_answers"
        )

    def score(text: str, question: Question) -> float:
        return float((text if rules == "official" else _words(_strip_punctuation(text))) == question.answers[0])

    return _score(predictions, questions, score)


def accuracy(prediction: str, answers: Sequence[str], rules: Rules = "official") -> float:
    """VQA accuracy of one prediction, in [0, 1].

    For each person in turn: a third for each of the others who gave the same answer, at most 1. The mean of that.

    Raises:
        InputError: there are fewer than two answers.
    """
    if len(answers) < 2:
        raise InputError(f"a question has {len(answers)} answers, expected ten: one answer is scored by score_exact")
    prediction = _one_line(prediction)
    if rules == "official":
        answers = [_one_line(answer) for answer in answers]
        if len(set(answers)) > 1:
            prediction, *answers = (_words(_strip_punctuation(text)) for text in (prediction, *answers))
    else:
        prediction = _words(_strip_punctuation(prediction))
        if len(set(answers)) > 1:
            answers = [_strip_punctuation(answer) for answer in answers]
    same = sum(answer == prediction for answer in answers)
    # Those who gave this answer have one fewer beside them.
    return (same * min(1.0, (same - 1) / 3) + (len(answers) - same) * min(1.0, same / 3)) / len(answers)


def normalize(answer: str) -> str:
    """An answer as VQA's scripts compare it.

    In this order: line breaks and tabs are spaces; punctuation is removed, all of it, where it stands beside a space
    somewhere in the answer or where the answer has a number with a comma, and else becomes a space; full stops that
    no digit follows are removed; small letters; number words up to ten, and "none", are digits; articles are removed;
    contractions get their apostrophe.
    """
    return _words(_strip_punctuation(_one_line(answer)))


def lemmatize(answers: Iterable[str]) -> list[str]:
    """Nouns and verbs in their base form, as the reference implementation does for OK-VQA.

    Raises:
        InputError: spaCy or its model en_core_web_sm is not installed. Other base forms would give
            other numbers.
    """
    try:
        import spacy

        model = spacy.load("en_core_web_sm")
    except (ImportError, OSError) as error:
        raise InputError(
            "lemmatized OK-VQA answers need spaCy and its model en_core_web_sm, which are not installed: pip install"
            " spacy && python -m spacy download en_core_web_sm"
        ) from error
    return [
        " ".join(token.lemma_ if token.pos_ in ("NOUN", "VERB") else token.text for token in text)
        for text in model.pipe(answers)
    ]


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _strip_punctuation(text: str) -> str:
    comma = re.search(r"\d,\d", text)
    out = text
    for sign in PUNCTUATION:
        out = out.replace(sign, "" if comma or f"{sign} " in text or f" {sign}" in text else " ")
    return re.sub(r"\.(?!\d)", "", out, count=32)  # the official script passes a flag, which is 32, as the count


def _words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _score(
    predictions: Mapping[Any, str], questions: Mapping[Any, Question], score: Callable[[str, Question], float]
) -> AnswerScores:
    if not questions:
        raise InputError("there are no questions to score, expected at least one")
    check_ids("the predictions", "question_id", predictions, questions)
    each: dict[Id, float] = {}
    by_question_type, by_answer_type = defaultdict(list), defaultdict(list)
    for key, question in questions.items():
        each[key] = score(predictions[key], question)
        by_question_type[question.question_type].append(each[key])
        by_answer_type[question.answer_type].append(each[key])
    return AnswerScores(_mean(each.values()), _means(by_question_type), _means(by_answer_type), each)


def _means(groups: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: _mean(values) for name, values in sorted(groups.items()) if name}


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)

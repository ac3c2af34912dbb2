"""Accuracy of answers as the benchmarks define it (paper §4.1, §4.3): VQAv2, OK-VQA and GQA.

Two sets of rules exist, and published numbers use either:

- ``official``: the current scripts of the benchmarks. The script of VQA normalizes nothing if all ten annotators gave
  the same answer: "Yes" and "a dog" are then wrong if the reference answers are "yes" and "dog". The script of GQA
  compares strings without normalization.
- ``lavis``: the rules of LAVIS, the reference implementation. LAVIS contains an earlier version of the script of VQA,
  which always normalizes the prediction, but never normalizes numbers, articles and contractions in the reference
  answers. LAVIS also normalizes the predictions for GQA.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}
"""Maps contractions that lack an apostrophe to the correct word. The last entry is an error of the official script."""


@dataclass(frozen=True)
class Question:
    """The reference answers of a question."""

    answers: tuple[str, ...]
    """Ten answers for VQAv2 and OK-VQA, one for GQA."""
    question_type: str = ""
    """The question type, such as ``how many``; empty if unknown."""
    answer_type: str = ""
    """``yes/no``, ``number`` or ``other``; empty if unknown."""


@dataclass(frozen=True)
class AnswerScores:
    """Accuracies in [0, 1]."""

    accuracy: float
    by_question_type: dict[str, float]
    by_answer_type: dict[str, float]
    per_question: dict[Any, float]
    """Accuracy of each question, by its id."""


def score_answers(
    predictions: Mapping[Any, str], questions: Mapping[Any, Question], rules: Rules = "official"
) -> AnswerScores:
    """Compute the VQA accuracy of VQAv2 and OK-VQA; see :func:`accuracy`.

    The reference answers of OK-VQA are base forms. LAVIS therefore first applies :func:`lemmatize` to the predictions.

    Args:
        predictions: predicted answers, by question id.
        questions: the questions with their reference answers, by question id.
        rules: the rules for comparing answers.

    Raises:
        InputError: a question has no prediction or fewer than two answers, or a prediction has no question.
    """
    return _score(predictions, questions, lambda text, question: accuracy(text, question.answers, rules))


def score_exact(
    predictions: Mapping[Any, str], questions: Mapping[Any, Question], rules: Rules = "official"
) -> AnswerScores:
    """Compute the exact-match accuracy of GQA, whose questions have one reference answer.

    Args:
        predictions: predicted answers, by question id.
        questions: the questions with their reference answers, by question id.
        rules: the rules for comparing answers.

    Raises:
        InputError: a question has no prediction or several answers, or a prediction has no question.
    """
    several = [key for key, question in questions.items() if len(question.answers) != 1]
    if several:
        raise InputError(
            f"question {several[0]!r} has {len(questions[several[0]].answers)} answers, expected one: use score_answers"
            " for VQAv2 and OK-VQA"
        )

    def score(text: str, question: Question) -> float:
        return float(
            (text if rules == "official" else _normalize_words(_strip_punctuation(text))) == question.answers[0]
        )

    return _score(predictions, questions, score)


def accuracy(prediction: str, answers: Sequence[str], rules: Rules = "official") -> float:
    """Compute the VQA accuracy of one prediction, in [0, 1].

    The accuracy is min(1, n / 3) averaged over all subsets that leave out one annotator, where n is the number of
    annotators in the subset who gave the predicted answer.

    Args:
        prediction: the predicted answer.
        answers: the answers of the annotators.
        rules: the rules for comparing answers.

    Raises:
        InputError: there are fewer than two answers.
    """
    if len(answers) < 2:
        raise InputError(
            f"a question has {len(answers)} answers, expected at least two: use score_exact for questions with one"
            " answer"
        )
    prediction = _one_line(prediction)
    if rules == "official":
        answers = [_one_line(answer) for answer in answers]
        if len(set(answers)) > 1:
            prediction, *answers = (_normalize_words(_strip_punctuation(text)) for text in (prediction, *answers))
    else:
        prediction = _normalize_words(_strip_punctuation(prediction))
        if len(set(answers)) > 1:
            answers = [_strip_punctuation(answer) for answer in answers]
    same = sum(answer == prediction for answer in answers)
    # Leaving out an annotator who gave this answer leaves one match fewer.
    return (same * min(1.0, (same - 1) / 3) + (len(answers) - same) * min(1.0, same / 3)) / len(answers)


def normalize(answer: str) -> str:
    """Normalize an answer as VQA's scripts do before they compare it.

    The steps, in this order: line breaks and tabs become spaces; each punctuation mark is replaced by a space, or
    removed if the mark is next to a space somewhere in the answer or if the answer has a number with a comma; full
    stops that are not followed by a digit are removed; the text becomes lower case; the words for 0 to 10, and "none",
    become digits; articles are removed; contractions get their apostrophes.
    """
    return _normalize_words(_strip_punctuation(_one_line(answer)))


def lemmatize(answers: Iterable[str]) -> list[str]:
    """Replace nouns and verbs by their base forms, as LAVIS does for OK-VQA.

    Raises:
        InputError: spaCy or its model en_core_web_sm is not installed. There is no fallback, because another lemmatizer
            would give different scores.
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
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if comma or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", out, count=32)  # the official script passes re.UNICODE, which is 32, as the count


def _normalize_words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _score(
    predictions: Mapping[Any, str], questions: Mapping[Any, Question], score: Callable[[str, Question], float]
) -> AnswerScores:
    if not questions:
        raise InputError(
            "there are no questions to score, expected at least one: give questions with reference answers"
        )
    check_ids("the predictions", "question_id", predictions, questions)
    per_question: dict[Id, float] = {}
    by_question_type, by_answer_type = defaultdict(list), defaultdict(list)
    for key, question in questions.items():
        per_question[key] = score(predictions[key], question)
        by_question_type[question.question_type].append(per_question[key])
        by_answer_type[question.answer_type].append(per_question[key])
    return AnswerScores(_mean(per_question.values()), _means(by_question_type), _means(by_answer_type), per_question)


def _means(groups: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: _mean(values) for name, values in sorted(groups.items()) if name}


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)

import json
import random
import re
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from blip2.errors import InputError
from blip2.evaluation.vqa import Question, Rules, accuracy, lemmatize, normalize, score_answers, score_exact

FIXTURES = Path(__file__).parents[1] / "fixtures"
TABLE: list[dict[str, str]] = [
    json.loads(line) for line in (FIXTURES / "vqa_answers.jsonl").read_text(encoding="utf-8").splitlines()
]
"""Answers, their normalized form and the rule that each shows, written down from the rules."""


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row['rule']}: {row['answer']!r}")
def test_normalize(row: dict[str, str]) -> None:
    assert normalize(row["answer"]) == row["normalized"]


LISTS = {
    "punctuation between letters is a space": r"x.y",
    "punctuation before a space is removed everywhere": r"x(.)y\1 z",
    "punctuation behind a space is removed everywhere": r"x(.)y \1z",
    "number words are digits": r"[a-z]+",
    "contractions get their apostrophe": r"[a-z]+",
}
"""Rules of which the table goes through every sign or word of the official script's lists."""


def test_two_hundred_answers_are_no_lists() -> None:
    """Which were written one by one, each with what the rules make of it."""
    others = [row for row in TABLE if not re.fullmatch(LISTS.get(row["rule"], "$^"), row["answer"])]
    assert len(others) >= 250
    counts = Counter(row["rule"] for row in others)
    assert set(LISTS) - set(counts) == {rule for rule in LISTS if rule.startswith("punctuation")}


def test_the_table_covers_every_rule() -> None:
    assert len(TABLE) >= 200 and len({row["rule"] for row in TABLE}) >= 25
    assert len({row["answer"] for row in TABLE}) == len(TABLE)


@pytest.mark.parametrize("rules", ["official", "lavis"])
def test_accuracy_of_the_table(rules: Rules) -> None:
    """Where people disagree, an answer is right if its normalized form is what people said."""
    for row in TABLE:
        if row["rule"] == "no more than 32 full stops are removed":
            continue  # more are removed of what remains
        assert accuracy(row["answer"], [row["normalized"]] * 4 + ["zebra"] * 6, rules) == 1.0, row
        assert accuracy(row["answer"], ["giraffe"] * 4 + ["zebra"] * 6, rules) == 0.0, row


@pytest.mark.parametrize(
    ("same", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (5, 1.0), (9, 1.0), (10, 1.0)]
)
def test_accuracy_by_how_many_agree(same: int, expected: float) -> None:
    assert accuracy("red", ["red"] * same + ["blue"] * (10 - same)) == pytest.approx(expected)


def test_accuracy_is_the_mean_over_all_sets_of_nine() -> None:
    draw = random.Random(0)
    for _ in range(300):
        answers = [draw.choice(["red", "blue", "dark red", "2"]) for _ in range(10)]
        prediction = draw.choice(["red", "blue", "2", "green"])
        nines = [min(1.0, nine.count(prediction) / 3) for nine in combinations(answers, 9)]
        assert len(nines) == 10
        assert accuracy(prediction, answers) == pytest.approx(sum(nines) / 10)


@pytest.mark.parametrize(
    ("prediction", "answers", "official", "lavis"),
    [
        # Where all agree, the official script normalizes nothing; the earlier one the prediction alone.
        ("Yes", ["yes"] * 10, 0.0, 1.0),
        ("yes.", ["yes"] * 10, 0.0, 1.0),
        ("a dog", ["dog"] * 10, 0.0, 1.0),
        ("a dog", ["a dog"] * 10, 1.0, 0.0),
        ("two", ["two"] * 10, 1.0, 0.0),
        ("none", ["none"] * 10, 1.0, 0.0),
        ("\tyes\n", ["yes"] * 10, 1.0, 1.0),
        ("hot\ndog", ["hot dog"] * 10, 1.0, 1.0),
        ("yes", [" yes\n"] * 10, 1.0, 0.0),
        # Where one differs, everything is normalized; by the earlier one the truth only of punctuation.
        ("Yes.", ["yes"] * 9 + ["no"], 1.0, 1.0),
        ("a dog", ["a dog"] * 9 + ["cat"], 1.0, 0.0),
        ("Two!", ["two"] * 8 + ["2"] * 2, 1.0, 0.6),
        ("red, blue", ["red,blue"] * 5 + ["red, blue"] * 5, 1.0, 1.0),
        ("dont know", ["don't know"] * 3 + ["dont know"] * 7, 1.0, 0.9),
        ("Dog", ["Dog"] * 5 + ["cat"] * 5, 1.0, 0.0),
        # White space around an answer is no difference; to the earlier one it is.
        ("Yes", ["yes", "yes "] * 5, 0.0, 1.0),
        # What is the same only once it is normalized counts together, but it was a difference.
        ("yes", ["Yes.", "yes"] * 5, 1.0, 1.0),
        ("", ["", "a"] * 5, 1.0, 1.0),
    ],
)
def test_rules(prediction: str, answers: list[str], official: float, lavis: float) -> None:
    assert accuracy(prediction, answers) == pytest.approx(official)
    assert accuracy(prediction, answers, "official") == pytest.approx(official)
    assert accuracy(prediction, answers, "lavis") == pytest.approx(lavis)


QUESTIONS = {
    11: Question(("yes",) * 10, "is the", "yes/no"),
    12: Question(("2",) * 2 + ("3",) * 8, "how many", "number"),
    13: Question(("red",) * 5 + ("dark red",) * 5, "what color", "other"),
    14: Question(("no",) * 9 + ("yes",), "is the", "yes/no"),
}


def test_score_answers() -> None:
    scores = score_answers({14: "yes", 13: "Dark Red!", 12: "two", 11: "yes"}, QUESTIONS)
    assert scores.per_question == pytest.approx({11: 1.0, 12: 0.6, 13: 1.0, 14: 0.3})
    assert list(scores.per_question) == [11, 12, 13, 14]
    assert scores.accuracy == pytest.approx(2.9 / 4)
    assert scores.by_question_type == pytest.approx({"is the": 0.65, "how many": 0.6, "what color": 1.0})
    assert scores.by_answer_type == pytest.approx({"yes/no": 0.65, "number": 0.6, "other": 1.0})


def test_questions_without_types() -> None:
    scores = score_answers({1: "yes"}, {1: Question(("yes",) * 10)})
    assert scores.by_question_type == scores.by_answer_type == {}


def test_rules_reach_the_score() -> None:
    questions = {1: Question(("yes",) * 10)}
    assert [score_answers({1: "Yes"}, questions, rules).accuracy for rules in ("official", "lavis")] == [0.0, 1.0]


def test_exact_match() -> None:
    questions = {
        "07": Question(("dog",), "query"),
        "08": Question(("yes",), "verify"),
        "09": Question(("no",), "verify"),
    }
    predictions = {"07": "A dog.", "08": "yes", "09": "yes"}
    official, lavis = score_exact(predictions, questions), score_exact(predictions, questions, "lavis")
    assert official.per_question == {"07": 0.0, "08": 1.0, "09": 0.0}
    assert lavis.per_question == {"07": 1.0, "08": 1.0, "09": 0.0}
    assert lavis.accuracy == pytest.approx(2 / 3)
    assert lavis.by_question_type == {"query": 1.0, "verify": 0.5}
    # The truth stays as it is: what normalizing would change can then never be said.
    assert score_exact({1: "the two"}, {1: Question(("two",))}, "lavis").accuracy == 0.0


@pytest.mark.parametrize("score", [score_answers, score_exact])
@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({}, r"^the predictions: 2 missing question_id \(1, 2\), expected all 2 ids"),
        ({1: "yes"}, r"^the predictions: 1 missing question_id \(2\), expected all 2 ids"),
        ({1: "yes", 2: "no", 5: "no"}, r"^the predictions: 1 unknown question_id \(5\), expected only ids of the data"),
    ],
)
def test_predictions_of_other_questions(score: Any, predictions: dict[int, str], message: str) -> None:
    answers = ("yes",) * (10 if score is score_answers else 1)
    with pytest.raises(InputError, match=message):
        score(predictions, {1: Question(answers), 2: Question(answers)})


def test_the_wrong_score() -> None:
    with pytest.raises(
        InputError, match="has 1 answers, expected at least two: use score_exact for questions with one answer"
    ):
        score_answers({1: "yes"}, {1: Question(("yes",))})
    with pytest.raises(InputError, match="question 1 has 10 answers, expected one"):
        score_exact({1: "yes"}, {1: Question(("yes",) * 10)})
    for score in (score_answers, score_exact):
        with pytest.raises(InputError, match="there are no questions to score"):
            score({}, {})


# -- lemmas ----------------------------------------------------------------------------------------------------------


def test_lemmas_are_refused_without_spacy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(
        InputError, match="need spaCy and its model en_core_web_sm, which are not installed: pip install"
    ):
        lemmatize(["dogs"])


def test_lemmas() -> None:
    """Nouns and verbs in their base form, the rest as it was."""
    spacy = pytest.importorskip("spacy")
    if not spacy.util.is_package("en_core_web_sm"):
        with pytest.raises(InputError, match="en_core_web_sm"):
            lemmatize(["dogs"])
        return
    assert lemmatize(["dogs", "two dogs running", "The red buses", ""]) == ["dog", "two dog run", "The red bus", ""]

"""Captions, answers and twins of scenes are judged against the exact truth."""

import pytest
import torch

from blip2.data.scene_texts import Truth
from blip2.evaluation.scenes import (
    Twins,
    majority_answers,
    matching_accuracy,
    score_answers,
    score_facts,
    score_twins,
)
from blip2.pipelines import load
from conftest import draw
from fixtures.tiny import randomize

PAIR = Truth("pair", "blue", "plain", ("cat", "dog"), "left", 0, "")
THREE = Truth("count", "red", "plain", ("apple",), "", 3, "")


def test_facts_are_counted_over_the_scenes_that_have_them():
    captions = ["A cat to the left of a dog on a blue background.", "Two apples on a red background."]
    assert score_facts(captions, [PAIR, THREE]) == {
        "objects": 1.0,
        "relation": 1.0,
        "color": 1.0,
        "count": 0.0,
        "all": 0.5,
    }
    turned = score_facts(["A dog to the left of a cat on a blue background."], [PAIR])
    assert turned["objects"] == 1.0 and turned["relation"] == 0.0 and turned["all"] == 0.0
    assert score_facts(["A horse."], [PAIR]) == {"objects": 0.0, "relation": 0.0, "color": 0.0, "all": 0.0}


def test_answers_are_counted_by_type():
    rows = [
        {"question": "Is there a cat?", "question_type": "yesno", "answers": ["yes"]},
        {"question": "Is there a dog?", "question_type": "yesno", "answers": ["no"]},
        {"question": "What color?", "question_type": "color", "answers": ["blue"]},
    ]
    assert score_answers(["Yes.", "yes", "blue"], rows) == {"yesno": 0.5, "color": 1.0, "all": 2 / 3}


def test_the_most_frequent_answer_is_that_of_the_same_words_or_else_of_the_type():
    train = [
        {"question": "How many cats?", "question_type": "count", "answers": ["two"]},
        {"question": "How many dogs?", "question_type": "count", "answers": ["one"]},
        {"question": "How many pigs?", "question_type": "count", "answers": ["one"]},
    ]
    asked = [{"question": q, "question_type": "count"} for q in ("How many cats?", "How many cows?")]
    assert majority_answers(train, asked) == ["two", "one"]


def test_twins_are_told_apart_by_both_texts_and_both_images():
    right, texts_only, wrong, equal = [[2, 1], [1, 2]], [[2, 1], [3, 4]], [[1, 2], [2, 1]], [[1, 1], [1, 1]]
    found = Twins(torch.tensor([right, texts_only, wrong, equal], dtype=torch.float)).accuracy
    # Of the second pair both images find their text, but its first text prefers the second image.
    assert found == {"pairwise": (4 + 3 + 0 + 0) / 16, "text": 0.5, "image": 0.25, "group": 0.25}


@pytest.fixture(scope="module")
def pipeline(runs):
    loaded = load(runs["stage1"], device="cpu")
    randomize(loaded.model.qformer)
    return loaded


def test_twins_are_scored_as_pairs_of_images_and_texts(pipeline):
    images = [draw("disc", "red", 0), draw("disc", "blue", 0), draw("square", "green", 0), draw("stripe", "green", 0)]
    texts = ["a red disc", "a blue disc", "a green square", "a green stripe"]
    features = pipeline.encode_images(images)
    found = score_twins(pipeline, features, texts)
    similarity, match = pipeline.similarity(features, texts), pipeline.match(features, texts)
    for pair in (0, 1):
        rows = slice(2 * pair, 2 * pair + 2)
        torch.testing.assert_close(found["itc"].scores[pair], similarity[rows, rows])
        torch.testing.assert_close(found["itm"].scores[pair].sigmoid(), match[rows, rows])


def test_matching_accuracy_is_that_of_training_s_negatives(pipeline):
    images = [draw("disc", "red", 0), draw("disc", "blue", 0), draw("square", "green", 0), draw("stripe", "green", 0)]
    features, texts = pipeline.encode_images(images), ["a red disc", "a blue disc", "a green square", "a green stripe"]
    found = matching_accuracy(pipeline, features, texts)
    assert found == matching_accuracy(pipeline, features, texts)
    assert (12 * found) == pytest.approx(round(12 * found))  # 4 pairs and 8 negatives
    with torch.no_grad():  # a head that says no to everything is right about the negatives
        pipeline.model.matching_head.weight.zero_()
        pipeline.model.matching_head.bias.copy_(torch.tensor([1.0, 0.0]))
    assert matching_accuracy(pipeline, features, texts, batch_size=2) == pytest.approx(2 / 3)

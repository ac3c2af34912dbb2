import pytest

from blip2.evaluation.captioning import content_f1, score_captions, token_f1, words


def test_words() -> None:
    assert words("Two DOGS, (one black); a cat's café!") == ["two", "dogs", "one", "black", "a", "cat", "s", "café"]


@pytest.mark.parametrize(
    ("written", "truth", "expected"),
    [
        ("a red disc", "a red disc", 1.0),
        ("A red disc.", "a red disc", 1.0),
        ("disc red a", "a red disc", 1.0),
        ("a red disc", "two blue dogs", 0.0),
        ("a red disc", "a red square", 2 / 3),
        ("a disc", "a red disc here", 2 * 2 / 6),
        # A word counts as often as it is there, so that saying one over and over does not help.
        ("disc disc disc disc", "a red disc", 2 * 1 / 7),
        ("disc disc", "a disc on a disc", 2 * 2 / 7),
        ("", "a red disc", 0.0),
        ("a red disc", "", 0.0),
        ("", "", 1.0),
    ],
)
def test_token_f1(written: str, truth: str, expected: float) -> None:
    assert token_f1(written, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("written", "truth", "expected"),
    [
        ("a disc", "the disc", 1.0),
        ("a dog", "a cat", 0.0),
        ("the red disc is here", "a red square", 2 * 1 / 5),
        ("some birds and a cat", "a flock of birds", 2 * 1 / 4),
    ],
)
def test_content_f1_looks_past_articles(written: str, truth: str, expected: float) -> None:
    assert content_f1(written, truth) == pytest.approx(expected)


def test_score_captions() -> None:
    scores = score_captions(["A red disc.", "a dog", "red a disc"], ["a red disc", "a cat", "a red disc"])
    assert scores == pytest.approx({"token_f1": (1 + 0.5 + 1) / 3, "content_f1": 2 / 3, "exact": 1 / 3})


def test_every_caption_needs_its_truth() -> None:
    with pytest.raises(ValueError, match="shorter"):
        score_captions(["a", "b"], ["a"])

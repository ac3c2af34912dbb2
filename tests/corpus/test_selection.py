import pytest

from blip2.corpus.selection import Caption, Rules, choose, read_language, share_of_words
from blip2.errors import InputError


def captions(*scored, originals=1):
    return [Caption(text, score, n < originals) for n, (text, score) in enumerate(scored)]


def causes(chosen):
    return {caption.text: cause for caption, cause in chosen.dropped}


def unsure(text):
    return None


def test_the_best_stay_best_first():
    given = captions(("web text", 0.2), ("a cat", 0.5), ("a dog", 0.1), ("a tiger", 0.4))
    chosen = choose(given, Rules(keep=2), unsure)
    assert [(c.text, c.score, c.is_original) for c in chosen.kept] == [("a cat", 0.5, False), ("a tiger", 0.4, False)]
    assert causes(chosen) == {"web text": "ranked lower", "a dog": "ranked lower"}


def test_of_equals_the_original_comes_first():
    chosen = choose(captions(("old", 0.3), ("new", 0.3)), Rules(keep=1), unsure)
    assert [c.text for c in chosen.kept] == ["old"]


def test_what_says_the_same_takes_no_place():
    given = captions(("A cat.", 0.5), ("a  CAT", 0.4), ("cat: a", 0.3), ("a cat sleeps", 0.2), ("a dog", 0.1))
    chosen = choose(given, Rules(keep=3), unsure)
    assert [c.text for c in chosen.kept] == ["A cat.", "a cat sleeps", "a dog"]
    assert causes(chosen) == {"a  CAT": "said already", "cat: a": "said already"}
    chosen = choose(given, Rules(keep=3, alike=0.6), unsure)  # two words of three
    assert [c.text for c in chosen.kept] == ["A cat.", "a dog"]


def test_signs_alone_are_compared_as_they_are():
    assert share_of_words("!!", "??") == 0
    assert share_of_words("!!", "!!") == 1


def test_length():
    given = captions(("one two three four", 0.9), ("one", 0.8), ("one two", 0.1))
    chosen = choose(given, Rules(fewest_words=2, most_words=3), unsure)
    assert [c.text for c in chosen.kept] == ["one two"]
    assert causes(chosen) == {"one two three four": "too long", "one": "too short"}


def test_language_where_it_can_be_told():
    pytest.importorskip("py3langid")
    given = captions(("un chat noir sur une table", 0.9), ("a photo of a cat on a table", 0.5), ("An owl.", 0.1))
    chosen = choose(given, Rules(language="en"), read_language("en"))
    assert [c.text for c in chosen.kept] == ["a photo of a cat on a table", "An owl."]
    assert causes(chosen) == {"un chat noir sur une table": "another language"}
    with pytest.raises(InputError, match="'english' is not known: give an ISO 639-1 code"):
        read_language("english")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"keep": 0}, "keep is 0, expected at least 1"),
        ({"fewest_words": 3, "most_words": 2}, "most_words is 2"),
        ({"alike": 0.0}, "alike is 0.0"),
    ],
)
def test_rules_that_cannot_be(wrong, says):
    with pytest.raises(InputError, match=says):
        Rules(**wrong)

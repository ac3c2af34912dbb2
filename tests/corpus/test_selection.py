import pytest

from blip2.corpus.selection import Caption, SelectionRules, load_language_detector, select_captions, word_overlap
from blip2.errors import InputError


def captions(*scored, originals=1):
    return [Caption(text, score, n < originals) for n, (text, score) in enumerate(scored)]


def reasons(selection):
    return {caption.text: reason for caption, reason in selection.dropped}


def unsure(text):
    return None


def test_the_best_stay_best_first():
    given = captions(("web text", 0.2), ("a cat", 0.5), ("a dog", 0.1), ("a tiger", 0.4))
    selection = select_captions(given, SelectionRules(keep=2), unsure)
    assert [(c.text, c.score, c.is_original) for c in selection.kept] == [
        ("a cat", 0.5, False),
        ("a tiger", 0.4, False),
    ]
    assert reasons(selection) == {"web text": "ranked lower", "a dog": "ranked lower"}


def test_of_equals_the_original_comes_first():
    selection = select_captions(captions(("old", 0.3), ("new", 0.3)), SelectionRules(keep=1), unsure)
    assert [c.text for c in selection.kept] == ["old"]


def test_what_says_the_same_takes_no_place():
    given = captions(("A cat.", 0.5), ("a  CAT", 0.4), ("cat: a", 0.3), ("a cat sleeps", 0.2), ("a dog", 0.1))
    selection = select_captions(given, SelectionRules(keep=3), unsure)
    assert [c.text for c in selection.kept] == ["A cat.", "a cat sleeps", "a dog"]
    assert reasons(selection) == {"a  CAT": "same words", "cat: a": "same words"}
    selection = select_captions(given, SelectionRules(keep=3, max_word_overlap=0.6), unsure)  # two words of three
    assert [c.text for c in selection.kept] == ["A cat.", "a dog"]


def test_signs_alone_are_compared_as_they_are():
    assert word_overlap("!!", "??") == 0
    assert word_overlap("!!", "!!") == 1


def test_length():
    given = captions(("one two three four", 0.9), ("one", 0.8), ("one two", 0.1))
    selection = select_captions(given, SelectionRules(min_words=2, max_words=3), unsure)
    assert [c.text for c in selection.kept] == ["one two"]
    assert reasons(selection) == {"one two three four": "too long", "one": "too short"}


def test_language_where_it_can_be_told():
    pytest.importorskip("py3langid")
    given = captions(("un chat noir sur une table", 0.9), ("a photo of a cat on a table", 0.5), ("An owl.", 0.1))
    selection = select_captions(given, SelectionRules(language="en"), load_language_detector("en"))
    assert [c.text for c in selection.kept] == ["a photo of a cat on a table", "An owl."]
    assert reasons(selection) == {"un chat noir sur une table": "another language"}
    with pytest.raises(InputError, match="'english' is not known: give an ISO 639-1 code"):
        load_language_detector("english")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"keep": 0}, "keep is 0, expected at least 1"),
        ({"min_words": 3, "max_words": 2}, "--max-words is 2, expected at least --min-words, which is 3"),
        ({"max_word_overlap": 0.0}, "max_word_overlap is 0.0"),
    ],
)
def test_rules_that_cannot_be(wrong, says):
    with pytest.raises(InputError, match=says):
        SelectionRules(**wrong)


def test_captions_that_do_not_match_or_say_nothing_are_dropped():
    given = [
        Caption("a cat", 0.5, True, itm=0.9, pmi=8.0),
        Caption("a dog", 0.9, False, itm=0.1, pmi=-3.0),
        Caption("image", 0.8, True, itm=0.7, pmi=0.1),
        Caption("a kitten", 0.4, False, itm=0.5, pmi=1.0),
    ]
    selection = select_captions(given, SelectionRules(keep=4, min_itm=0.5, min_pmi=1.0), unsure)
    assert [c.text for c in selection.kept] == ["a cat", "a kitten"]
    assert reasons(selection) == {"a dog": "no match (ITM)", "image": "not about the image (PMI)"}
    selection = select_captions(given, SelectionRules(keep=4), unsure)
    assert len(selection.kept) == 4


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_a_probability_is_between_0_and_1(value):
    with pytest.raises(InputError, match=r"min_itm is .*, expected 0 to 1"):
        SelectionRules(min_itm=value)

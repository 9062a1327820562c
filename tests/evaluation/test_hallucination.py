"""CHAIR, POPE and AMBER against worked examples."""

import pytest

from smolvlm_exp.data.vocabulary import Amber, Vocabulary
from smolvlm_exp.evaluation.hallucination import (
    Caption,
    chair,
    count_in,
    description_counts,
    f1,
    read_caption,
    repeats,
    yes_no,
    yes_or_no,
)


def values(ratios):
    return {name: ratio.value for name, ratio in ratios.items()}


KINDS = Vocabulary({kind: kind for kind in ("star", "moon", "cross", "ring")}, once=True)


def named(words, text, truth=None):
    return [name for _, name in words(text, truth)]


def test_mentions_are_complete_words_counted_once_in_the_plural_too():
    assert named(KINDS, "Two crosses, a star, another star and three moons.") == ["cross", "star", "moon"]
    assert named(KINDS, "A starry string of rings") == ["ring"]
    assert named(KINDS, "") == []


def test_synonyms_phrases_and_plurals():
    names = {"dog": "dog", "puppy": "dog", "hot dog": "hot dog", "man": "person", "child": "person", "knife": "knife"}
    words = Vocabulary({**names, "home plate": None, "plate": "dish"})
    text = "Two men and children feed puppies hot dogs at home plate; knives, a plate and the dog."
    assert words(text) == [
        ("men", "person"), ("children", "person"), ("puppies", "dog"), ("hot dogs", "hot dog"),
        ("knives", "knife"), ("plate", "dish"), ("dog", "dog"),
    ]  # fmt: skip


def test_chair_by_hand():
    captions = [
        Caption(["star", "moon"], ["star"], 6),  # 1 of 2 mentions is not there; 1 of 1 objects named
        Caption(["ring"], ["ring", "cross"], 4),  # 0 of 1; 1 of 2
        Caption([], ["star"], 0),  # nothing said: 0 of 0; 0 of 1
    ]
    assert values(chair(captions)) == {
        "chair_s": pytest.approx(1 / 3),
        "chair_i": pytest.approx(1 / 3),
        "recall": pytest.approx(2 / 4),
        "mean_length": pytest.approx(10 / 3),
    }
    assert chair([]) == {}


def test_the_first_word_decides():
    answers = {"Yes, there is.": "yes", "no": "no", " No.": "no", "yesterday": None, "There is no star": None, "": None}
    assert {answer: yes_or_no(answer) for answer in answers} == answers


def test_pope_by_hand():
    """One true positive, two said yes, three are yes; no was said twice, once rightly, and two are no."""
    answers, truth = ["yes", "no", None, "yes", "no"], ["yes", "yes", "yes", "no", "no"]
    assert values(yes_no(answers, truth)) == {
        "yes_no_accuracy": pytest.approx(2 / 5),
        "yes_no_f1": pytest.approx(2 * 1 / (2 + 3)),
        "yes_ratio": pytest.approx(2 / 5),
    }
    assert yes_no([], []) == {}
    assert f1(answers, truth, "no").value == pytest.approx(2 * 1 / (2 + 2))


RELATED = {
    "person": ["people", "man", "woman"], "man": ["person", "people"], "tree": ["forest"], "beach": ["sand"],
    "sea": ["water"], "bin": ["can"], "can": [], "dog": [], "sun": [], "sign": [], "bird": [],
}  # fmt: skip


def test_amber_by_hand():
    words = Amber(RELATED, safe=["sign"])
    first = {"objects": ["person", "beach", "tree"], "expected": ["dog", "sea", "sun"]}
    text = "A man and his dogs walk on the sand near the water. You can see a sign, and the man under it."
    assert words(text, first) == [
        ("man", "person"), ("dogs", "dog"), ("sand", "beach"), ("water", "sea"), ("sign", None), ("man", "person"),
    ]  # fmt: skip
    second = {"objects": ["person", "tree"], "expected": ["bird"]}
    captions = [read_caption(text, first, words), read_caption("People by a tree.", second, words)]
    assert values(chair(captions)) == {
        "chair_s": pytest.approx(1 / 2),  # Hal: the first has a dog and a sea
        "chair_i": pytest.approx(2 / (6 + 2)),  # CHAIR: of its six mentions the sign is neither right nor wrong
        "recall": pytest.approx((2 + 2) / (3 + 2)),  # Cover
        "mean_length": pytest.approx((22 + 4) / 2),
        "cog": pytest.approx(2 / (3 + 1)),
    }


def test_a_word_counts_as_the_first_object_that_amber_relates_to_it():
    words = Amber(RELATED, safe=[])
    assert named(words, "a person", {"objects": ["man", "person"]}) == ["man"]
    assert named(words, "a man", {"objects": ["man", "person"]}) == ["person"]
    assert named(words, "a bird", {"objects": ["man", "person"]}) == ["bird"]
    assert named(words, "a tree and the sun", {"objects": ["sun"], "expected": ["tree", "sun"]}) == ["tree", "sun"]


SEEN = {"objects": ["star", "moon"], "phrases": ["two small red stars", "a large grey moon", "a small blue moon"]}


@pytest.mark.parametrize(
    ("caption", "counts"),
    [
        ("I see two small red stars and a large grey moon.", (2, 2)),
        ("A red star, a gray moon.", (2, 2)),  # what is left out is not wrong
        ("A star and three red stars.", (2, 2)),  # nor is a count, which count_in reads
        ("A blue star, a big red star and a blue moon.", (1, 3)),
        ("A large blue moon.", (0, 1)),  # large is one moon, blue another
        ("A red ring.", (0, 0)),  # CHAIR counts what is not there
        ("A small red star beside a grey moon", (2, 2)),  # what an object claims stands before it alone
        ("A red star, red.", (1, 1)),
        ("", (0, 0)),
    ],
)
def test_attributes_by_hand(caption, counts):
    assert description_counts(caption, SEEN, KINDS) == counts
    assert description_counts(caption, {"objects": ["star"]}, KINDS) == (0, 0)


@pytest.mark.parametrize(
    ("caption", "counts"),
    [
        ("I see two small red stars and a large grey moon.", (2, 2)),
        ("A small red star and a moon.", (1, 2)),  # two stars became one
        ("A picture of two stars, three moons.", (1, 2)),
        ("Red stars, the moon, two rings.", (2, 2)),  # no number is no claim; CHAIR counts the rings
    ],
)
def test_numbers_by_hand(caption, counts):
    assert description_counts(caption, SEEN, KINDS, count_in) == counts


def test_attributes_of_phrases_and_related_words():
    truth = {"objects": ["hot dog", "man"], "phrases": ["a big brown hot dog", "a little man"]}
    words = Vocabulary({"hot dog": "hot dog", "dog": "dog", "man": "man"})
    assert description_counts("Two large hot dogs and a small brown man", truth, words) == (1, 2)
    assert description_counts("A little woman", {**truth, "objects": ["man"]}, Amber({"man": ["woman"]}, safe=[])) == (
        1,
        1,
    )


def test_an_object_named_again():
    """Each object once, however often it is named; KINDS itself does not give its later mentions."""
    text = "A star, two moons, a star, another star and a moon; a ring."
    assert named(KINDS, text) == ["star", "moon", "ring"]
    assert repeats(text, SEEN, KINDS) == 2
    assert repeats("A star and a moon.", SEEN, KINDS) == 0
    amber = Amber(RELATED, safe=["sign"])
    assert repeats("A man, people, a sign and a sign", {"objects": ["person"]}, amber) == 1

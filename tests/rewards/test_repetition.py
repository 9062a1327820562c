"""Objects named again, and 3-grams said again."""

import pytest

from smolvlm_exp.data.vocabulary import Vocabulary
from smolvlm_exp.rewards.repetition import repeated_share, repeats, repetition
from tests.rewards.rows import KINDS, caption, known, said


@pytest.mark.parametrize("words", [KINDS, Vocabulary({"star": "star", "moon": "moon"})], ids=["once", "every"])
def test_repeats_counts_objects(words):
    truth = caption("star")
    texts = ("A star and a moon.", "A star and stars.", "A star, a star, a star.", "Star, moon, star, moon.")
    assert [repeats(text, truth, words) for text in texts] == [0, 1, 1, 2]
    assert words.once == (words is KINDS)


def test_the_share_of_repeated_3_grams():
    assert repeated_share("two words") == 0
    assert repeated_share("a b c d") == 0
    assert repeated_share("a b c A b c") == pytest.approx(1 - 3 / 4)  # abc bca cab abc


def test_repetition():
    truth = known(caption("star"), caption("star"), {"kind": "answer", "answer": "red"}, None)
    completions = said("A star and a star.", "A star a star a moon", "red red red red", "a b c")
    assert repetition(completions=completions, truth=truth, words=KINDS) == [-1, -1, -0.5, 0]

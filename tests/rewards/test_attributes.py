"""Colours and sizes against phrases, object by object."""

from smolvlm_exp.rewards.attributes import attributes
from tests.rewards.rows import KINDS, caption, known, said

TRUTH = caption("star", "moon", phrases=["a small red star", "two large blue moons"])


def test_every_object_counts_once_and_one_that_is_left_out_as_wrong():
    shares = {
        "I see a small red star and two large blue moons.": 1.0,
        "A red star.": 0.5,
        "A large red star, blue moons.": 0.5,
        "A red moon and a blue star.": 0.0,
        "A red star, a red star.": 0.5,
        "A red star, a blue star.": 0.5,
        "A red star and a green ring.": 0.5,  # a ring that is not there has no right colour
        "Red star blue moon": 1.0,
        "": 0.0,
    }
    found = attributes(completions=said(*shares), truth=known(*[TRUTH] * len(shares)), words=KINDS)
    assert found == list(shares.values())


def test_rows_without_phrases_are_left_out():
    truth = known(caption("star"), {"kind": "answer", "answer": "red"}, None)
    assert attributes(completions=said("A red star.", "red", "red"), truth=truth, words=KINDS) == [None] * 3

"""Colours and sizes against phrases, claim by claim."""

import pytest

from smolvlm_exp.rewards.attributes import attribute_counts, attributes
from tests.rewards.rows import KINDS, caption, known, said

TRUTH = caption("star", "moon", phrases=["a small red star", "two large blue moons"])


@pytest.mark.parametrize(
    ("text", "right", "named"),
    [
        ("I see a small red star and two large blue moons.", 2, 2),
        ("A red star.", 1, 1),
        ("A star.", 1, 1),
        ("A large red star, blue moons.", 1, 2),
        ("A red moon and a blue star.", 0, 2),
        ("A red star and a green ring.", 1, 1),  # a ring that is not there has no right colour
        ("A red star, a blue star.", 1, 2),
        ("Red star blue moon", 2, 2),
        ("A red ring.", 0, 0),
        ("", 0, 0),
    ],
)
def test_attribute_counts(text, right, named):
    assert attribute_counts(text, TRUTH, KINDS) == (right, named)


def test_attributes_are_a_share_or_none():
    truth = known(TRUTH, TRUTH, caption("star"), {"kind": "answer", "answer": "red"}, None)
    completions = said("A red star, a red moon.", "Nothing.", "A red star.", "red", "red")
    assert attributes(completions=completions, truth=truth, words=KINDS) == [0.5, None, None, None, None]

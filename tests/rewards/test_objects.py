"""Recall twice, less 1 for an invention; the vocabulary that rows themselves give."""

import pytest

from smolvlm_exp.rewards.objects import objects
from tests.rewards.rows import KINDS, caption, known, said


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("A star and two moons.", 2),
        ("A star.", 1),
        ("A star, a star and a star.", 1),
        ("A star, a moon and a ring.", 1),
        ("A ring and a cross.", -1),
        ("", 0),
    ],
)
def test_objects(text, reward):
    assert objects(completions=said(text), truth=known(caption("star", "moon")), words=KINDS) == [reward]


def test_an_image_without_objects_and_rows_that_it_does_not_concern():
    truth = known(caption(), caption(), {"kind": "yes_no", "answer": "yes", "objects": ["star"]}, None)
    assert objects(completions=said("Nothing.", "A star.", "A star.", "A star."), truth=truth, words=KINDS) == [
        2, 1, None, None,
    ]  # fmt: skip

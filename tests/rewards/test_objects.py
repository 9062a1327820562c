"""Recall twice, less 1 for an invention; the vocabulary that rows themselves give."""

import pytest

from smolvlm_exp.rewards.objects import objects, vocabulary_of
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


def test_vocabulary_of_the_rows_own_objects():
    truths = known(caption("hot dog", "child", expected=["dog"]), {"kind": "answer", "answer": "cat"}, None)
    words = vocabulary_of(truths)
    assert words("Children eat hot dogs; a cat and a dog watch.") == [
        ("children", "child"), ("hot dogs", "hot dog"), ("dog", "dog"),
    ]  # fmt: skip
    assert objects(completions=said("A child and a dog."), truth=truths[:1], words=words) == [2 * 1 / 2 - 1]

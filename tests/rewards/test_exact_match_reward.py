"""VQA's normalisation, word for word."""

import pytest

from smolvlm_exp.rewards.exact_match import exact_match, normalised
from tests.rewards.rows import known, said


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Two  Dogs.", "2 dogs"),
        ("a black-and-white cat", "black and white cat"),
        ("None", "0"),
        ("1,000 people", "1000 people"),
        ("red, blue", "red blue"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("It doesn't", "it doesnt"),
        ("It doesn\u2019t", "it doesnt"),
        ("A", "a"),
        ("", ""),
    ],
)
def test_normalised(text, normal):
    assert normalised(text) == normal


def test_one_or_several_accepted_answers_and_rows_that_it_does_not_concern():
    truth = known(
        *[{"kind": "answer", "answer": "red"}] * 2,
        *[{"kind": "answer", "answer": ["sofa", "couch"]}] * 2,
        {"kind": "answer", "answer": "A"},
        {"kind": "yes_no", "answer": "yes"},
        {"kind": "number", "answer": 2},
        None,
    )
    completions = said("Red.", "Dark red.", "A couch", "a chair", "", "yes", "2", "red")
    assert exact_match(completions=completions, truth=truth) == [1, 0, 1, 0, 0, None, None, None]

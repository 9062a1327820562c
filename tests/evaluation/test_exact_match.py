"""Exact match of short answers, by hand."""

import pytest

from smolvlm_exp.evaluation.exact_match import answer_accuracy, exact_match, normalise


def test_normalised():
    texts = {
        "The  Red one.": "red 1", "red-and-white!": "red and white", "Two.": "2", "1,250 m": "1250 m", "-3.5": "-3.5",
        "It's 5-7, a day": "its 5 7 day", "Ärger": "ärger", "A.": "a", "U.S.": "us", "It doesn\u2019t": "it doesnt", "": "",
    }  # fmt: skip
    assert {text: normalise(text) for text in texts} == texts


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("Red.", "red", True),
        ("a red", "Red", True),
        ("dark red", "red", False),
        ("two", "2", True),
        ("Two.", 2, True),
        ("2.0", 2, True),
        ("1,000", 1000, True),
        ("two stars", 2, False),
        ("None", 0, True),
        ("3.5", 3.5, True),
        ("navy", ["blue", "navy"], True),
        ("green", ["blue", "navy"], False),
        ("", "red", False),
        ("A", "A", True),  # of several choices
        ("The", "A", False),
    ],
)
def test_right_or_wrong(answer, accepted, right):
    assert exact_match(answer, accepted) == right


def test_accuracy():
    assert answer_accuracy(["Red.", "Two.", "large"], ["red", 3, "large"])["answer_accuracy"].value == 2 / 3
    assert answer_accuracy([], []) == {}

"""Numbers in digits and words, and how near is near."""

import pytest

from smolvlm_exp.rewards.number import first_number, number
from tests.rewards.rows import known, said


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("There are 3.", 3), ("Three stars and 2 moons", 3), ("twenty", 20), ("1,200 of them", 1200),
        ("-2.5 degrees", -2.5),
        ("There is a star.", 1), ("An arrow", 1), ("No stars.", 0), ("None", 0), ("Many.", None), ("", None),
        ("Another, bone, v2", None), ("10-20", 10),
    ],
)  # fmt: skip
def test_the_first_number_of_a_text(text, value):
    assert first_number(text) == value


def test_number():
    truth = known(
        *[{"kind": "number", "answer": 4}] * 4, {"kind": "number", "answer": 0}, {"kind": "answer", "answer": "4"}
    )
    completions = said("Four.", "3", "20", "Many.", "1", "4")
    assert number(completions=completions, truth=truth) == [1, 0.5 * (1 - 1 / 4), 0, 0, 0, None]

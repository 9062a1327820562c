"""A clipped difference, and the columns that it needs."""

import pytest

from smolvlm_exp.rewards.image_dependence import image_dependence


def test_image_dependence():
    rewards = image_dependence(
        completions=["a"] * 4, logps=[-1.0, -0.5, -9.0, -0.1], blank_logps=[-1.0, -0.75, -1.0, -4.0]
    )
    assert rewards == [0, 0.25, -1, 1]


@pytest.mark.parametrize(
    ("columns", "missing"), [({}, "logps and blank_logps is"), ({"logps": [0.0]}, "and blank_logps is")]
)
def test_missing_columns_are_named(columns, missing):
    with pytest.raises(ValueError, match=missing):
        image_dependence(completions=["a"], **columns)

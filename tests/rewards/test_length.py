"""DAPO's equation 13."""

import pytest

from smolvlm_exp.rewards.length import LengthConfig, checked, length
from smolvlm_exp.utils.errors import RequestError


def test_length():
    ids = [[7] * tokens for tokens in (0, 6, 7, 8, 10, 11, 99)]
    assert length(completion_ids=ids, config=LengthConfig(10, 4)) == [0, 0, -0.25, -0.5, -1, -1, -1]


def test_a_buffer_longer_than_an_answer_is_refused():
    assert checked(LengthConfig(4, 4)) == LengthConfig(4, 4)
    with pytest.raises(RequestError, match=r"reward\.length\.buffer=5: at most reward\.length\.max_length=4"):
        checked(LengthConfig(4, 5))

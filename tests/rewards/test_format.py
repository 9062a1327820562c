"""A pattern that is searched for; one that is none is refused."""

import pytest

from smolvlm_exp.rewards.format import FormatConfig, compiled, format
from smolvlm_exp.utils.errors import RequestError
from tests.rewards.rows import said


def test_format():
    completions = said("So. Answer: red", "Answer: red", "red")
    assert format(completions=completions, pattern=compiled(FormatConfig("Answer: "))) == [1, 1, 0]
    assert format(completions=completions, pattern=compiled(FormatConfig(r"^Answer: \w+$"))) == [0, 1, 0]


@pytest.mark.parametrize("pattern", [None, "", "(open"])
def test_a_pattern_is_needed(pattern):
    with pytest.raises(RequestError, match=r"reward\.format\.pattern"):
        compiled(FormatConfig(pattern))

"""The first word decides, and neither is wrong."""

from smolvlm_exp.rewards.yes_no import yes_no
from tests.rewards.rows import known, said


def test_yes_no():
    yes, no = {"kind": "yes_no", "answer": "yes"}, {"kind": "yes_no", "answer": "no"}
    completions = said("Yes, there is.", "Yes.", "no", "There is no star.", "yes")
    truth = known(yes, no, no, no, {"kind": "answer", "answer": "yes"})
    assert yes_no(completions=completions, truth=truth) == [1, 0, 1, 0, None]

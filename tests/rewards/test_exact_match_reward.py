"""Exact match as a reward."""

from smolvlm_exp.rewards.exact_match import exact_match
from tests.rewards.rows import known, said


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

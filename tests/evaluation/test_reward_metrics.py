"""Rewards of the held-out answers, as ratios like every other metric."""

import pytest

from smolvlm_exp.evaluation.held_out import HeldOut, evaluate
from smolvlm_exp.evaluation.reward_metrics import reward_metrics
from smolvlm_exp.evaluation.statistics import changes, intervals
from smolvlm_exp.utils.errors import RequestError


def test_means_over_the_rows_that_a_reward_concerns():
    scores = {"number": [1.0, None, 0.5], "objects": [None, -1.0, None], "judge": [None, None, None]}
    found = reward_metrics(scores, [1.0, -1.0, 0.5])
    assert {name: ratio.value for name, ratio in found.items()} == {
        "reward": pytest.approx(1 / 6), "reward_number": 0.75, "reward_objects": -1.0,
    }  # fmt: skip
    assert found["reward_number"].bottom.tolist() == [1.0, 0.0, 1.0]
    assert reward_metrics({"judge": [None]}, [None]) == {}


def test_intervals_and_changes_are_those_of_the_scored_rows():
    """A reward that rises by one in every row that it concerns, whichever rows are drawn."""
    before = reward_metrics({"a": [0.0, None, 1.0, None] * 10}, [0.0, 0.0, 1.0, 0.0] * 10)
    after = reward_metrics({"a": [1.0, None, 2.0, None] * 10}, [1.0, 0.0, 2.0, 0.0] * 10)
    change = changes(before, after)["reward_a"]
    assert (change.difference, change.low, change.high) == pytest.approx((1, 1, 1))
    assert change.p < 0.01
    low, high = intervals(after)["reward_a"]
    assert 1 < low < 1.5 < high < 2


def test_a_name_that_is_taken():
    with pytest.raises(RequestError, match="a reward named accuracy would be written as reward_accuracy"):
        reward_metrics({"accuracy": [1.0]}, [1.0])


def test_an_evaluation_is_scored_where_a_truth_is_known(rows, processor, model, monkeypatch):
    held_out, given = HeldOut(rows, processor, 8, None), []
    written = ["A star."] * 15 + ["Yes, there is."]
    monkeypatch.setattr(HeldOut, "answers", lambda *args: written[: args[2]])

    def score(prompts, answers, ids, truth):
        given.append((prompts, answers, ids, truth))
        scores = [1.0 if text.startswith("Yes") else None for text in answers]
        return {"yes": scores}, scores

    found = evaluate(model, held_out, score=score)
    assert (found.metrics["reward"], found.metrics["reward_yes"]) == (1.0, 1.0)
    ((prompts, answers, ids, truth),) = given
    assert (prompts, truth) == (rows.test["prompt"][:], rows.test["truth"][:])
    assert answers == processor.tokenizer.batch_decode(ids) == written
    assert "reward" not in evaluate(model, held_out).metrics
    rows_of_unknown = rows.test.remove_columns("truth")
    monkeypatch.setattr(rows, "test", rows_of_unknown)
    assert "reward" not in evaluate(model, HeldOut(rows, processor, 8, None), score=score).metrics
    assert len(given) == 1

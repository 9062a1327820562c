"""What a metric is called, in which order tables have them, and by which runs are compared."""

import pytest

from smolvlm_exp.evaluation.metrics import METRICS, deciding_metric, goal_of, in_order, is_share, metric_of

PAIRS, REWARD = {"after": {"preference_accuracy": 0.5, "reward": 1.0}}, {"after": {"reward": 0.0}}


def test_a_reward_is_named_by_itself():
    label, good, share = (lambda metric: (metric.label, metric.good, metric.share))(metric_of("reward_yes_no"))
    assert (label, good, share) == ("Reward: yes no", 1, False)
    assert metric_of("reward_accuracy") is METRICS["reward_accuracy"]  # DPO's
    assert (metric_of("a_new_metric").label, metric_of("a_new_metric").good) == ("a new metric", 0)


def test_rewards_follow_their_sum():
    keys = ["z", "reward_objects", "yes_ratio", "reward_accuracy", "reward", "reward_number", "chair_s"]
    assert in_order(keys) == [
        "chair_s", "reward_accuracy", "reward", "reward_objects", "reward_number", "yes_ratio", "z",
    ]  # fmt: skip


def test_directions():
    paths = ("after.chair_s", "after.reward", "after.reward_objects", "after.yes_ratio", "train.seconds", "train.x")
    assert [goal_of(path) for path in paths] == [-1, 1, 1, 0, -1, 0]
    assert [is_share(path) for path in paths] == [True, False, False, True, False, False]


@pytest.mark.parametrize(
    ("asked", "summaries", "metric"),
    [
        (None, [PAIRS], "after.preference_accuracy"),
        (None, [REWARD, {"status": "failed"}], "after.reward"),
        (None, [REWARD, PAIRS], "after.preference_accuracy"),
        (None, [{"after": {}}], "after.preference_accuracy"),
        (None, [], "after.preference_accuracy"),
        ("after.reward", [PAIRS], "after.reward"),
    ],
)
def test_what_runs_are_compared_by(asked, summaries, metric):
    assert deciding_metric(asked, summaries) == metric

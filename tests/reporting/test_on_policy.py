"""Signs that a model does not learn what it should from its own answers: none for a good run, each with its figures."""

import math

import pytest

from smolvlm_exp.reporting.on_policy import on_policy_signs

TRAINER = {
    "temperature": 1.0, "num_generations": 8, "max_completion_length": 192, "mask_truncated_completions": True,
    "learning_rate": 1e-4, "beta": 0.05,
}  # fmt: skip
GOOD = {
    "reward": 0.5, "frac_reward_zero_std": 0.2, "completions/clipped_ratio": 0.1, "completions/mean_length": 40.0,
    "kl": 0.01, "loss": 0.0,
}  # fmt: skip


def events(count=12, **changes):
    """Logged steps; each change is a constant, or a function of the event's number."""
    named = {{"length": "completions/mean_length", "cut": "completions/clipped_ratio"}.get(k, k): v
             for k, v in changes.items()}  # fmt: skip
    return [
        {"step": 5 * i + 5, **{key: value(i) if callable(value) else value for key, value in {**GOOD, **named}.items()}}
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("changes", "sign", "words"),
    [
        ({"frac_reward_zero_std": 0.85}, "same_rewards",
         ["in 85% of the groups", "trainer.temperature=1.2, trainer.num_generations=16"]),
        # of the last ten events the mean counts
        ({"frac_reward_zero_std": lambda i: float(i > 2)}, "same_rewards", ["in 90% of the groups"]),
        ({"cut": 0.6}, "truncated_answers",
         ["60% of the answers are cut at trainer.max_completion_length=192 and teach nothing", "length=384"]),
        ({"cut": 1.0}, "no_answer_ended", ["its last token was never drawn within 192 tokens", "length to 384"]),
        ({"kl": lambda i: None if i == 4 else 0.1}, "kl_not_finite",
         ["not finite at step 25", "trainer.learning_rate=2.5e-05, or trainer.beta=0.1"]),
        ({"kl": lambda i: math.inf if i > 7 else 0.1}, "kl_not_finite", ["not finite at step 45"]),
        ({"length": lambda i: 30.0 + 10 * i}, "length_drift", ["went from 40 to 130 tokens", "reward.weights.length"]),
        ({"length": lambda i: 100.0 / (i + 1)}, "length_drift", ["went from 61 to 9 tokens"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_sign_has_its_figures_and_a_setting_to_change(changes, sign, words):
    ((id, text),) = on_policy_signs(TRAINER, events(**changes))
    assert id == sign
    assert all(word in text for word in words), text
    assert [line[-1] for line in text.split("\n")] == [".", "."]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"frac_reward_zero_std": 0.8, "cut": 0.5},  # not over their bounds
        {"frac_reward_zero_std": lambda i: float(i < 3)},  # at first alone
        {"length": lambda i: 40.0 if i < 6 else 79.0},
        {"kl": 0.0},
        {"count": 2, "frac_reward_zero_std": 1.0, "cut": 1.0},  # too few to tell
        {"count": 5, "length": lambda i: 10.0 ** (i + 1)},
        {"reward": None, "frac_reward_zero_std": None, "cut": None, "length": None},
    ],
)
def test_no_sign_where_there_is_nothing(changes):
    assert list(on_policy_signs(TRAINER, events(**changes))) == []


def test_runs_that_sample_nothing_have_no_sign():
    logged = [{"step": i, "loss": 0.7, "rewards/accuracies": 0.5} for i in range(20)]
    assert list(on_policy_signs({}, logged)) == []


def test_truncated_answers_that_teach_are_not_said_to_teach_nothing():
    ((_, text),) = on_policy_signs({**TRAINER, "mask_truncated_completions": False}, events(cut=0.7))
    assert "teach nothing" not in text

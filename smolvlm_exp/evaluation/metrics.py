"""What the numbers of an evaluation are called, which direction is good, and by which of them runs are compared."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from smolvlm_exp.utils.formatting import as_finite, humanize


@dataclass(frozen=True)
class Metric:
    """How a key of `before` and `after` is shown, and which direction is good (0: neither)."""

    label: str
    note: str
    good: int = 0
    share: bool = True


METRICS = {
    "chair_s": Metric("Captions with an object that is not there", "CHAIR_s, lower is better", -1),
    "chair_i": Metric("Named objects that are not there", "CHAIR_i, lower is better", -1),
    "recall": Metric("Objects in the image that are named", "recall, higher is better", 1),
    "cog": Metric("Absent objects that people would expect, named", "Cog, lower is better", -1),
    "attribute_accuracy": Metric("Objects named in their colour and size", "higher is better", 1),
    "count_accuracy": Metric("Objects named in their number", "higher is better", 1),
    "repeat_rate": Metric("Captions that name an object twice", "lower is better", -1),
    "preference_accuracy": Metric("Preference accuracy", "the chosen answer is the likelier one", 1),
    "reward_accuracy": Metric("Reward accuracy", "DPO's implicit reward against the base model", 1),
    "preference_margin": Metric("Preference margin", "implicit reward, chosen minus rejected", 1, share=False),
    "answer_logp": Metric("Log-prob of the given answers", "nats/token, higher is better", 1, share=False),
    "reward": Metric("Reward", "weighted sum of the rewards, higher is better", 1, share=False),
    "yes_no_accuracy": Metric("Yes/no questions answered right", "accuracy, higher is better", 1),
    "yes_no_f1": Metric("Yes/no F1", "higher is better", 1),
    "no_f1": Metric("No F1", "no is the positive, higher is better", 1),
    "answer_accuracy": Metric("Other questions answered right", "exact match, higher is better", 1),
    "yes_ratio": Metric("Questions answered with yes", "neither direction is better"),
    "blank_image_drop": Metric("Log-prob drop with a blank image", "chosen answer, nats/token", share=False),
    "wrong_image_drop": Metric("Log-prob drop with another row's image", "chosen answer, nats/token", share=False),
    "mean_length": Metric("Mean answer length", "neither direction is better", share=False),
}

# What runs can be compared by: a path into summary.json -> 1 where more is better, -1 where less is.
GOALS = {"after.preference_accuracy": 1} | {
    f"after.{key}": metric.good for key, metric in METRICS.items() if metric.good
}
GOALS |= {"train.seconds": -1, "train.memory_peak_gib": -1, "train.last_loss": -1, "train.pairs_per_second": 1}
BY_DEFAULT = ("after.preference_accuracy", "after.reward", "after.answer_logp")  # with pairs, scores, answers alone


def is_reward(key: str) -> bool:
    """Whether it is a single reward's, which is named by the reward: `reward_objects`."""
    return key.startswith("reward_") and key not in METRICS


def metric_of(key: str) -> Metric:
    """Of any key of `before` and `after`, one that is not known here included."""
    if is_reward(key):
        label = f"Reward: {humanize(key.removeprefix('reward_'))}"
        return Metric(label, "mean over the rows that it scores, higher is better", 1, share=False)
    return METRICS.get(key) or Metric(humanize(key), "", share=False)


def in_order(keys: Iterable[str]) -> list[str]:
    """As METRICS has them; each reward after their sum, what is not known last."""
    order = {key: place for place, key in enumerate(METRICS)}
    return sorted(keys, key=lambda key: order["reward"] + 0.5 if is_reward(key) else order.get(key, len(order)))


def goal_of(path: str) -> int:
    """Which direction is good, of any number of summary.json; 0: neither."""
    part, _, key = path.partition(".")
    return metric_of(key).good if part == "after" else GOALS.get(path, 0)


def is_share(path: str) -> bool:
    """Whether the number at this path of summary.json is a share of 1."""
    part, _, key = path.partition(".")
    return part == "after" and metric_of(key).share


def deciding_metric(asked: str | None, summaries: Iterable[dict[str, Any]]) -> str:
    """By what runs are compared: what was asked for, or else preference accuracy where any has it, or else reward.

    Args:
        summaries: the runs' summary.json; where none has either, preference accuracy.
    """
    if asked:
        return asked
    known = list(summaries)
    measured = (path for path in BY_DEFAULT if any(summary_value(summary, path) is not None for summary in known))
    return next(measured, BY_DEFAULT[0])


def summary_value(summary: dict[str, Any], path: str) -> float | None:
    """A number of summary.json by its path (`after.recall`); None where it is missing or not finite."""
    part, _, key = path.partition(".")
    return as_finite((summary.get(part) or {}).get(key))

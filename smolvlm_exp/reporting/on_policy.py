"""Signs, in the metrics of training on sampled answers, that it does not learn what it should: with what to change."""

from collections.abc import Iterator, Mapping
from typing import Any

from smolvlm_exp.utils.formatting import as_finite

Events = list[dict[str, Any]]  # of metrics.jsonl, by step
Sign = tuple[str, str]  # a stable id; a sentence with the figures, and one with the setting to change

MIN_EVENTS = 3  # logged before a sign can be told from chance
WINDOW = 10  # events that a mean is over
MAX_SAME = 0.8  # of groups whose answers all earn the same
MAX_TRUNCATED = 0.5  # of answers
MAX_LENGTH_RATIO = 2.0  # by which answers may grow or shrink


def on_policy_signs(trainer: Mapping[str, Any], events: Events) -> Iterator[Sign]:
    """
    Args:
        trainer: its settings; events: so far.
    """
    sampled = [event for event in events if "reward" in event]
    if len(sampled) < MIN_EVENTS:
        return
    last = sampled[-WINDOW:]
    yield from same_rewards(trainer, last)
    yield from truncation(trainer, last)
    yield from not_finite(trainer, sampled)
    yield from length_drift(sampled)


def same_rewards(trainer: Mapping[str, Any], events: Events) -> Iterator[Sign]:
    share = mean(events, "frac_reward_zero_std")
    if share is not None and share > MAX_SAME:
        yield (
            "same_rewards",
            f"little to learn from: in {share:.0%} of the groups all answers earned the same, which teaches nothing.\n"
            f"Try trainer.temperature={1.2 * trainer['temperature']:.2g}, "
            f"trainer.num_generations={2 * trainer['num_generations']}, harder rows, or rewards with more between "
            "right and wrong.",
        )


def truncation(trainer: Mapping[str, Any], events: Events) -> Iterator[Sign]:
    share, limit = mean(events, "completions/clipped_ratio"), trainer["max_completion_length"]
    if share == 1:
        yield (
            "no_answer_ended",
            f"no answer ended: its last token was never drawn within {limit} tokens.\n"
            "Check that the base answers in the chat template (task=generate), or raise "
            f"trainer.max_completion_length to {2 * limit}.",
        )
    elif share is not None and share > MAX_TRUNCATED:
        yield (
            "truncated_answers",
            f"{share:.0%} of the answers are cut at trainer.max_completion_length={limit}"
            f"{' and teach nothing' if trainer['mask_truncated_completions'] else ''}.\n"
            f"Try trainer.max_completion_length={2 * limit}, or +reward.weights.length=0.5 for shorter answers.",
        )


def not_finite(trainer: Mapping[str, Any], events: Events) -> Iterator[Sign]:
    broken = [event["step"] for event in events if "kl" in event and as_finite(event["kl"]) is None]
    if broken:
        yield (
            "kl_not_finite",
            f"the KL divergence from the reference was not finite at step {broken[0]}: the policy has left it.\n"
            f"Try trainer.learning_rate={trainer['learning_rate'] / 4:g}, or trainer.beta={2 * trainer['beta']:g}.",
        )


def length_drift(events: Events) -> Iterator[Sign]:
    if len(events) < 2 * MIN_EVENTS:
        return
    first, last = (mean(part, "completions/mean_length") for part in (events[:MIN_EVENTS], events[-MIN_EVENTS:]))
    if first and last and not 1 / MAX_LENGTH_RATIO <= last / first <= MAX_LENGTH_RATIO:
        yield (
            "length_drift",
            f"answers went from {first:.0f} to {last:.0f} tokens on average: a reward may pay for length alone.\n"
            "Read completions.jsonl; +reward.weights.length=0.5 or another reward can hold it.",
        )


def mean(events: Events, key: str) -> float | None:
    values = [value for event in events if (value := as_finite(event.get(key))) is not None]
    return sum(values) / len(values) if values else None

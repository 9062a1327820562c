"""Preference pairs out of a row's own scored answers: which is preferred to which, and what a row without pairs lacks.

RLAIF-V (arXiv 2405.17220) makes its pairs so, from answers that the model itself gives, and does it again with the
tuned model.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer to a row, as a line of answers.jsonl has it."""

    text: str
    score: float | None  # the rewards' weighted sum; None where no reward concerns the row
    logp: float  # mean log-probability per token, in nats, under the model that gave it
    tokens: int
    ended: bool  # by the end token; else it was cut
    rewards: dict[str, float | None]  # by name

    @property
    def eligible(self) -> bool:
        """Whether a pair may have it: it is complete and has a score."""
        return self.ended and self.score is not None and bool(self.text)


def select_pairs(
    answers: Sequence[ScoredAnswer], pairs: int, margin: float, max_length_ratio: float, rejected: str
) -> list[tuple[int, int]]:
    """At most so many `pairs` of a row, as (chosen, rejected) places in `answers`.

    Chosen are the answers with the highest score, the likeliest first, and again from the first where they are too few.
    No answer is rejected twice, and texts that occur several times count once.

    Args:
        margin: by which the chosen answer's score is higher, at least.
        max_length_ratio: of the longer answer's tokens to the shorter one's, at most.
        rejected: `likeliest`, the answers that the model is surest of come first; `worst`, those with the lowest score.
    """
    places = {answer.text: i for i, answer in reversed(list(enumerate(answers))) if answer.eligible}.values()
    scores = {i: score for i in places if (score := answers[i].score) is not None}
    if not scores:
        return []
    best = max(scores.values())
    by_likelihood = sorted(scores, key=lambda i: (-answers[i].logp, i))
    chosen = [i for i in by_likelihood if scores[i] == best]
    worse = [i for i in by_likelihood if best - scores[i] >= margin]
    if rejected == "worst":
        worse.sort(key=lambda i: scores[i])  # stable: of equal ones the likeliest
    selected: list[tuple[int, int]] = []
    for i in worse:
        preferred = chosen[len(selected) % len(chosen)]
        lengths = answers[preferred].tokens, answers[i].tokens
        if len(selected) < pairs and max(lengths) <= max_length_ratio * min(lengths):
            selected.append((preferred, i))
    return selected


def without_pairs(answers: Sequence[ScoredAnswer], highest: float | None) -> str:
    """Why a row has no pairs.

    Args:
        highest: the highest score of any answer to a question of its kind.

    Returns:
        `all_right` or `all_wrong`: its answers have one score, which is `highest` or below it; `no_margin`: they
        differ, by less than the margin or too much in length; `unscored`: no complete answer has a score.
    """
    scores = {answer.score for answer in answers if answer.eligible}
    if not scores:
        return "unscored"
    if len(scores) > 1:
        return "no_margin"
    return "all_right" if scores == {highest} else "all_wrong"

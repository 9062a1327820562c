"""What a model's answers to the held-out rows are rewarded with, by the rewards that it is trained on."""

from collections.abc import Sequence
from typing import Protocol

from smolvlm_exp.data.messages import Message
from smolvlm_exp.evaluation.metrics import METRICS
from smolvlm_exp.evaluation.statistics import Ratio, ratio
from smolvlm_exp.utils.errors import RequestError

Scores = list[float | None]  # of each answer; None where a reward does not concern its row


class Scorer(Protocol):
    """Scores answers; the rewards themselves come from above this room."""

    def __call__(
        self,
        prompts: Sequence[list[Message]],
        answers: Sequence[str],
        ids: Sequence[list[int]],
        truth: Sequence[str | None],
    ) -> tuple[dict[str, Scores], Scores]:
        """
        Args:
            ids: the answers' tokens.
            truth: what is known of the images (data/truth.py), None where nothing is.

        Returns:
            Each reward's scores by its name, and their weighted sums, None where no reward concerns a row.
        """
        ...


def reward_metrics(rewards: dict[str, Scores], totals: Scores) -> dict[str, Ratio]:
    """`reward`, the mean of the weighted sums, and `reward_<name>` of each reward that concerns any row.

    Raises:
        RequestError: a reward has a name under which another metric would be written.
    """
    taken = next((name for name in rewards if f"reward_{name}" in METRICS), None)
    if taken:
        raise RequestError(
            f"a reward named {taken} would be written as reward_{taken}, which is another metric: rename it."
        )
    named = {"reward": totals, **{f"reward_{name}": scores for name, scores in rewards.items()}}
    return {key: mean_of_known(scores) for key, scores in named.items() if any(score is not None for score in scores)}


def mean_of_known(scores: Scores) -> Ratio:
    """A row that is not scored adds to neither sum."""
    return ratio([score or 0.0 for score in scores], [float(score is not None) for score in scores])

"""Is the answer likelier with the image than with a blank one?"""

from collections.abc import Sequence
from typing import Any

from smolvlm_exp.rewards.completions import Scores
from smolvlm_exp.utils.errors import RequestError


def image_dependence(
    logps: Sequence[float] | None = None, blank_logps: Sequence[float] | None = None, **columns: Any
) -> Scores:
    """logps - blank_logps, cut to [-1, 1].

    Args:
        logps: mean log-probability per token of each answer, in nats, with its image.
        blank_logps: the same with a blank image.

    Raises:
        RequestError: a column is missing, which only a trainer that has the model can fill.
    """
    if logps is None or blank_logps is None:
        missing = [name for name, column in (("logps", logps), ("blank_logps", blank_logps)) if column is None]
        raise RequestError(
            f"reward.weights.image_dependence needs the columns logps and blank_logps, and {' and '.join(missing)} "
            "is not there: leave it out with ~reward.weights.image_dependence."
        )
    return [min(max(with_image - blank, -1.0), 1.0) for with_image, blank in zip(logps, blank_logps, strict=True)]

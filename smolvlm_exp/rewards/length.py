"""A penalty for answers that are too long: DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smolvlm_exp.rewards.completions import Scores
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.fields import at_least


@dataclass
class LengthConfig:
    max_length: int = at_least(1, 256)  # tokens of an answer; a longer one gets -1
    buffer: int = at_least(1, 64)  # tokens before that over which the penalty grows from 0


def length(completion_ids: Sequence[Sequence[int]], config: LengthConfig, **columns: Any) -> Scores:
    """0 up to max_length - buffer tokens, from there down to -1 at max_length in a straight line, then -1."""
    free = config.max_length - config.buffer
    return [max(min(free - len(ids), 0) / config.buffer, -1.0) for ids in completion_ids]


def checked(config: LengthConfig) -> LengthConfig:
    """The settings. Raises RequestError where the buffer is longer than the longest answer."""
    if config.buffer > config.max_length:
        raise RequestError(
            f"reward.length.buffer={config.buffer}: at most reward.length.max_length={config.max_length}."
        )
    return config

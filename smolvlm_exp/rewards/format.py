"""Has the answer the form that was asked for? By a regular expression."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smolvlm_exp.rewards.completions import Conversation, Scores, texts
from smolvlm_exp.utils.errors import RequestError


@dataclass
class FormatConfig:
    pattern: str | None = None  # regular expression that is searched for; with ^ and $ it is the whole answer's


def format(completions: Sequence[Conversation], pattern: re.Pattern[str], **columns: Any) -> Scores:
    """1 where the pattern occurs in the answer, else 0."""
    return [float(pattern.search(text) is not None) for text in texts(completions)]


def compiled(config: FormatConfig) -> re.Pattern[str]:
    if not config.pattern:
        raise RequestError(r"reward.weights.format needs a pattern: 'reward.format.pattern=\"^Answer: \"'.")
    try:
        return re.compile(config.pattern)
    except re.error as error:
        raise RequestError(f"reward.format.pattern={config.pattern}: no regular expression ({error}).") from error

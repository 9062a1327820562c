"""Is it the right number, or close to it?"""

import re
from collections.abc import Sequence
from typing import Any

from smolvlm_exp.rewards.completions import Conversation, Scores, of_kind, texts

COUNTING = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
WORDS = {"a": 1, "an": 1, "no": 0, "none": 0} | {word: number for number, word in enumerate(COUNTING)}
NUMBER = re.compile(rf"(?<![\w.])(-?\d[\d,]*(?:\.\d+)?)|\b({'|'.join(WORDS)})\b")


def number(completions: Sequence[Conversation], truth: Sequence[str | None], **columns: Any) -> Scores:
    """Of truths of the kind `number`: 1 for the true number, max(0, 1 - |difference| / max(|true|, 1)) / 2 for another.

    An answer without a number gets 0.
    """
    return [
        None if known is None else closeness(first_number(text), float(known["answer"]))
        for text, known in zip(texts(completions), of_kind(truth, "number"), strict=True)
    ]


def first_number(text: str) -> float | None:
    """The first number in a text, in digits or in words: `There is a star` is 1, `no stars` 0."""
    match = NUMBER.search(text.lower())
    if match is None:
        return None
    return float(match[1].replace(",", "")) if match[1] else WORDS[match[2]]


def closeness(said: float | None, true: float) -> float:
    if said is None:
        return 0.0
    return 1.0 if said == true else 0.5 * max(0.0, 1 - abs(said - true) / max(abs(true), 1))

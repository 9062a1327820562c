"""Is the answer the right one, word for word? As the VQA challenge compares them (visualqa.org/evaluation.html).

Contractions are compared without their apostrophe (`dont` is `don't`) where the official script looks them up.
"""

import re
from collections.abc import Sequence
from typing import Any

from smolvlm_exp.rewards.completions import Conversation, Scores, of_kind, texts

ARTICLES = ("a", "an", "the")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
NOTHING = re.compile(r"['\u2019]|(?<=\d),(?=\d)|(?<!\d)\.|\.(?!\d)")  # is dropped; a point between digits stays
SPACE = re.compile(r"[;/\[\]\"{}()=+\\_\-<>@`,?!]")  # becomes a space, so that `black-and-white` is three words


def exact_match(completions: Sequence[Conversation], truth: Sequence[str | None], **columns: Any) -> Scores:
    """1 where the normalised answer is one that the truth's `answer` (kind `answer`, one or a list) accepts, else 0."""
    return [
        None if known is None else float(normalised(text) in accepted(known["answer"]))
        for text, known in zip(texts(completions), of_kind(truth, "answer"), strict=True)
    ]


def accepted(answer: Any) -> list[str]:
    return [normalised(str(one)) for one in (answer if isinstance(answer, list) else [answer])]


def normalised(text: str) -> str:
    """`The Two Dogs.` -> `2 dogs`. An article that is the whole answer stays: `A` may be one of several choices."""
    words = SPACE.sub(" ", NOTHING.sub("", text.lower())).split()
    kept = [DIGITS.get(word, word) for word in words if word not in ARTICLES]
    return " ".join(kept or words)

"""Whether an answer is the right one, word for word: VQA's accuracy of open questions (arXiv 1505.00468)."""

import re
from collections.abc import Sequence
from typing import Any

from smolvlm_exp.evaluation.statistics import Ratio, mean

ARTICLES = ("a", "an", "the")
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
NUMBER_OF = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
DROPPED = re.compile(r"['\u2019]|(?<=\d),(?=\d{3}\b)|(?<!\d)\.|\.(?!\d)")  # `U.S.` is one word, 3.5 a number
WORD = re.compile(r"(?:(?<!\w)-)?\d+(?:\.\d+)?|[^\W_]+")


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, with numbers as digits: `The 2nd one, two.` -> `2nd 1 2`.

    Of articles alone nothing is left out: `A` may be one of several choices.
    """
    words = WORD.findall(DROPPED.sub("", text.lower()))
    kept = [word for word in words if word not in ARTICLES] or words
    return " ".join(NUMBER_OF.get(word, word) for word in kept)


def exact_match(answer: str, accepted: Any) -> bool:
    """
    Args:
        accepted: a text, or several of which any will do; or a number, which an answer may write as 2, 2.0 or two.
    """
    if isinstance(accepted, list):
        return any(exact_match(answer, one) for one in accepted)
    given = normalise(answer)
    if isinstance(accepted, str):
        return given == normalise(accepted)
    return re.fullmatch(r"-?\d+(\.\d+)?", given) is not None and float(given) == float(accepted)


def answer_accuracy(answers: Sequence[str], accepted: Sequence[Any]) -> dict[str, Ratio]:
    """The share of the answers that `exact_match` what is accepted of each; nothing where there are none."""
    if not answers:
        return {}
    return {"answer_accuracy": mean([exact_match(a, right) for a, right in zip(answers, accepted, strict=True)])}

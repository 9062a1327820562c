"""Does the answer say the same thing again? A penalty, since saying it twice costs nothing by the other rewards."""

import re
from collections.abc import Sequence
from typing import Any

from smolvlm_exp.data.vocabulary import Words
from smolvlm_exp.evaluation.hallucination import repeats
from smolvlm_exp.rewards.completions import Conversation, Scores, of_kind, texts

NGRAM = 3  # words


def repetition(
    completions: Sequence[Conversation], truth: Sequence[str | None], words: Words, **columns: Any
) -> Scores:
    """0 or less: for captions minus the number of objects that are named more than once, for any other answer minus
    the share of its 3-grams that have occurred in it before."""
    return [
        0.0 - (repeated_share(text) if known is None else repeats(text, known, words))
        for text, known in zip(texts(completions), of_kind(truth, "caption"), strict=True)
    ]


def repeated_share(text: str) -> float:
    """1 - different 3-grams / 3-grams; 0 for a text of fewer than three words."""
    said = re.findall(r"\w+", text.lower())
    ngrams = list(zip(*(said[start:] for start in range(NGRAM)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0

"""Does a caption give the image's objects their right colour and size? Where the truth describes them (`phrases`)."""

from collections.abc import Sequence
from typing import Any

from smolvlm_exp.data.vocabulary import Words
from smolvlm_exp.evaluation.hallucination import described, rightly_described
from smolvlm_exp.rewards.completions import Conversation, Scores, of_kind, texts


def attributes(
    completions: Sequence[Conversation], truth: Sequence[str | None], words: Words, **columns: Any
) -> Scores:
    """Objects that are described rightly / objects that the truth describes; None where it describes none.

    An object that is left out counts as one that is described wrongly. Otherwise a caption could avoid what it is not
    sure of, and name less and less.
    """
    scores: Scores = []
    for text, known in zip(texts(completions), of_kind(truth, "caption"), strict=True):
        objects = described(known, words) if known else {}
        right = {name for name, is_right in rightly_described(text, known or {}, words) if is_right}
        scores.append(len(right) / len(objects) if objects else None)
    return scores

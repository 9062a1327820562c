"""Has what a caption names the right colour and size? Only where the truth describes its objects (`phrases`)."""

from collections.abc import Sequence
from typing import Any

from smolvlm_exp.data.vocabulary import Words
from smolvlm_exp.evaluation.hallucination import attribute_counts
from smolvlm_exp.rewards.completions import Conversation, Scores, of_kind, texts


def attributes(
    completions: Sequence[Conversation], truth: Sequence[str | None], words: Words, **columns: Any
) -> Scores:
    """Right phrases / phrases that name an object of the image; None where the truth has no `phrases` or none is named.

    An object that is not in the image has no right colour: `objects` is the reward that counts it.
    """
    counts = [
        (0, 0) if known is None else attribute_counts(text, known, words)
        for text, known in zip(texts(completions), of_kind(truth, "caption"), strict=True)
    ]
    return [right / named if named else None for right, named in counts]

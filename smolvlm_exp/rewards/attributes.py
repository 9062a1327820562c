"""Has what a caption names the right colour and size? Only where the truth describes its objects (`phrases`)."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from smolvlm_exp.data.scenes import COLOURS, SIZES
from smolvlm_exp.data.vocabulary import Truth, Words, tokens
from smolvlm_exp.rewards.completions import Conversation, Scores, of_kind, texts
from smolvlm_exp.rewards.repetition import every_mention

ATTRIBUTES = {*COLOURS, *SIZES}


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


def attribute_counts(text: str, truth: Truth, words: Words) -> tuple[int, int]:
    """How many of a caption's phrases give an object of the image its colour and size, and how many name one.

    `A small red star` claims red and small of a star: it is right if one of the truth's phrases says both of a star. A
    star without colour and size claims nothing, and is right. Counts (`two`) are not looked at.
    """
    described = [claim for phrase in truth.get("phrases", ()) for claim in claims(phrase, truth, words)]
    kinds = {kind for kind, _ in described}
    named = [(kind, claimed) for kind, claimed in claims(text, truth, words) if kind in kinds]
    right = [any(kind == other and claimed <= has for other, has in described) for kind, claimed in named]
    return sum(right), len(named)


def claims(text: str, truth: Truth, words: Words) -> Iterator[tuple[str, set[str]]]:
    """Each object that a text names, with the colours and sizes since the comma, `and` or object before it."""
    for part in re.split(r",| and ", text):
        rest = tokens(part)
        for mention, kind in every_mention(part, truth, words):
            phrase = mention.split()
            at = next(start for start in range(len(rest)) if rest[start : start + len(phrase)] == phrase)
            if kind is not None:
                yield kind, ATTRIBUTES & set(rest[:at])
            rest = rest[at + len(phrase) :]

"""Does the answer say what is there? CHAIR (arXiv 1809.02156) and POPE's yes/no measures (arXiv 2305.10355)."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Caption:
    mentions: Sequence[str]  # kinds of object the caption names, each once
    objects: Sequence[str]  # kinds that are in the picture
    words: int  # length of the caption


def mentions(text: str, vocabulary: Iterable[str]) -> list[str]:
    """The words of `vocabulary` that `text` names, each once, in order; a plural counts as its singular."""
    found = []
    singular = {form: word for word in vocabulary for form in (word, f"{word}s", f"{word}es")}
    for token in re.findall(r"[a-z]+", text.lower()):
        if token in singular and singular[token] not in found:
            found.append(singular[token])
    return found


def chair(captions: Sequence[Caption]) -> dict[str, float]:
    """CHAIR_i = hallucinated mentions / mentions; CHAIR_s = captions with one or more / captions.

    Returns:
        `chair_s`, `chair_i`, `recall` (named objects / objects, over all captions) and `mean_length` in words.
        An empty caption hallucinates nothing, which is why recall and length stand beside.
    """
    if not captions:
        return {}
    wrong = [sum(m not in c.objects for m in c.mentions) for c in captions]
    named = sum(len(c.mentions) for c in captions)
    there = sum(len(set(c.objects)) for c in captions)
    covered = sum(len(set(c.objects) & set(c.mentions)) for c in captions)
    return {
        "chair_s": sum(w > 0 for w in wrong) / len(captions),
        "chair_i": sum(wrong) / named if named else 0.0,
        "recall": covered / there if there else 1.0,
        "mean_length": sum(c.words for c in captions) / len(captions),
    }


def yes_or_no(answer: str) -> str | None:
    """`yes` or `no` where the answer's first word says so, None where it says neither."""
    first = re.match(r"\W*(yes|no)\b", answer.lower())
    return first.group(1) if first else None


def yes_no(answers: Sequence[str | None], truth: Sequence[str]) -> dict[str, float]:
    """POPE's measures. `yes` is the positive; an answer that is neither counts as wrong, and as no `yes`.

    Returns:
        `yes_no_accuracy`, `yes_no_f1` and `yes_ratio` (the share of the answers that are `yes`).
    """
    if not truth:
        return {}
    pairs = list(zip(answers, truth, strict=True))
    true_positive = sum(a == "yes" and t == "yes" for a, t in pairs)
    said_yes = sum(a == "yes" for a, _ in pairs)
    is_yes = sum(t == "yes" for _, t in pairs)
    return {
        "yes_no_accuracy": sum(a == t for a, t in pairs) / len(pairs),
        "yes_no_f1": 2 * true_positive / (said_yes + is_yes) if said_yes + is_yes else 0.0,
        "yes_ratio": said_yes / len(pairs),
    }

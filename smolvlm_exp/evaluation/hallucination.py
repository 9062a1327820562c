"""Does the answer say what is there? CHAIR (arXiv 1809.02156) and POPE's yes/no measures (arXiv 2305.10355)."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from smolvlm_exp.evaluation.statistics import Ratio, mean, ratio


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


def chair(captions: Sequence[Caption]) -> dict[str, Ratio]:
    """CHAIR_i = hallucinated mentions / mentions; CHAIR_s = captions with one or more / captions.

    Returns:
        `chair_s`, `chair_i`, `recall` (named objects / objects, over all captions) and `mean_length` in words.
        An empty caption hallucinates nothing, which is why recall and length stand beside.
    """
    if not captions:
        return {}
    wrong = [sum(m not in c.objects for m in c.mentions) for c in captions]
    covered = [len(set(c.objects) & set(c.mentions)) for c in captions]
    return {
        "chair_s": mean([w > 0 for w in wrong]),
        "chair_i": ratio(wrong, [len(c.mentions) for c in captions]),
        "recall": ratio(covered, [len(set(c.objects)) for c in captions], empty=1.0),
        "mean_length": mean([c.words for c in captions]),
    }


def yes_or_no(answer: str) -> str | None:
    """`yes` or `no` where the answer's first word says so, None where it says neither."""
    first = re.match(r"\W*(yes|no)\b", answer.lower())
    return first.group(1) if first else None


def yes_no(answers: Sequence[str | None], truth: Sequence[str]) -> dict[str, Ratio]:
    """POPE's measures. `yes` is the positive; an answer that is neither counts as wrong, and as no `yes`.

    Returns:
        `yes_no_accuracy`, `yes_no_f1` and `yes_ratio` (the share of the answers that are `yes`).
    """
    if not truth:
        return {}
    pairs = list(zip(answers, truth, strict=True))
    said, true = [a == "yes" for a in answers], [t == "yes" for t in truth]
    both = [2.0 * (s and t) for s, t in zip(said, true, strict=True)]
    return {
        "yes_no_accuracy": mean([a == t for a, t in pairs]),
        "yes_no_f1": ratio(both, [s + t for s, t in zip(said, true, strict=True)]),  # 2 TP / (said yes + is yes)
        "yes_ratio": mean(said),
    }

"""Does the answer say what is there? CHAIR (arXiv 1809.02156), AMBER's measures of captions (arXiv 2311.07397), and
POPE's of yes/no questions (arXiv 2305.10355).

`Vocabulary` and `Amber` read the objects out of an answer, `chair` and `yes_no` count: pure functions of texts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from smolvlm_exp.data.vocabulary import Truth, Words
from smolvlm_exp.evaluation.statistics import Ratio, mean, ratio


@dataclass(frozen=True)
class Caption:
    mentions: Sequence[str]  # the objects that the caption names
    objects: Sequence[str]  # those that are in the image
    words: int  # length of the caption
    others: int = 0  # further mentions, neither right nor wrong
    expected: Sequence[str] = ()  # objects not in the image that people would expect there (AMBER)


def read_caption(text: str, truth: Truth, words: Words) -> Caption:
    """What CHAIR counts of an answer."""
    names = [name for _, name in words(text, truth)]
    mentions = [name for name in names if name is not None]
    others = len(names) - len(mentions)
    return Caption(mentions, truth["objects"], len(text.split()), others, truth.get("expected", ()))


def chair(captions: Sequence[Caption]) -> dict[str, Ratio]:
    """CHAIR_i = hallucinated mentions / mentions; CHAIR_s = captions with one or more / captions.

    Returns:
        `chair_s`, `chair_i`, `recall` (named objects / objects, over all captions) and `mean_length` in words; where
        captions have `expected` objects, `cog`, the share of those that are named. AMBER calls the first three Hal,
        CHAIR and Cover. An empty caption hallucinates nothing, which is why recall and length are reported too.
    """
    if not captions:
        return {}
    wrong = [sum(m not in c.objects for m in c.mentions) for c in captions]
    covered = [len(set(c.objects) & set(c.mentions)) for c in captions]
    metrics = {
        "chair_s": mean([w > 0 for w in wrong]),
        "chair_i": ratio(wrong, [len(c.mentions) + c.others for c in captions]),
        "recall": ratio(covered, [len(c.objects) for c in captions], empty=1.0),
        "mean_length": mean([c.words for c in captions]),
    }
    if any(c.expected for c in captions):
        imagined = [len((set(c.expected) - set(c.objects)) & set(c.mentions)) for c in captions]
        metrics["cog"] = ratio(imagined, [len(c.expected) for c in captions])
    return metrics


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
    return {
        "yes_no_accuracy": mean([a == t for a, t in zip(answers, truth, strict=True)]),
        "yes_no_f1": f1(answers, truth, "yes"),
        "yes_ratio": mean([a == "yes" for a in answers]),
    }


def f1(answers: Sequence[str | None], truth: Sequence[str], positive: str) -> Ratio:
    """2 TP / (predicted positives + actual positives)."""
    predicted, true = [a == positive for a in answers], [t == positive for t in truth]
    both = [2.0 * (s and t) for s, t in zip(predicted, true, strict=True)]
    return ratio(both, [s + t for s, t in zip(predicted, true, strict=True)])

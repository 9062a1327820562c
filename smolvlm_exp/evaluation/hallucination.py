"""Does the answer say what is there? CHAIR (arXiv 1809.02156), AMBER's measures of captions (arXiv 2311.07397), and
POPE's of yes/no questions (arXiv 2305.10355). Does it say it in the right colour, size and number, and once?

`Vocabulary` and `Amber` read the objects out of an answer, `chair` and `yes_no` count: pure functions of texts.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from smolvlm_exp.data.vocabulary import Truth, Words, every_mention, tokens
from smolvlm_exp.evaluation.exact_match import NUMBER_OF
from smolvlm_exp.evaluation.statistics import Ratio, mean, ratio

# Words of colour (the eleven basic terms of Berlin and Kay 1969) and of size -> how they are compared.
COLOURS = ("white", "black", "red", "green", "yellow", "blue", "brown", "purple", "pink", "orange", "grey")
ATTRIBUTES = {word: word for word in (*COLOURS, "small", "large")} | {"gray": "grey", "little": "small", "big": "large"}
COUNTS = NUMBER_OF | {"a": "1", "an": "1"}


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


def attributes_in(said: Sequence[str]) -> set[str]:
    return {ATTRIBUTES[word] for word in said if word in ATTRIBUTES}


def count_in(said: Sequence[str]) -> set[str]:
    """The last alone: `a picture of two` says two."""
    return set([COUNTS[word] for word in said if word in COUNTS][-1:])


Claims = Callable[[Sequence[str]], set[str]]  # reads what the words before an object say of it


def description_counts(text: str, truth: Truth, words: Words, claims: Claims = attributes_in) -> tuple[int, int]:
    """How many of a caption's phrases give an object of the image its colour and size or, with `count_in`, its number.

    `a small red star` claims red and small of a star. It is right where one of the truth's `phrases` says all of that
    about a star; a star without colour and size claims nothing, and is right.

    Returns:
        Right phrases, and all phrases that name an object of the image: (0, 0) where the truth has no `phrases`.
    """
    right = [is_right for _, is_right in rightly_described(text, truth, words, claims)]
    return sum(right), len(right)


def rightly_described(text: str, truth: Truth, words: Words, claims: Claims = attributes_in) -> list[tuple[str, bool]]:
    """Each object of the truth's `phrases` that a text names, as often as it does, and whether it is described so."""
    known = described(truth, words, claims)
    named = [(name, claimed) for name, claimed in described_objects(text, truth, words, claims) if name in known]
    return [(name, any(claimed <= attributes for attributes in known[name])) for name, claimed in named]


def described(truth: Truth, words: Words, claims: Claims = attributes_in) -> dict[str, list[set[str]]]:
    """Object -> what each of the truth's `phrases` about it says of it."""
    known: dict[str, list[set[str]]] = {}
    for phrase in truth.get("phrases", ()):
        for name, attributes in described_objects(phrase, truth, words, claims):
            known.setdefault(name, []).append(attributes)
    return known


def described_objects(text: str, truth: Truth, words: Words, claims: Claims) -> Iterator[tuple[str, set[str]]]:
    """Each object that a text names, with what is said of it between the comma, `and` or object before, and it."""
    for part in re.split(r",| and ", text):
        said = tokens(part)
        for mention, name in every_mention(part, truth, words):
            length = len(mention.split())
            at = next(i for i in range(len(said)) if said[i : i + length] == mention.split())
            if name is not None:
                yield name, claims(said[:at])
            said = said[at + length :]


def repeats(text: str, truth: Truth, words: Words) -> int:
    """How many objects a caption names more than once."""
    counts = Counter(name for _, name in every_mention(text, truth, words) if name is not None)
    return sum(count > 1 for count in counts.values())


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

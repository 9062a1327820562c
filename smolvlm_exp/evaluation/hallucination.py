"""Does the answer say what is there? CHAIR (arXiv 1809.02156), AMBER's measures of captions (arXiv 2311.07397), and
POPE's of yes/no questions (arXiv 2305.10355).

`Vocabulary` and `Amber` read the objects out of an answer, `chair` and `yes_no` count: pure functions of texts.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smolvlm_exp.evaluation.statistics import Ratio, mean, ratio

Truth = dict[str, Any]  # what is in a row's picture; see data/questions.py
Mention = tuple[str, str | None]  # as it is said; the object it stands for, None where it is neither right nor wrong
Words = Callable[[str, Truth], list[Mention]]  # reads the objects out of an answer

IRREGULAR = {"person": "people", "child": "children", "mouse": "mice", "goose": "geese", "tooth": "teeth"}


@dataclass(frozen=True)
class Caption:
    mentions: Sequence[str]  # the objects that the caption names
    objects: Sequence[str]  # those that are in the picture
    words: int  # length of the caption
    others: int = 0  # mentions beside those, neither right nor wrong
    expected: Sequence[str] = ()  # objects not in the picture that people would expect there (AMBER)


class Vocabulary:
    """Which words and phrases name which object; plurals count as their singular.

    Of several that begin at a word the longest counts, so that a `hot dog` is no dog.
    """

    def __init__(self, names: Mapping[str, str | None], once: bool = False) -> None:
        """
        Args:
            names: singular word or phrase -> its object; None where it names none, though a part of it would.
            once: an object that a text names again is not counted again.
        """
        self.objects = {tuple(tokens(name)): name_of for name, name_of in names.items()}
        for phrase, name_of in list(self.objects.items()):
            for plural in plurals(phrase[-1]):
                self.objects.setdefault((*phrase[:-1], plural), name_of)
        self.longest = max(map(len, self.objects), default=0)
        self.once = once

    def __call__(self, text: str, truth: Truth | None = None) -> list[Mention]:
        said, found, at = tokens(text), list[Mention](), 0
        while at < len(said):
            lengths = range(min(self.longest, len(said) - at), 0, -1)
            length = next((n for n in lengths if tuple(said[at : at + n]) in self.objects), 0)
            name = self.objects[tuple(said[at : at + length])] if length else None
            if name is not None and not (self.once and any(name == other for _, other in found)):
                found.append((" ".join(said[at : at + length]), name))
            at += max(length, 1)
        return found


class Amber:
    """AMBER's reading of a caption: a word may stand for any object that `relation.json` relates it to.

    AMBER also lets a word stand for one that spaCy's vectors find near, and takes nouns alone. Neither is done here, so
    that no language model is needed: `can` and `hot`, which are rarely nouns, are passed over.
    """

    NO_NOUNS = ("can", "hot")

    def __init__(self, related: Mapping[str, Sequence[str]], safe: Iterable[str]) -> None:
        """
        Args:
            related: object -> words that may stand for it, relation.json.
            safe: words that are never wrong, safe_words.txt.
        """
        self.related = {name: [word.lower() for word in words] for name, words in related.items()}
        self.safe = frozenset(safe)
        words = {word for name, words in self.related.items() for word in (name, *words)}
        self.vocabulary = Vocabulary({word: word for word in words - set(self.NO_NOUNS)})

    def __call__(self, text: str, truth: Truth) -> list[Mention]:
        there, expected = (self.stands_for(truth.get(key, ())) for key in ("objects", "expected"))
        return [
            (said, None if word in self.safe else there.get(word) or expected.get(word) or word)
            for said, word in self.vocabulary(text)
            if word is not None
        ]

    def stands_for(self, objects: Iterable[str]) -> dict[str, str]:
        """Word -> the first object that it may stand for; related words come before names, as in AMBER's own script."""
        found: dict[str, str] = {}
        for name in objects:
            for word in self.related.get(name, ()):
                found.setdefault(word, name)
        return found | {name: name for name in objects if name not in found}


def tokens(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def plurals(word: str) -> list[str]:
    """The forms that English has for it, and some that it has not."""
    endings = {"y": "ies", "f": "ves", "fe": "ves", "man": "men"}
    made = [word.removesuffix(end) + plural for end, plural in endings.items() if word.endswith(end)]
    return [f"{word}s", f"{word}es", *made, *([IRREGULAR[word]] if word in IRREGULAR else [])]


def read_caption(text: str, truth: Truth, words: Words) -> Caption:
    """What CHAIR counts of an answer."""
    found = [name for _, name in words(text, truth)]
    mentions = [name for name in found if name is not None]
    others = len(found) - len(mentions)
    return Caption(mentions, truth["objects"], len(text.split()), others, truth.get("expected", ()))


def chair(captions: Sequence[Caption]) -> dict[str, Ratio]:
    """CHAIR_i = hallucinated mentions / mentions; CHAIR_s = captions with one or more / captions.

    Returns:
        `chair_s`, `chair_i`, `recall` (named objects / objects, over all captions) and `mean_length` in words; where
        captions have `expected` objects, `cog`, the share of those that are named. AMBER calls the first three Hal,
        CHAIR and Cover. An empty caption hallucinates nothing, which is why recall and length stand beside.
    """
    if not captions:
        return {}
    wrong = [sum(m not in c.objects for m in c.mentions) for c in captions]
    covered = [len(set(c.objects) & set(c.mentions)) for c in captions]
    found = {
        "chair_s": mean([w > 0 for w in wrong]),
        "chair_i": ratio(wrong, [len(c.mentions) + c.others for c in captions]),
        "recall": ratio(covered, [len(c.objects) for c in captions], empty=1.0),
        "mean_length": mean([c.words for c in captions]),
    }
    if any(c.expected for c in captions):
        imagined = [len((set(c.expected) - set(c.objects)) & set(c.mentions)) for c in captions]
        found["cog"] = ratio(imagined, [len(c.expected) for c in captions])
    return found


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
    """2 TP / (said positive + is positive)."""
    said, true = [a == positive for a in answers], [t == positive for t in truth]
    both = [2.0 * (s and t) for s, t in zip(said, true, strict=True)]
    return ratio(both, [s + t for s, t in zip(said, true, strict=True)])

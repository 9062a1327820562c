"""Which words of an answer name which objects: the vocabularies of CHAIR (1809.02156) and of AMBER (2311.07397)."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Truth = dict[str, Any]  # what is in a row's image; see data/benchmarks.py
Mention = tuple[str, str | None]  # as it is said; the object it stands for, None where it is neither right nor wrong
Words = Callable[[str, Truth], list[Mention]]  # reads the objects out of an answer
IRREGULAR = {"person": "people", "child": "children", "mouse": "mice", "goose": "geese", "tooth": "teeth"}


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

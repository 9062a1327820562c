"""Which words of an answer name which objects: the vocabularies of CHAIR (1809.02156) and of AMBER (2311.07397)."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Truth = dict[str, Any]  # what is in a row's image; see data/truth.py
Mention = tuple[str, str | None]  # the words; the object they stand for, None where it is neither right nor wrong
Words = Callable[[str, Truth], list[Mention]]  # reads the objects out of an answer
IRREGULAR = {"person": "people", "child": "children", "mouse": "mice", "goose": "geese", "tooth": "teeth"}


class Vocabulary:
    """Which words and phrases name which object; plurals count as their singular.

    The longest phrase that starts at a word counts, so that a `hot dog` is no dog. A phrase whose object is None names
    none, even if a part of it would. With `once`, an object that a text names again is not counted again.
    """

    def __init__(self, names: Mapping[str, str | None], once: bool = False) -> None:
        self.objects = {tuple(tokens(name)): name_of for name, name_of in names.items()}
        for phrase, name_of in list(self.objects.items()):
            for plural in plurals(phrase[-1]):
                self.objects.setdefault((*phrase[:-1], plural), name_of)
        self.longest = max(map(len, self.objects), default=0)
        self.once = once

    def __call__(self, text: str, truth: Truth | None = None) -> list[Mention]:
        mentions, first = self.every(text), dict[str | None, Mention]()
        for mention in mentions:
            first.setdefault(mention[1], mention)
        return list(first.values()) if self.once else mentions

    def every(self, text: str) -> list[Mention]:
        """Each mention, an object's later ones included."""
        words, mentions, at = tokens(text), list[Mention](), 0
        while at < len(words):
            phrases = (tuple(words[at : at + length]) for length in range(self.longest, 0, -1))
            phrase = next((phrase for phrase in phrases if phrase in self.objects), ())
            name = self.objects.get(phrase)
            if name is not None:
                mentions.append((" ".join(phrase), name))
            at += len(phrase) or 1
        return mentions


class Amber:
    """AMBER's reading of a caption: a word may stand for any object that `relation.json` relates it to.

    AMBER also accepts words that are near in spaCy's vectors, and only nouns. Neither is done here, so that no language
    model is needed: `can` and `hot`, which are rarely nouns, are skipped.
    """

    NO_NOUNS = ("can", "hot")

    def __init__(self, related: Mapping[str, Sequence[str]], safe: Iterable[str]) -> None:
        """`related`: object -> words that may stand for it; `safe`: words that are never wrong."""
        self.related = {name: [word.lower() for word in words] for name, words in related.items()}
        self.safe = frozenset(safe)
        words = {word for name, words in self.related.items() for word in (name, *words)}
        self.vocabulary = Vocabulary({word: word for word in words - set(self.NO_NOUNS)})

    def __call__(self, text: str, truth: Truth) -> list[Mention]:
        present, expected = (self.stands_for(truth.get(key, ())) for key in ("objects", "expected"))
        return [
            (mention, None if word in self.safe else present.get(word) or expected.get(word) or word)
            for mention, word in self.vocabulary(text)
            if word is not None
        ]

    def stands_for(self, objects: Iterable[str]) -> dict[str, str]:
        """Word -> the first object that it may stand for; related words come before names, as in AMBER's script."""
        first: dict[str, str] = {}
        for name in objects:
            for word in self.related.get(name, ()):
                first.setdefault(word, name)
        return first | {name: name for name in objects if name not in first}


def every_mention(text: str, truth: Truth, words: Words) -> list[Mention]:
    """What `words` reads out of a text, an object's later mentions included."""
    return words.every(text) if isinstance(words, Vocabulary) else words(text, truth)


def words_digest(words: Words) -> str:
    """A hash of all that it reads texts by."""
    read = words.vocabulary if isinstance(words, Amber) else words
    parts: list[Any] = [[words.related, sorted(words.safe)]] if isinstance(words, Amber) else []
    if isinstance(read, Vocabulary):
        parts += [sorted([" ".join(phrase), name or ""] for phrase, name in read.objects.items()), read.once]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokens(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def plurals(word: str) -> list[str]:
    """All that could be its plural, in English or not."""
    endings = {"y": "ies", "f": "ves", "fe": "ves", "man": "men"}
    derived = [word.removesuffix(end) + plural for end, plural in endings.items() if word.endswith(end)]
    return [f"{word}s", f"{word}es", *derived, *([IRREGULAR[word]] if word in IRREGULAR else [])]

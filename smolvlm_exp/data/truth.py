"""What is known of a row's image, so that any answer can be scored or rewarded: the JSON in its `truth`.

    {"kind": "yes_no", "answer": "yes"}           `"positive": "no"` too where a benchmark's F1 counts no as positive
    {"kind": "number", "answer": 2}
    {"kind": "answer", "answer": "red"}           or a list of texts, any of which is right
    {"kind": "caption", "objects": ["dog", ...]}  all that is in the image; `expected`: what is not, but might well be;
                                                  `phrases`: each object in full, as `two small red stars`
    {"kind": "reference", "caption": "A dog."}    a description that is right

A truth may have further parts, as the `objects` behind a question of number.
"""

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from smolvlm_exp.data.vocabulary import Truth, Vocabulary, tokens

TRUTH_COLUMNS = ("truth", "answer", "objects", "caption")  # of a file's rows
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")


def truth_of(row: dict[str, Any]) -> str | None:
    """What a row's `TRUTH_COLUMNS` say, in any of the forms that a person may write; None where all are empty.

    Raises:
        ValueError: one of them is malformed; the message names it.
    """
    given = {name: row[name] for name in TRUTH_COLUMNS if row.get(name) not in (None, "", [], {})}
    if "truth" in given:
        if len(given) > 1:
            raise ValueError(f"it has `truth` and {', '.join(f'`{name}`' for name in given if name != 'truth')}")
        truth = checked(given["truth"])
    else:
        truth = {}
        if "answer" in given:
            truth |= answer_of(given["answer"])
        if "objects" in given:
            truth = {"kind": "caption", **truth, "objects": object_names(given["objects"])}
        if "caption" in given:
            truth = {"kind": "reference", **truth, "caption": non_empty(given["caption"], "`caption`")}
    return json.dumps(truth, ensure_ascii=False) if truth else None


def answer_of(answer: Any) -> Truth:
    """Kind and answer: yes or no, a number, or any other text; a list of different ones is a list of texts.

    The entries of VQA's `answers`, objects with an `answer` in them, are read as these.
    """
    if not isinstance(answer, list):
        return single_answer(answer)
    answer = [one["answer"] if isinstance(one, dict) and "answer" in one else one for one in answer]
    accepted = list(dict.fromkeys(str(single_answer(one)["answer"]) for one in answer))
    return {"kind": "answer", "answer": accepted} if len(accepted) > 1 else single_answer(accepted[0])


def single_answer(answer: Any) -> Truth:
    if isinstance(answer, bool):
        return {"kind": "yes_no", "answer": "yes" if answer else "no"}
    if isinstance(answer, int | float):
        return {"kind": "number", "answer": finite(answer)}
    text = non_empty(answer, "`answer`")
    if text.lower().removesuffix(".") in ("yes", "no"):
        return {"kind": "yes_no", "answer": text.lower().removesuffix(".")}
    if NUMBER.fullmatch(text):
        return {"kind": "number", "answer": finite(float(text) if "." in text else int(text))}
    return {"kind": "answer", "answer": text}


def object_names(objects: Any) -> list[str]:
    """A list of names, or names between commas -> the names in lower case, each once."""
    listed = objects.split(",") if isinstance(objects, str) else objects
    if not isinstance(listed, list):
        raise ValueError(f"`objects` is {listed!r:.60}; expected a list of names, or names between commas")
    names = dict.fromkeys(" ".join(non_empty(name, "a name in `objects`").lower().split()) for name in listed)
    if unreadable := next((name for name in names if not tokens(name)), None):
        raise ValueError(f"`objects` has {unreadable!r}, in which there is no letter from a to z to find in an answer")
    return list(names)


def checked(given: Any) -> Truth:
    """A `truth` as this module describes it, as JSON or as an object already; parts that are null are left out."""
    try:
        truth = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`truth` is not JSON ({error}); a right answer as it is belongs in `answer`") from error
    if not isinstance(truth, dict):
        raise ValueError(f"`truth` is {truth!r:.60}; expected an object with its kind")
    truth = {name: part for name, part in truth.items() if part is not None}
    kind, answer = truth.get("kind"), truth.get("answer")
    if kind == "yes_no":
        right = answer in ("yes", "no") and truth.get("positive", "yes") in ("yes", "no")
    elif kind == "number":
        right = isinstance(answer, int | float) and not isinstance(answer, bool) and finite(answer) == answer
    elif kind == "answer":
        right = answer not in ("", []) and (isinstance(answer, str) or are_texts(answer))
    elif kind == "caption":
        lists = [truth.get("objects"), truth.get("expected", []), truth.get("phrases", [])]
        right = all(map(are_texts, lists)) and all(map(tokens, (*truth["objects"], *truth.get("expected", ()))))
    elif kind == "reference":
        right = bool(non_empty(truth.get("caption"), "the `caption` of `truth`"))
    else:
        raise ValueError(f"`truth` is of kind {kind!r}; known are yes_no, number, answer, caption, reference")
    if not right:
        raise ValueError(f"`truth` is no truth of kind {kind}: {json.dumps(truth):.90}")
    return truth


def non_empty(text: Any, name: str) -> str:
    """The text without spaces around it."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is {text!r:.60}, not a text")
    if not text.strip():
        raise ValueError(f"{name} is empty")
    return text.strip()


def finite(number: float) -> float:
    try:
        if math.isfinite(number):
            return number
    except OverflowError:  # an integer that no float can hold
        pass
    raise ValueError(f"a number is {str(number)[:20]}, which cannot be compared with an answer")


def are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)


def read_truth(truth: str | None) -> Truth:
    """A row's truth; empty where nothing is known."""
    known: Truth = json.loads(truth) if truth else {}
    return known


def truth_text(truth: str | None) -> str:
    """A row's truth as a person reads it."""
    known = read_truth(truth)
    if "answer" in known:
        accepted = known["answer"]
        return " or ".join(accepted) if isinstance(accepted, list) else str(accepted)
    return known["caption"] if known.get("kind") == "reference" else ", ".join(known.get("objects", ()))


def image_text(truth: str | None, question: str) -> str:
    """In place of an image: what is known to be in it, or else what is asked about it."""
    known = read_truth(truth)
    if things := known.get("phrases") or known.get("objects"):
        return f"An image of {', '.join(things)}"
    return f"An image: {known['caption']}" if "caption" in known else f"The image of the question: {question}"


def vocabulary_of(truths: Iterable[str | None]) -> Vocabulary | None:
    """Each object that is in a row's image, or might well be, by its own name; None where there is none."""
    captions = [known for known in map(read_truth, truths) if known.get("kind") == "caption"]
    names = {name: name for known in captions for name in (*known["objects"], *known.get("expected", ()))}
    return Vocabulary(names) if names else None

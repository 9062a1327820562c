"""What TRL hands to a reward function, read: texts, questions, and what is known of a row's image.

A reward function is called by keyword, with lists of one length:

    f(prompts=..., completions=..., completion_ids=..., **columns) -> list[float | None]

`columns` are the data set's other columns, among them `truth` (JSON, see data/benchmarks.py, or None). None leaves a
completion out: this reward has nothing to say about it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from smolvlm_exp.data.truth import read_truth
from smolvlm_exp.data.vocabulary import Truth

Conversation = str | Sequence[dict[str, Any]]  # a text, or messages whose content is a text or a list of parts
Scores = list[float | None]  # one per completion
Reward = Callable[..., Scores]


def texts(completions: Sequence[Conversation]) -> list[str]:
    """The text of each completion: one that is a string itself, of a conversation all that is said in it."""
    return [
        c if isinstance(c, str) else "\n".join(content_text(message["content"]) for message in c) for c in completions
    ]


def questions(prompts: Sequence[Conversation]) -> list[str]:
    """What the user says last in each prompt, without images."""
    return [p if isinstance(p, str) else last_question(p) for p in prompts]


def last_question(messages: Sequence[dict[str, Any]]) -> str:
    return next((content_text(m["content"]) for m in reversed(messages) if m["role"] == "user"), "")


def content_text(content: str | Sequence[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text" and part["text"])


def of_kind(truth: Sequence[str | None], kind: str) -> list[Truth | None]:
    """What is known of each row, None where it is of another kind or nothing is known."""
    known = map(read_truth, truth)
    return [row if row.get("kind") == kind else None for row in known]

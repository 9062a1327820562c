"""Chat messages, and rows in the normal form. Pure functions, no files."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Features

VERSION = 5  # raise when rows come out differently: it is part of the key under which `datasets` caches them

Message = dict[str, Any]  # {"role", "content": a list of parts}


def user(question: str, images: int = 1) -> Message:
    """The user's turn: the images first, then the question."""
    parts: list[dict[str, str | None]] = [{"type": "image", "text": None} for _ in range(images)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def assistant(answer: str) -> Message:
    """The assistant's turn."""
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}


def pair(images: list[dict[str, Any]], question: str, chosen: str, rejected: str) -> dict[str, Any]:
    """A row in the normal form: a question about one image, and two answers."""
    answers = {"chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    return {"images": images, "prompt": [user(question)], **answers, "problem": ""}


def text_of(messages: list[Message]) -> str:
    """The text of a conversation, without its images."""
    return "\n".join(p["text"] for m in messages for p in m["content"] if p["type"] == "text" and p["text"])


def features() -> "Features":
    """The Arrow types of a row in the normal form, plus the `problem` that its source found (empty when none).

    Images are {"bytes", "path"}, not yet decoded: `preferences.prepare` checks their size first.
    """
    from datasets import Features, Image, List, Value

    messages = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    columns = {"prompt": messages, "chosen": messages, "rejected": messages}
    return Features({"images": List(Image(decode=False)), **columns, "problem": Value("string")})


def bad_row(problem: str) -> dict[str, Any]:
    """An unreadable row, and why."""
    return {"images": [], "prompt": [], "chosen": [], "rejected": [], "problem": problem}

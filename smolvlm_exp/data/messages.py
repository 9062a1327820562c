"""Chat messages as a list of parts: how a row's question, images and answers are written."""

from typing import Any

Message = dict[str, Any]


def user(question: str, images: int = 1) -> Message:
    """The user's turn: the images first, then the question."""
    parts: list[dict[str, str | None]] = [{"type": "image", "text": None} for _ in range(images)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def assistant(answer: str) -> Message:
    """The assistant's turn."""
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}


def pair(images: list[dict[str, Any]], question: str, chosen: str, rejected: str) -> dict[str, Any]:
    """A row of the normal form: a question about one image, and two answers."""
    answers = {"chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    return {"images": images, "prompt": [user(question)], **answers}


def text_of(messages: list[Message]) -> str:
    """The words of a conversation, without its images."""
    return "\n".join(p["text"] for m in messages for p in m["content"] if p["type"] == "text" and p["text"])

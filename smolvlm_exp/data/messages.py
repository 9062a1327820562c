"""Chat messages, and the columns in which public preference data spells them. Pure functions, no files.

| format | columns |
|---|---|
| plain | image or images, question or prompt, chosen, rejected: strings |
| rlaif-v, TRL | images, prompt, chosen, rejected: lists of messages |
| LLaMA-Factory (sharegpt, ranking) | images, conversations (+ system), chosen, rejected: {from, value} |
| ms-swift | images, messages (the chosen answer last), rejected_response |

In place of chosen and rejected, the first three may have what is known of the image: answer, objects, caption or truth
(truth.py).
"""

import re
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.truth import TRUTH_COLUMNS
from smolvlm_exp.utils.errors import RequestError

if TYPE_CHECKING:
    from datasets import Features

VERSION = 2  # raise when rows come out differently: it is part of the key under which `datasets` caches them

PLACEHOLDER = "<image>"  # where an image stands in a text, in LLaMA-Factory, ms-swift and MMPR

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}

# A list of columns per format; where a column has several names, any will do.
PAIR_FORMATS = (
    (("image", "images"), ("question", "prompt"), ("chosen",), ("rejected",)),
    (("image", "images"), ("conversations",), ("chosen",), ("rejected",)),
    (("image", "images"), ("messages",), ("rejected_response",)),
)
FORMATS = (*PAIR_FORMATS, (("image", "images"), ("question", "prompt", "conversations"), TRUTH_COLUMNS))

Message = dict[str, Any]  # {"role", "content": a list of parts}
Formats = tuple[tuple[tuple[str, ...], ...], ...]


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


def require_known_format(columns: set[str], where: str) -> None:
    """Refuse columns that fit none of the formats."""
    if not fits(columns, FORMATS):
        expected = "; or ".join(", ".join(" or ".join(names) for names in known) for known in FORMATS)
        raise RequestError(f"{where} has the columns {', '.join(sorted(columns)) or 'none'}. Expected: {expected}.")


def fits(columns: set[str], formats: Formats) -> bool:
    """Whether the columns are those of one of the formats, or more."""
    return any(all(columns & set(names) for names in known) for known in formats)


def row_images(row: dict[str, Any]) -> list[Any]:
    """A row's images (paths, bytes or {"bytes", "path"}), however many it has."""
    images = row.get("images") or row.get("image") or []
    return images if isinstance(images, list) else [images]


def conversation(row: dict[str, Any], images: int) -> dict[str, list[Message]]:
    """`prompt`, `chosen` and `rejected` as messages; a missing value becomes an empty list.

    Where no text says where the row's `images` images stand, they come first in the user's first turn.

    Raises:
        ValueError: a message is malformed.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if row.get("conversations"):
        prompt = as_messages(row.get("system"), "system") + as_messages(row["conversations"], "user")
    elif row.get("messages"):
        *prompt, chosen = as_messages(row["messages"], "user")
        rejected = row.get("rejected_response")
        if chosen["role"] != "assistant":
            raise ValueError("`messages` should end with the chosen answer, a message of the assistant")
    else:
        prompt = as_messages(row.get("prompt") or row.get("question"), "user")
    first = next((message for message in prompt if message["role"] == "user"), None)
    if first and not any(part["type"] == "image" for message in prompt for part in message["content"]):
        first["content"] = [{"type": "image", "text": None} for _ in range(images)] + first["content"]
    answers = {"chosen": as_messages(chosen, "assistant"), "rejected": as_messages(rejected, "assistant")}
    return {"prompt": prompt, **answers}


def as_messages(value: Any, role: str) -> list[Message]:
    """A string (said by `role`), a message or a list of messages -> messages whose content is a list of parts."""
    if not value:
        return []
    if isinstance(value, str):
        value = {"role": role, "content": value}
    turns = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict):
            raise ValueError(f"a message should have a role and a content, and this one is {str(item)[:60]!r}")
        speaker = item.get("role") or item.get("from")
        if speaker not in ROLES:
            raise ValueError(f"a message's role is {speaker!r}; known are {', '.join(ROLES)}")
        turns.append({"role": ROLES[speaker], "content": as_parts(item.get("content") or item.get("value") or "")})
    return turns


def as_parts(content: Any) -> list[dict[str, str | None]]:
    """A message's content as parts: text around `<image>` placeholders, or parts already (Arrow adds `text: None`)."""
    if isinstance(content, str):
        pieces = [piece.strip() for piece in re.split(f"({PLACEHOLDER})", content)]
        content = [{"type": "image" if piece == PLACEHOLDER else "text", "text": piece} for piece in pieces if piece]
    if not isinstance(content, list):
        raise ValueError(f"a message's content should be a text or a list of parts, not {str(content)[:60]!r}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind not in ("text", "image"):
            raise ValueError(f"a message has a part of type {kind!r}; known are text, image")
    return [
        {"type": part["type"], "text": str(part.get("text") or "") if part["type"] == "text" else None}
        for part in content
    ]

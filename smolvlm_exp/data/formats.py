"""The ways in which public preference data spells a row -> messages in the normal form. Pure functions, no files.

| who | columns |
|---|---|
| plain | image or images, question or prompt, chosen, rejected: strings |
| rlaif-v, TRL | images, prompt, chosen, rejected: lists of messages |
| LLaMA-Factory (sharegpt, ranking) | images, conversations (+ system), chosen, rejected: {from, value} |
| ms-swift | images, messages (the chosen answer last), rejected_response |
"""

from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.messages import Message
from smolvlm_exp.utils.errors import RequestError

if TYPE_CHECKING:
    from datasets import Features

VERSION = 2  # raise when rows come out differently: it is part of the key under which `datasets` keeps them

PLACEHOLDER = "<image>"  # where an image stands in a text, in LLaMA-Factory, ms-swift and MMPR

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}

# Each spelling is a list of columns; where a column has two names, either will do.
FORMATS = (
    (("image", "images"), ("question", "prompt"), ("chosen",), ("rejected",)),
    (("image", "images"), ("conversations",), ("chosen",), ("rejected",)),
    (("image", "images"), ("messages",), ("rejected_response",)),
)


def features() -> "Features":
    """The Arrow types of a row in the normal form, plus the `problem` that its source found (empty when none).

    Images are {"bytes", "path"}, not yet decoded: `preferences.prepare` looks at them first.
    """
    from datasets import Features, Image, List, Value

    messages = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    columns = {"prompt": messages, "chosen": messages, "rejected": messages}
    return Features({"images": List(Image(decode=False)), **columns, "problem": Value("string")})


def bad_row(problem: str) -> dict[str, Any]:
    """A row of which nothing can be read, and why."""
    return {"images": [], "prompt": [], "chosen": [], "rejected": [], "problem": problem}


def require_known_format(columns: set[str], where: str) -> None:
    """Refuse columns that hold none of the spellings."""
    if not any(all(columns & set(names) for names in spelling) for spelling in FORMATS):
        expected = "; or ".join(", ".join(" or ".join(names) for names in spelling) for spelling in FORMATS)
        raise RequestError(f"{where} has the columns {', '.join(sorted(columns)) or 'none'}. Expected: {expected}.")


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
        prompt = messages(row.get("system"), "system") + messages(row["conversations"], "user")
    elif row.get("messages"):
        *prompt, chosen = messages(row["messages"], "user")
        rejected = row.get("rejected_response")
        if chosen["role"] != "assistant":
            raise ValueError("`messages` should end with the chosen answer, a message of the assistant")
    else:
        prompt = messages(row.get("prompt") or row.get("question"), "user")
    first = next((message for message in prompt if message["role"] == "user"), None)
    if first and not any(part["type"] == "image" for message in prompt for part in message["content"]):
        first["content"] = [{"type": "image", "text": None} for _ in range(images)] + first["content"]
    return {"prompt": prompt, "chosen": messages(chosen, "assistant"), "rejected": messages(rejected, "assistant")}


def messages(value: Any, role: str) -> list[Message]:
    """A string (said by `role`), a message or a list of messages -> messages whose content is a list of parts."""
    if not value:
        return []
    if isinstance(value, str):
        return [{"role": role, "content": parts(value)}]
    turns = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict):
            raise ValueError(f"a message should have a role and a content, and this one is {str(item)[:60]!r}")
        speaker = item.get("role") or item.get("from")
        if speaker not in ROLES:
            raise ValueError(f"a message's role is {speaker!r}; known are {', '.join(ROLES)}")
        turns.append({"role": ROLES[speaker], "content": parts(item.get("content") or item.get("value") or "")})
    return turns


def parts(content: Any) -> list[dict[str, str | None]]:
    """A message's content as parts: text around `<image>` placeholders, or parts already (Arrow adds `text: None`)."""
    if isinstance(content, str):
        split: list[dict[str, str | None]] = []
        for number, piece in enumerate(content.split(PLACEHOLDER)):
            if number:
                split.append({"type": "image", "text": None})
            if piece.strip():
                split.append({"type": "text", "text": piece.strip()})
        return split
    if not isinstance(content, list):
        raise ValueError(f"a message's content should be a text or a list of parts, not {str(content)[:60]!r}")
    kinds = [part.get("type") if isinstance(part, dict) else part for part in content]
    unknown = next((kind for kind in kinds if kind not in ("text", "image")), None)
    if unknown is not None:
        raise ValueError(f"a message has a part of type {unknown!r}; known are text, image")
    return [
        {"type": part["type"], "text": str(part.get("text") or "") if part["type"] == "text" else None}
        for part in content
    ]

"""The columns in which public data spells a question about an image and its answers -> the normal form.

| format | columns |
|---|---|
| plain | image or images, question or prompt, chosen, rejected: strings |
| rlaif-v, TRL | images, prompt, chosen, rejected: lists of messages |
| LLaMA-Factory (sharegpt, ranking) | images, conversations (+ system), chosen, rejected: {from, value} |
| ms-swift | images, messages (the chosen answer last), rejected_response |
| RLHF-V | image, text: JSON with question, chosen and rejected |

In place of chosen and rejected, the first three may have what is known of the image: answer, objects, caption or truth
(truth.py). Without a rejected answer, the chosen one is `chosen`, `answer` or `caption`, or the assistant's last turn.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.images import Entry
from smolvlm_exp.data.messages import Message, bad_row, features
from smolvlm_exp.data.truth import TRUTH_COLUMNS, truth_of
from smolvlm_exp.utils.errors import RequestError

if TYPE_CHECKING:
    from datasets import Features

Formats = tuple[tuple[tuple[str, ...], ...], ...]

KEY = "image_key"  # the column by which rows are held out
PLACEHOLDER = "<image>"  # where an image stands in a text, in LLaMA-Factory, ms-swift and MMPR

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}

# A list of columns per format; where a column has several names, any will do.
PAIR_FORMATS = (
    (("image", "images"), ("question", "prompt"), ("chosen",), ("rejected",)),
    (("image", "images"), ("conversations",), ("chosen",), ("rejected",)),
    (("image", "images"), ("messages",), ("rejected_response", "rejected")),
    (("image", "images"), ("text",)),
)
# Of one answer to a question, which trainer=sft learns from; the last two end with it, as LLaVA's conversations do.
ANSWERS = ("answer", "caption")
ANSWER_FORMATS = (
    (("image", "images"), ("question", "prompt"), ("chosen", *ANSWERS)),
    (("image", "images"), ("conversations", "messages")),
)
TRUTH_FORMAT = (("image", "images"), ("question", "prompt", "conversations"), TRUTH_COLUMNS)
FORMATS = (*PAIR_FORMATS, *ANSWER_FORMATS, TRUTH_FORMAT)


def require_known_format(columns: set[str], where: str, advice: str = "") -> None:
    """Refuse columns that fit none of the formats."""
    if not fits(columns, FORMATS):
        expected = "; or ".join(", ".join(" or ".join(names) for names in known) for known in FORMATS)
        raise RequestError(
            f"{where} has the columns {', '.join(sorted(columns)) or 'none'}. Expected: {expected}.{advice}"
        )


def fits(columns: set[str], formats: Formats) -> bool:
    """Whether the columns are those of one of the formats, or more."""
    return any(all(columns & set(names) for names in known) for known in formats)


def normal_features(given: set[str], *more: str) -> "Features":
    """The Arrow types of `normal_row` of rows with the `given` columns: of answers, those that there are.

    Args:
        more: further columns of text.
    """
    from datasets import Features, Value

    absent = {"rejected"} if fits(given, ANSWER_FORMATS) else {"chosen", "rejected"}
    absent = set() if fits(given, PAIR_FORMATS) else absent
    normal = {name: kind for name, kind in features().items() if name not in absent}
    texts = [*more, *([] if given.isdisjoint(TRUTH_COLUMNS) else ["truth"])]
    return Features({**normal, **dict.fromkeys(texts, Value("string"))})


def normal_row(row: dict[str, Any], read_images: Callable[[list[Any]], list[Entry]]) -> dict[str, Any]:
    """One row in the normal form; `problem` says what is wrong with it.

    Args:
        read_images: of the row's images in any form; raises ImageError.
    """
    try:
        row = {key: None if value != value else value for key, value in row.items()}  # NaN: pandas' missing value
        entries = row_images(row)
        normal = {"images": read_images(entries), **conversation(row, len(entries)), "truth": truth_of(row)}
        json.dumps(normal, ensure_ascii=False, default=repr).encode()
        return {**normal, "problem": ""}
    except UnicodeEncodeError:
        return bad_row("its text contains half a character (a lone surrogate), which UTF-8 cannot encode")
    except ValueError as error:  # ImageError is one
        return bad_row(str(error).encode(errors="replace").decode())
    except (TypeError, AttributeError, KeyError) as error:  # rows come from other people, in any form
        return bad_row(f"it has an unknown form ({type(error).__name__}: {error})")


def with_key(normal: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The row and a hash of its first image, by which rows with the same image are held out together.

    Args:
        row: as it was given; it decides where there is no image, as in a bad row.
    """
    first: Entry = normal["images"][0] if normal["images"] else {"bytes": repr(row).encode(errors="replace")}
    return {**normal, KEY: hashlib.sha256(first["bytes"] or Path(first["path"]).read_bytes()).hexdigest()}


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
    if row.get("text") and not any(row.get(name) for name in ("question", "prompt", "conversations", "messages")):
        row = json_text(row["text"])
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if row.get("conversations"):
        prompt = as_messages(row.get("system"), "system") + as_messages(row["conversations"], "user")
    elif row.get("messages"):
        prompt, rejected = as_messages(row["messages"], "user"), row.get("rejected_response") or rejected
        if prompt[-1]["role"] == "assistant":
            chosen = prompt.pop()
        elif not chosen:
            raise ValueError("`messages` should end with the chosen answer, a message of the assistant")
    else:
        prompt = as_messages(row.get("prompt") or row.get("question"), "user")
    if not chosen and not {"rejected", "rejected_response"} & row.keys():
        chosen = prompt.pop() if prompt and prompt[-1]["role"] == "assistant" else answer_text(row)
    first = next((message for message in prompt if message["role"] == "user"), None)
    if first and not any(part["type"] == "image" for message in prompt for part in message["content"]):
        first["content"] = [{"type": "image", "text": None} for _ in range(images)] + first["content"]
    answers = {"chosen": as_messages(chosen, "assistant"), "rejected": as_messages(rejected, "assistant")}
    return {"prompt": prompt, **answers}


def answer_text(row: dict[str, Any]) -> str:
    """The answer of a row without `chosen`, as a model should say it: of several right ones the first."""
    given = next((row[name] for name in ANSWERS if row.get(name) not in (None, "", [])), "")
    given = given[0] if isinstance(given, list) else given
    given = given.get("answer", "") if isinstance(given, dict) else given  # as in VQA's `answers`
    return ("no", "yes")[given] if isinstance(given, bool) else str(given)


def json_text(text: Any) -> dict[str, str]:
    """The `text` of RLHF-V."""
    try:
        parts = json.loads(text)
        return {name: str(parts[name]) for name in ("question", "chosen", "rejected")}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("`text` is not a JSON object with question, chosen and rejected") from None


def as_messages(value: Any, role: str) -> list[Message]:
    """A text or number (said by `role`), a message or a list of them -> messages whose content is a list of parts."""
    if isinstance(value, bool):
        raise ValueError(f"an answer or question is {str(value).lower()}; write it as the text that should be read")
    if isinstance(value, int | float):
        value = str(value)
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
        content = as_parts(item.get("content") or item.get("value") or "", ROLES[speaker] == "assistant")
        turns.append({"role": ROLES[speaker], "content": content})
    return turns


def as_parts(content: Any, indented: bool = False) -> list[dict[str, str | None]]:
    """A message's content as parts: text around `<image>` placeholders, or parts already (Arrow adds `text: None`).

    Args:
        indented: spaces at the beginning belong to the text, as they do in an answer that is code.
    """
    if isinstance(content, str) and indented and PLACEHOLDER not in content:
        content = [{"type": "text", "text": content.strip("\r\n").rstrip()}] if content.strip() else []
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

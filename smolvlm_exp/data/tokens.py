"""Prompts as tokens: an image as its tiles, and control tokens that a person types as plain text.

Tokenizers find control tokens wherever a text spells them, and processors count `<image>` in the text. So a word
joiner, which has no width, goes after the first character of each one in a question: it reads the same, and no
tokenizer finds it.
"""

import re
from collections.abc import Sequence
from typing import Any

from smolvlm_exp.data.messages import Message

FAKE, IMAGE, GLOBAL = "<fake_token_around_image>", "<image>", "<global-img>"

WORD_JOINER = "\u2060"


def image_span(rows: int, columns: int, image_seq_len: int) -> str:
    """The text that stands for an image in a prompt: its tiles row by row, then the whole image as one more tile.

    Args:
        rows, columns: of its tiles; 0 for an image that is not split, whose only tile is the whole image.
        image_seq_len: tokens per tile.
    """
    tile, span = IMAGE * image_seq_len, ""
    for row in range(1, rows + 1):
        span += "".join(f"{FAKE}<row_{row}_col_{column}>{tile}" for column in range(1, columns + 1)) + "\n"
    return span + ("\n" if rows else "") + f"{FAKE}{GLOBAL}{tile}{FAKE}"


def tokenize_row(
    processor: Any,
    messages: dict[str, list[Message]],
    tiles: list[tuple[int, int]],
    spans: dict[tuple[int, int], list[int]],
) -> dict[str, list[int]]:
    """A row's token ids, equal to those that TRL's collators make with the same processor.

    The texts around images are tokenised apart from them. That changes no id: an image begins and ends with a control
    token, and tokenizers split there before anything else.

    Args:
        messages: `prompt`, and `chosen` and `rejected` where the row has answers.
        tiles: (rows, columns) of the tiles of each image in the prompt.
        spans: the ids of images by their tiles, which other rows share; missing ones are added.
    """
    from trl.data_utils import apply_chat_template

    texts = apply_chat_template(messages, processor)
    prompt, *answers = (texts[side] for side in messages)
    pieces = prompt.split(processor.image_token)
    missing = [shape for shape in dict.fromkeys(tiles) if shape not in spans]
    texts_of_spans = [image_span(*shape, processor.image_seq_len) for shape in missing]
    encoded = processor.tokenizer(
        [*pieces, *answers, *texts_of_spans], add_special_tokens=False, return_attention_mask=False
    )["input_ids"]
    end = len(pieces) + len(answers)
    spans.update(zip(missing, encoded[end:], strict=True))
    joined = encoded[0]
    for shape, ids in zip(tiles, encoded[1 : len(pieces)], strict=True):
        joined = joined + spans[shape] + ids
    return dict(zip(messages, [joined, *encoded[len(pieces) : end]], strict=True))


def render_prompt(processor: Any, messages: Sequence[Message]) -> str:
    """Messages as the text that an answer follows, in which every control token is the chat template's."""
    escaped = escape_control_tokens(messages, control_tokens(processor))
    return processor.apply_chat_template(escaped, add_generation_prompt=True)


def control_tokens(processor: Any) -> list[str]:
    """All that the processor's tokenizer reads as one control token, except what a word joiner cannot break up."""
    added = sorted(str(token) for token in processor.tokenizer.added_tokens_decoder.values())
    return [token for token in added if token not in split_token(token)]


def escape_control_tokens(messages: Sequence[Message], controls: Sequence[str]) -> list[Message]:
    """The messages with every control token in their text parts escaped; the `{"type": "image"}` parts stay."""
    return [
        {**m, "content": [{**p, "text": escape_text(p.get("text"), controls)} for p in m["content"]]} for m in messages
    ]


def escape_text(text: str | None, controls: Sequence[str]) -> str | None:
    """A text in which no tokenizer finds a control token."""
    if not text or not controls:
        return text
    pattern = re.compile("|".join(map(re.escape, sorted(controls, key=len, reverse=True))))
    while pattern.search(text):  # breaking up one must not make another
        text = pattern.sub(lambda match: split_token(match[0]), text)
    return text


def split_token(control: str) -> str:
    return control[:1] + WORD_JOINER + control[1:]

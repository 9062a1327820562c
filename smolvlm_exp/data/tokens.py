"""Prompts as tokens: an image as its tiles, and control tokens that a person types as plain text.

Tokenizers find control tokens wherever a text spells them, and processors count `<image>` in the text. So a word
joiner, which has no width, goes after the first character of each one in a question: it reads the same, and no
tokenizer finds it.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, islice
from typing import Any

import xxhash

from smolvlm_exp.data.messages import Message, assistant, text_of, user

FAKE, IMAGE, GLOBAL = "<fake_token_around_image>", "<image>", "<global-img>"

WORD_JOINER = "\u2060"
EARLIER = [user("an earlier question", 0), assistant("an earlier answer")]


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


def tokenize_rows(
    processor: Any,
    rows: Sequence[dict[str, list[Message]]],
    tiles: Sequence[list[tuple[int, int]]],
    spans: dict[tuple[int, int], list[int]],
) -> list[dict[str, list[int]]]:
    """Rows' token ids, equal to those that TRL's collators make with the same processor.

    The texts around images are tokenised apart from them. That changes no id: an image begins and ends with a control
    token, and tokenizers split there before anything else.

    Args:
        rows: `prompt`, and `chosen` and `rejected`, or `chosen` alone, where a row has answers.
        tiles: for each row (rows, columns) of the tiles of each image in the prompt.
        spans: the ids of images by their tiles, which other rows share; missing ones are added.
    """
    from trl.data_utils import apply_chat_template

    missing = list(dict.fromkeys(shape for shapes in tiles for shape in shapes if shape not in spans))
    pieces, answers = [], []  # of each row: the texts around its prompt's images, and its answers
    for messages in rows:
        alone = {"chosen": "completion"} if "rejected" not in messages else {}  # TRL's name of a single answer
        named = {alone.get(side, side): turns for side, turns in messages.items()}
        texts = apply_chat_template(named, processor)
        prompt, *others = (texts[side] for side in named)
        pieces.append(prompt.split(processor.image_token))
        answers.append(others)
    flat = [image_span(*shape, processor.image_seq_len) for shape in missing]
    flat += chain.from_iterable(around + others for around, others in zip(pieces, answers, strict=True))
    if not flat:
        return []
    encoded = iter(processor.tokenizer(flat, add_special_tokens=False, return_attention_mask=False)["input_ids"])
    spans.update((shape, next(encoded)) for shape in missing)
    ids = []
    for messages, shapes, around, others in zip(rows, tiles, pieces, answers, strict=True):
        first, *rest = islice(encoded, len(around))
        prompt_ids = list(chain(first, *(spans[shape] + after for shape, after in zip(shapes, rest, strict=True))))
        ids.append(dict(zip(messages, [prompt_ids, *islice(encoded, len(others))], strict=True)))
    return ids


def processor_digests(processor: Any) -> dict[str, str]:
    """A hash each of what decides a row's token ids: the tokenizer, the chat template, and how images become tiles."""
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    tokenizer |= {"padding": None, "truncation": None}  # as the last call has left them
    images = [type(processor.image_processor).__name__, processor.image_processor.to_json_string()]
    parts = {
        "tokenizer": tokenizer,
        "chat_template": [processor.chat_template, processor.tokenizer.chat_template],
        "image_processor": [*images, type(processor).__name__, processor.image_seq_len, processor.image_token],
    }
    return {name: xxhash.xxh3_128_hexdigest(json.dumps(part).encode()) for name, part in parts.items()}


def render_prompt(processor: Any, messages: Sequence[Message]) -> str:
    """Messages as the text that an answer follows, in which every control token is the chat template's."""
    escaped = escape_control_tokens(messages, control_tokens(processor))
    return processor.apply_chat_template(escaped, add_generation_prompt=True)


def render_next_turn(processor: Any, messages: Sequence[Message]) -> str:
    """`render_prompt` of messages that follow an answer, from behind the token that ended it."""
    text, end = render_prompt(processor, [*EARLIER, *messages]), processor.tokenizer.decode(answer_end(processor))
    return text.partition(text_of(EARLIER[1:]))[2].removeprefix(end)


def answer_end(processor: Any) -> int:
    """The id of the token that ends an answer: <end_of_utterance> in SmolVLM's chat template.

    Raises:
        ValueError: the chat template ends it with none, so that a model could not learn where to stop.
    """
    after = processor.apply_chat_template(EARLIER).partition(text_of(EARLIER[1:]))[2]
    ids = processor.tokenizer(after, add_special_tokens=False)["input_ids"]
    if not ids or ids[0] not in processor.tokenizer.added_tokens_decoder:
        raise ValueError("the chat template ends an answer with no control token")
    return ids[0]


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
    pattern = control_pattern(tuple(controls))
    while pattern.search(text):  # breaking up one must not make another
        text = pattern.sub(lambda match: split_token(match[0]), text)
    return text


@lru_cache(maxsize=8)
def control_pattern(controls: tuple[str, ...]) -> re.Pattern[str]:
    """Matches any control token, the longest where several begin at one place; nothing where there is none."""
    return re.compile("|".join(map(re.escape, sorted(controls, key=len, reverse=True))) or r"(?!)")


def split_token(control: str) -> str:
    return control[:1] + WORD_JOINER + control[1:]

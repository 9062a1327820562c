"""Control tokens that a person types are text: `<image>` or `<end_of_utterance>` in a question steers nothing.

Tokenizers find control tokens wherever a text spells them, and processors count `<image>` in the text. So a word
joiner, which has no width, goes behind the first character of each: people read the same, and no tokenizer finds it.
"""

import re
from collections.abc import Sequence
from typing import Any

WORD_JOINER = "\u2060"


def control_tokens(processor: Any) -> list[str]:
    """All that the processor's tokenizer reads as one control token, but for what a word joiner cannot take apart."""
    added = sorted(str(token) for token in processor.tokenizer.added_tokens_decoder.values())
    return [token for token in added if token not in split_token(token)]


def escape_control_tokens(messages: Sequence[dict[str, Any]], controls: Sequence[str]) -> list[dict[str, Any]]:
    """The messages with every control token in their text parts made text; the `{"type": "image"}` parts stay."""
    return [
        {**m, "content": [{**p, "text": escape_text(p.get("text"), controls)} for p in m["content"]]} for m in messages
    ]


def render_prompt(processor: Any, messages: Sequence[dict[str, Any]]) -> str:
    """Messages as the text that an answer follows, in which every control token is the chat template's."""
    escaped = escape_control_tokens(messages, control_tokens(processor))
    return processor.apply_chat_template(escaped, add_generation_prompt=True)


def escape_text(text: str | None, controls: Sequence[str]) -> str | None:
    """One text, its control tokens made text."""
    if not text or not controls:
        return text
    pattern = re.compile("|".join(map(re.escape, sorted(controls, key=len, reverse=True))))
    while pattern.search(text):  # taking one apart must not make another
        text = pattern.sub(lambda match: split_token(match[0]), text)
    return text


def split_token(control: str) -> str:
    return control[:1] + WORD_JOINER + control[1:]

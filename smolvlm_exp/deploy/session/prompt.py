"""Messages -> token ids with their pictures, piece by piece, so that a picture is prepared once and never again.

The pieces between control tokens are tokenised apart, which gives the ids that the processor gives for the whole text.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from smolvlm_exp.data.control_tokens import control_tokens, escape_control_tokens
from smolvlm_exp.data.images import ImageLimits, open_image, shrink, to_rgb
from smolvlm_exp.utils.errors import RequestError


@dataclass(frozen=True)
class Picture:
    key: str  # a digest of what the processor is given
    ids: list[int]  # of its tags and image tokens
    pixel_values: torch.Tensor  # (1, tiles, 3, S, S) float32
    pixel_attention_mask: torch.Tensor  # (1, tiles, S, S)


@dataclass
class Prompt:
    """What a model has been told, and what it said. It grows at its end alone."""

    ids: list[int] = field(default_factory=list)
    keys: list[int | str] = field(default_factory=list)  # ids, an image token's being its picture's key
    pictures: list[tuple[int, Picture]] = field(default_factory=list)  # with the place of their first token

    def add(self, ids: list[int]) -> None:
        self.ids += ids
        self.keys += ids

    def add_picture(self, picture: Picture, image_token: int) -> None:
        self.pictures.append((len(self.ids), picture))
        self.ids += picture.ids
        self.keys += [picture.key if each == image_token else each for each in picture.ids]

    def copy(self) -> "Prompt":
        return Prompt([*self.ids], [*self.keys], [*self.pictures])

    def shared(self, keys: list[int | str]) -> int:
        """How many tokens at the start `keys` has in common with this, less those of a picture that they end within."""
        pairs = zip(self.keys, keys, strict=False)
        count = next((i for i, (own, other) in enumerate(pairs) if own != other), min(len(self.keys), len(keys)))
        return self.outside(count)

    def outside(self, count: int) -> int:
        """`count`, or the start of the picture that it lies within."""
        return next((at for at, picture in self.pictures if at < count < at + len(picture.ids)), count)


class PromptBuilder:
    """Writes prompts as the model's chat template has them. Control tokens that somebody typed are text."""

    def __init__(self, processor: Any, max_edge: int, limits: ImageLimits) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.max_edge, self.limits = max_edge, limits
        self.controls = control_tokens(processor)
        self.end: int = self.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
        self.image_token: int = processor.image_token_id

    def prompt(self, messages: list[dict[str, Any]], pictures: list[Picture]) -> Prompt:
        """
        Args:
            messages: their content is a list of parts; an `image` part takes the next of `pictures`.

        Raises:
            RequestError: there are not as many pictures as parts for them.
        """
        return self.write(Prompt(), self.template(messages), pictures)

    def turn(self, prompt: Prompt, question: str, pictures: list[Picture]) -> Prompt:
        """`prompt`, or a copy of it, with the user's next turn and the start of the answer."""
        content: list[dict[str, Any]] = [{"type": "image"} for _ in pictures]
        content.append({"type": "text", "text": question})
        text = self.template([{"role": "user", "content": content}])
        if not prompt.ids:
            return self.write(prompt, text, pictures)
        if prompt.ids[-1] != self.end:  # an answer that was stopped
            prompt.add([self.end])
        return self.write(prompt, "\n" + text.removeprefix(self.tokenizer.bos_token), pictures)

    def template(self, messages: list[dict[str, Any]]) -> str:
        """The messages as one text, in which every control token is the template's; see data/control_tokens.py.

        Raises:
            RequestError: it is no text that a tokenizer can read.
        """
        text = self.processor.apply_chat_template(
            escape_control_tokens(messages, self.controls), add_generation_prompt=True
        )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError("the text holds half a character (a lone surrogate), which no UTF-8 text can.") from None
        return text

    def write(self, prompt: Prompt, text: str, pictures: list[Picture]) -> Prompt:
        pieces = text.split(self.processor.image_token)
        if len(pieces) - 1 != len(pictures):
            raise RequestError(f"the messages have {len(pieces) - 1} places for pictures, and {len(pictures)} came.")
        for number, piece in enumerate(pieces):
            if piece:
                prompt.add(self.tokenizer(piece, add_special_tokens=False)["input_ids"])
            if number < len(pictures):
                prompt.add_picture(pictures[number], self.image_token)
        return prompt

    def picture(self, image: Image) -> Picture:
        """A picture as the processor makes it."""
        image = shrink(to_rgb(image), self.max_edge)
        key = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        made = self.processor.image_processor(images=[[image]], return_row_col_info=True, return_tensors="pt")
        span = self.processor.replace_image_token({"rows": made["rows"], "cols": made["cols"]}, 0)
        ids = self.tokenizer(span, add_special_tokens=False)["input_ids"]
        return Picture(key, ids, made["pixel_values"], made["pixel_attention_mask"])

    def open(self, given: bytes | Path) -> Image:
        """A picture's file, from whoever it comes.

        Raises:
            PictureError: what is wrong with it.
        """
        here = isinstance(given, Path)
        entry = {"bytes": None if here else given, "path": str(given) if here else None}
        return open_image(entry, self.max_edge, self.limits)

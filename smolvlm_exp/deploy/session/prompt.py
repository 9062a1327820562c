"""Messages -> token ids with their images. Each image is preprocessed once.

The pieces between image tokens are tokenised one by one, which gives the same ids as the processor on the full text.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from smolvlm_exp.data.images import ImageLimits, open_image, shrink, to_rgb
from smolvlm_exp.data.tokens import image_span, render_next_turn, render_prompt
from smolvlm_exp.engine.inputs.tiles import pixels, tile
from smolvlm_exp.utils.errors import RequestError


@dataclass(frozen=True)
class EncodedImage:
    key: int  # a digest of the pixels that the processor was given, beyond every token's id
    ids: list[int]  # of its tags and image tokens
    tiles: torch.Tensor  # (n, 3, S, S) uint8: a quarter of their floats, which the model's device makes


@dataclass
class Prompt:
    """Everything a model has read and answered so far. It only grows at its end."""

    ids: list[int] = field(default_factory=list)
    images: list[tuple[int, EncodedImage]] = field(default_factory=list)  # with the position of their first token

    def copy(self) -> "Prompt":
        return Prompt([*self.ids], [*self.images])

    @property
    def keys(self) -> list[int]:
        """The ids, with an image's key for each of its tokens, so that different images share none."""
        keys = [*self.ids]
        for start, image in self.images:
            keys[start : start + len(image.ids)] = [image.key] * len(image.ids)
        return keys


class PromptBuilder:
    """Builds prompts with the model's chat template. Control tokens that a message spells are text."""

    def __init__(self, processor: Any, max_edge: int, limits: ImageLimits) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.max_edge, self.limits, self.normalise = max_edge, limits, pixels(processor)
        self.end: int = self.tokenizer.eos_token_id
        self.image_token: int = processor.image_token_id

    def build(self, messages: list[dict[str, Any]], images: Sequence[Image], previous: Prompt | None = None) -> Prompt:
        """
        Args:
            messages: their content is a list of parts; an `image` part takes the next of `images`.
            previous: the conversation that the messages continue; it is not changed.
        """
        prompt = previous.copy() if previous else Prompt()
        text = (render_next_turn if prompt.ids else render_prompt)(self.processor, messages)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError("the text contains a lone surrogate, which UTF-8 cannot encode.") from None
        if prompt.ids and prompt.ids[-1] != self.end:  # an answer that was stopped
            prompt.ids.append(self.end)
        pieces = text.split(self.processor.image_token)
        if len(pieces) - 1 != len(images):
            raise RequestError(f"the messages refer to {len(pieces) - 1} images, but {len(images)} were given.")
        for piece, image in zip_longest(pieces, map(self.encode_image, images)):
            if piece:
                prompt.ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
            if image:
                prompt.images.append((len(prompt.ids), image))
                prompt.ids += image.ids
        return prompt

    def encode_image(self, image: Image) -> EncodedImage:
        image = shrink(to_rgb(image), self.max_edge)
        key = int(hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest(), 16)
        _, rows, columns = self.processor.image_processor.get_number_of_image_patches(image.height, image.width)
        span = image_span(rows, columns, self.processor.image_seq_len)
        ids = self.tokenizer(span, add_special_tokens=False)["input_ids"]
        return EncodedImage(key, ids, tile(image, self.processor.image_processor))

    def open_image(self, source: bytes | Path) -> Image:
        """An image from anybody's file. ImageError says what is wrong with it."""
        entry = {"bytes": None, "path": str(source)} if isinstance(source, Path) else {"bytes": source, "path": None}
        return open_image(entry, self.max_edge, self.limits)

"""A chat completion's request, as OpenAI's clients send it, and what a session makes of it.

https://platform.openai.com/docs/api-reference/chat/create. Pictures come as data URLs; nothing is ever fetched.
"""

import base64
import binascii
import re
from typing import Any, Literal

from PIL.Image import Image
from pydantic import BaseModel, Field

from smolvlm_exp.data.images import ImageError
from smolvlm_exp.deploy.server.options import ServeConfig
from smolvlm_exp.deploy.session.prompt import Prompt
from smolvlm_exp.deploy.session.session import Sampling, SmolVLMSession
from smolvlm_exp.utils.errors import RequestError

MEGABYTE = 1_000_000


class Url(BaseModel):
    url: str


class Part(BaseModel):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: Url | None = None


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part] = Field(min_length=1)


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """What we act on; other fields that clients send are passed over, as their defaults mean what we do."""

    model: str = ""
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = 0
    stop: str | list[str] | None = None
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None

    def sampling(self, limits: ServeConfig) -> Sampling:
        """
        Raises:
            RequestError: more tokens are asked for than this server gives.
        """
        asked = self.max_completion_tokens or self.max_tokens or limits.max_tokens
        if asked > limits.max_tokens:
            raise RequestError(f"max_tokens={asked} is more than this server gives: {limits.max_tokens}.")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(asked, self.temperature, self.top_p, self.seed, tuple(filter(None, stop)))

    def prompt(self, session: SmolVLMSession, limits: ServeConfig) -> Prompt:
        """
        Raises:
            RequestError: a picture, or a text, that cannot be taken.
        """
        messages: list[dict[str, Any]] = []
        images: list[Image] = []
        for message in self.messages:
            content: list[dict[str, Any]] = []
            parts = [Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content
            for part in parts:
                if part.type == "text":
                    content.append({"type": "text", "text": part.text or ""})
                    continue
                if len(images) == limits.max_images:
                    raise RequestError(f"more pictures than this server takes in one request: {limits.max_images}.")
                images.append(picture(part.image_url, session, limits))
                content.append({"type": "image"})
            messages.append({"role": message.role, "content": content})
        return session.prompt(messages, images)


def picture(given: Url | None, session: SmolVLMSession, limits: ServeConfig) -> Image:
    found = re.fullmatch(r"data:image/[\w.+-]+;base64,(.*)", given.url if given else "", re.DOTALL)
    if not found:
        raise RequestError("image_url.url must be a data URL (data:image/png;base64,...): this server fetches nothing.")
    if len(found[1]) * 3 / 4 > limits.max_image_megabytes * MEGABYTE:
        raise RequestError(f"a picture's file has more than {limits.max_image_megabytes:g} MB.")
    try:
        return session.writer.open(base64.b64decode(found[1], validate=True))
    except binascii.Error as error:
        raise RequestError(f"a picture's data is no base64: {error}.") from error
    except ImageError as error:
        raise RequestError(f"a picture {error}.") from error

"""What a client sends to /v1/chat/completions, checked, and as a session takes it."""

from typing import Any, Literal

from PIL.Image import Image
from pydantic import BaseModel, Field

from smolvlm_exp.data.images import SHOWN, ImageError, embedded_bytes
from smolvlm_exp.deploy.options import ServeConfig
from smolvlm_exp.deploy.session.prompt import Prompt
from smolvlm_exp.deploy.session.session import SmolVLMSession
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.utils.errors import RequestError

MEGABYTE = 1_000_000


class ImageUrl(BaseModel):
    url: str


class Part(BaseModel):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part] = Field(min_length=1)


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The fields we act on. Others that clients send are ignored, as their defaults mean what we do."""

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
        requested = self.max_completion_tokens or self.max_tokens or limits.max_tokens
        if requested > limits.max_tokens:
            raise RequestError(f"max_tokens={requested} is more than this server allows: {limits.max_tokens}.")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_new_tokens=requested,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=tuple(filter(None, stop)),
        )

    def prompt(self, session: SmolVLMSession, limits: ServeConfig) -> Prompt:
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
                    raise RequestError(f"too many images: this server accepts {limits.max_images} per request.")
                images.append(decode_image(part.image_url, session, limits))
                content.append({"type": "image"})
            messages.append({"role": message.role, "content": content})
        return session.prompts.build(messages, images)


def decode_image(source: ImageUrl | None, session: SmolVLMSession, limits: ServeConfig) -> Image:
    url = source.url if source else ""
    if len(url) * 3 / 4 > limits.max_image_megabytes * MEGABYTE + SHOWN:
        raise RequestError(f"an image file is larger than {limits.max_image_megabytes:g} MB.")
    try:
        data = embedded_bytes(url)
        if data is None:
            raise RequestError(
                "image_url.url must be a data URL (data:image/png;base64,...): this server fetches nothing."
            )
        return session.prompts.open_image(data)
    except ImageError as error:
        raise RequestError(f"an image {error}.") from error

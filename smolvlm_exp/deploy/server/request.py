"""What a client sends to /v1/chat/completions, checked, and as a session takes it."""

import json
from typing import Any, Literal, Self

from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from smolvlm_exp.data.images import ImageError, embedded_bytes
from smolvlm_exp.deploy.options import ServeConfig
from smolvlm_exp.deploy.session.prompt import Prompt
from smolvlm_exp.deploy.session.session import SmolVLMSession
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.utils.errors import RequestError

MEGABYTE = 1_000_000
# Arguments of OpenAI's and of other servers that would change an answer -> the values that mean what we do.
FIXED: dict[str, tuple[Any, ...]] = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},),
    "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,), "top_k": (0, -1), "min_p": (0,),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "web_search_options": (),
}  # fmt: skip


class ImageUrl(BaseModel):
    url: str


class Part(BaseModel):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @field_validator("image_url", mode="before")
    @classmethod
    def plain_url(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def complete(self) -> Self:
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type} needs {self.type}")
        return self


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: list[Part] = Field(min_length=1, max_length=64)

    @field_validator("content", mode="before")
    @classmethod
    def plain_text(cls, value: Any) -> Any:
        if not isinstance(value, str | list):
            raise ValueError("it must be a text or a list of parts")
        return [{"type": "text", "text": value}] if isinstance(value, str) else value


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The fields we act on; null counts as left out. Others have a value of `FIXED`, or do not change an answer."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = 0
    stop: list[str] = Field([], max_length=16)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, value: Any) -> Any:
        return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value

    @field_validator("stop", mode="before")
    @classmethod
    def single_text(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def nothing_else(self) -> Self:
        for key, value in (self.model_extra or {}).items():
            if key in FIXED and value not in FIXED[key]:
                known = "".join(f" other than {json.dumps(default)}" for default in FIXED[key][:1])
                raise ValueError(f"{key}: this server has no {key}{known}; leave it out")
        return self

    def sampling(self, limits: ServeConfig, max_new_tokens: int) -> Sampling:
        """`max_new_tokens`: of an answer whose length was left open."""
        key = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        requested = getattr(self, key) or min(max_new_tokens, limits.max_tokens)
        if requested > limits.max_tokens:
            raise RequestError(f"{key}={str(requested)[:20]} is more than this server allows: {limits.max_tokens}.")
        return Sampling(
            max_new_tokens=requested,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=tuple(filter(None, self.stop)),
        )

    def prompt(self, session: SmolVLMSession, limits: ServeConfig) -> Prompt:
        """RequestError names the part that cannot be used."""
        parts = [
            (part, f"messages[{i}].content[{j}]")
            for i, message in enumerate(self.messages)
            for j, part in enumerate(message.content)
        ]
        letters = sum(len(part.text or "") for part, _ in parts)
        if letters > MEGABYTE:
            raise RequestError(f"the messages have {letters:,} letters; this server accepts {MEGABYTE:,}.")
        urls = [(part.image_url.url, where) for part, where in parts if part.type == "image_url" and part.image_url]
        if len(urls) > limits.max_images:
            raise RequestError(
                f"{urls[limits.max_images][1]}: too many images: this server accepts {limits.max_images} per request."
            )
        images = [decode_image(url, f"{where}.image_url", session, limits) for url, where in urls]
        messages = [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part.text} if part.type == "text" else {"type": "image"}
                    for part in message.content
                ],
            }
            for message in self.messages
        ]
        return session.prompts.build(messages, images)


def decode_image(url: str, where: str, session: SmolVLMSession, limits: ServeConfig) -> Image:
    try:
        data = embedded_bytes(url)
        if data is None:
            raise RequestError(f"{where} must be a data URL (data:image/png;base64,...): this server fetches nothing.")
        if len(data) > limits.max_image_megabytes * MEGABYTE:
            raise RequestError(f"{where}: an image file is larger than {limits.max_image_megabytes:g} MB.")
        return session.prompts.open_image(data)
    except ImageError as error:
        raise RequestError(f"{where}: an image {error}.") from error

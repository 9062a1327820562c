"""Conversations with a SmolVLM, run by PyTorch or ONNX Runtime, which read every token and every image once.

    session = SmolVLMSession.load("outputs/.../export/onnx")      # or a model's folder, run by PyTorch
    chat = session.conversation()
    for piece in chat.say("What is this?", images=[Image.open("cat.jpg")]):
        print(piece, end="", flush=True)
    print(chat.say("And what colour is it?").finish())

What a model read is cached as raw ids with their keys and values, within a budget of bytes, least recently used out
first. A prompt continues from the longest prefix that it shares with the cache, never inside an image. Answers equal
those without a cache.
"""

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL.Image import Image
from tokenizers.decoders import DecodeStream

from smolvlm_exp.data.images import ImageLimits
from smolvlm_exp.data.messages import user
from smolvlm_exp.deploy.session.backends import Past, load_folder, past_length
from smolvlm_exp.deploy.session.prompt import EncodedImage, Prompt, PromptBuilder
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.units import GIB


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen, and when it ends."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()  # texts that end an answer, and are not part of it


class LRUCache:
    """Tuples of tensors or arrays; the least recently used are dropped once all take more than `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.entries: OrderedDict[tuple[Any, ...], tuple[Any, ...]] = OrderedDict()

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for entry in self.entries.values() for array in entry)

    def put(self, key: tuple[Any, ...], entry: tuple[Any, ...]) -> None:
        self.entries[key] = entry
        self.entries.move_to_end(key)
        while self.bytes > self.budget:
            self.entries.popitem(last=False)

    def get(self, key: tuple[Any, ...]) -> tuple[Any, ...]:
        self.entries.move_to_end(key)
        return self.entries[key]


class SmolVLMSession:
    def __init__(
        self, model: Any, processor: Any, budget: int = GIB, max_edge: int = 512, limits: ImageLimits | None = None
    ) -> None:
        """
        Args:
            model: a TorchModel or an OnnxModel.
            budget: of the cache of conversations and images, in bytes; 0: no cache.
            max_edge: in pixels; larger images are shrunk to it, as training did (data.max_edge).
            limits: of image files; None: the defaults of data.*.
        """
        self.model, self.processor = model, processor
        self.prompts = PromptBuilder(processor, max_edge, limits or ImageLimits())
        self.cache = LRUCache(budget)
        self.context_length: int = model.config.text_config.max_position_embeddings
        self.lock = threading.RLock()  # one step of the model at a time: answers take turns token by token

    @classmethod
    def load(cls, folder: str | Path, precision: str | None = None, budget: int = GIB, max_edge: int = 512) -> Self:
        """A folder with onnx/ in it is run by ONNX Runtime, another by PyTorch; RequestError where it has no model."""
        return cls(*load_folder(Path(folder), precision), budget=budget, max_edge=max_edge)

    def conversation(self) -> "Conversation":
        return Conversation(self)

    def answer(self, prompt: Prompt, sampling: Sampling | None = None) -> "Answer":
        """RequestError where the prompt leaves no room for an answer."""
        if len(prompt.ids) >= self.context_length:
            raise RequestError(
                f"the conversation has {len(prompt.ids)} tokens; the model's context holds {self.context_length}."
            )
        return Answer(self, prompt, sampling or Sampling())

    def read(self, prompt: Prompt) -> tuple[torch.Tensor, Past, int]:
        """Logits of the next token; the prompt's keys and values; how many of its tokens came from the cache."""
        with self.lock:
            past, cached = self.cached_prefix(prompt)
            positions, features = [], []
            for start, image in prompt.images:
                if start >= cached:
                    span = range(start, start + len(image.ids))
                    positions += [i - cached for i in span if prompt.ids[i] == self.prompts.image_token]
                    features.append(self.features(image))
            logits, past = self.model.extend(prompt.ids[cached:], positions, features, past)
            return logits, past, cached

    def features(self, image: EncodedImage) -> Any:
        key = ("image", self.model.identity(), image.key)
        if key in self.cache.entries:
            return self.cache.get(key)[0]
        features = self.model.features(image.pixel_values, image.pixel_attention_mask)
        self.cache.put(key, (features,))
        return features

    def cached_prefix(self, prompt: Prompt) -> tuple[Past, int]:
        """Keys and values of the longest cached prefix of the prompt, never all of it; and its length."""
        kind, keys = ("tokens", self.model.identity()), prompt.keys[:-1]
        lengths = {entry: shared_prefix(keys, entry[2]) for entry in self.cache.entries if entry[:2] == kind}
        if not any(lengths.values()):
            return (), 0
        best = max(lengths, key=lengths.__getitem__)
        past = tuple(array[:, :, : lengths[best]] for array in self.cache.get(best))
        if lengths[best] == len(best[2]):
            del self.cache.entries[best]  # the longer entry that grows from it takes its place
        return past, lengths[best]


def shared_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences have in common from the start."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


class Answer:
    """An answer as it is generated: iterate over its pieces, or `finish()` it.

    Attributes:
        text, ids: generated so far.
        ended_by: `stop` (the model, or a stop text), `length`, or `stopped` (by a person).
        cached_tokens: how many of `prompt_tokens` came from the cache.
        first_token: seconds until the first token.
    """

    def __init__(self, session: SmolVLMSession, prompt: Prompt, sampling: Sampling) -> None:
        self.session, self.prompt, self.sampling = session, prompt, sampling
        self.text, self.ended_by, self.ids = "", "stopped", list[int]()
        self.prompt_tokens, self.cached_tokens, self.first_token = len(prompt.ids), 0, 0.0
        self.stopping = threading.Event()
        self.pieces = self.decode()

    def __iter__(self) -> Iterator[str]:
        return self.pieces

    def finish(self) -> str:
        """The complete answer."""
        for _ in self.pieces:
            pass
        return self.text.strip()

    def stop(self) -> None:
        """End it after its next token."""
        self.stopping.set()

    def decode(self) -> Iterator[str]:
        """The text, piece by piece, up to a stop text."""
        held_back = max(map(len, self.sampling.stop), default=1) - 1  # characters that may begin a stop text
        sent, stream = 0, DecodeStream(skip_special_tokens=True)
        with contextlib.closing(self.generate()) as tokens:
            for token in tokens:
                self.text += stream.step(self.session.prompts.tokenizer._tokenizer, token) or ""
                end = min((i for i in map(self.text.find, self.sampling.stop) if i >= 0), default=None)
                if end is not None:
                    self.text, self.ended_by = self.text[:end], "stop"
                    break
                ready = len(self.text) - held_back
                if ready > sent:
                    yield self.text[sent:ready]
                    sent = ready
            if self.text[sent:]:
                yield self.text[sent:]

    def generate(self) -> Generator[int, None, None]:
        """The tokens but for the end token. What the model has read is cached, however the answer ends."""
        session, sampling, begun = self.session, self.sampling, time.perf_counter()
        generator, identity = torch.Generator().manual_seed(sampling.seed), session.model.identity()
        logits, past, self.cached_tokens = session.read(self.prompt)
        limit = min(sampling.max_new_tokens, session.context_length - self.prompt_tokens)
        try:
            while not self.stopping.is_set():
                token = sample_token(logits, sampling, generator)
                self.first_token = self.first_token or time.perf_counter() - begun
                self.ids.append(token)
                self.prompt.ids.append(token)
                if token == session.prompts.end:
                    self.ended_by = "stop"
                    return
                yield token
                if len(self.ids) >= limit:
                    self.ended_by = "length"
                    return
                with session.lock:
                    logits, past = session.model.extend([token], [], [], past)
        finally:
            with session.lock:  # an answer's last token has not been read
                session.cache.put(("tokens", identity, tuple(self.prompt.keys[: past_length(past)])), past)


class Conversation:
    """Turns in order, as raw ids: an answer is never decoded and tokenised again."""

    def __init__(self, session: SmolVLMSession) -> None:
        self.session, self.prompt = session, Prompt()

    def say(self, text: str, images: Sequence[Image] = (), sampling: Sampling | None = None) -> Answer:
        """The answer to the user's next turn. RequestError where it is too long; the conversation stays as it was."""
        prompt = self.session.prompts.build([user(text, len(images))], images, self.prompt)
        answer = self.session.answer(prompt, sampling)
        self.prompt = prompt
        return answer


def sample_token(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token, from its logits (vocabulary,)."""
    if not sampling.temperature:
        return int(logits.argmax())
    probabilities, order = (logits / sampling.temperature).softmax(0).sort(descending=True)
    # The nucleus (arXiv 1904.09751), never empty.
    probabilities[probabilities.cumsum(0) - probabilities >= sampling.top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])

"""Conversations with a SmolVLM, whatever runs it, that read every token and every picture once.

    session = SmolVLMSession.load("outputs/.../export/onnx")      # or a model's folder, run by PyTorch
    chat = session.conversation()
    for piece in chat.say("What is this?", images=[Image.open("cat.jpg")]):
        print(piece, end="", flush=True)
    print(chat.say("And what colour is it?").finish())

What a model has read is kept as its raw ids with their keys and values, within a budget of bytes, the least used going
first. A prompt goes on from the longest start that it shares with any of them, in whole pictures. Answers equal those
of a model that reads everything anew.
"""

import itertools
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL.Image import Image
from tokenizers.decoders import DecodeStream

from smolvlm_exp.data.images import ImageLimits
from smolvlm_exp.deploy.session.kv_cache import LRUCache
from smolvlm_exp.deploy.session.prompt import Picture, Prompt, PromptBuilder
from smolvlm_exp.utils.errors import RequestError

GIB = 2**30


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen, and when it ends."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()  # texts that end an answer, and are no part of it


class SmolVLMSession:
    def __init__(
        self, model: Any, processor: Any, budget: int = GIB, max_edge: int = 512, limits: ImageLimits | None = None
    ) -> None:
        """
        Args:
            model: a TorchModel or an OnnxModel.
            budget: bytes for what is kept of conversations and pictures; 0 keeps nothing.
            max_edge: pixels; larger pictures are shrunk to it, as training did (data.max_edge).
            limits: of pictures' files; None: the defaults of data.*.
        """
        self.model, self.processor = model, processor
        self.writer = PromptBuilder(processor, max_edge, limits or ImageLimits())
        self.kept = LRUCache(budget)
        self.limit: int = model.config.text_config.max_position_embeddings
        self.numbers = itertools.count()
        self.turns = threading.RLock()  # one step of the model at a time: answers take turns token by token
        self.stopping = threading.Event()

    @classmethod
    def load(cls, folder: str | Path, precision: str | None = None, budget: int = GIB, max_edge: int = 512) -> Self:
        """A folder with onnx/ in it is run by ONNX Runtime, another by PyTorch.

        Raises:
            RequestError: there is no model in it.
        """
        from smolvlm_exp.deploy.session.backends import load_folder

        return cls(*load_folder(Path(folder), precision), budget=budget, max_edge=max_edge)

    def conversation(self) -> "Conversation":
        return Conversation(self)

    def answer(self, prompt: Prompt, sampling: Sampling | None = None) -> "Answer":
        """
        Raises:
            RequestError: the prompt leaves no room for an answer.
        """
        if len(prompt.ids) >= self.limit:
            raise RequestError(f"the conversation has {len(prompt.ids)} tokens, and the model reads {self.limit}.")
        return Answer(self, prompt, sampling or Sampling())

    def prompt(self, messages: list[dict[str, Any]], images: Sequence[Image]) -> Prompt:
        """Messages as chat templates have them, each `image` part taking the next of `images`."""
        return self.writer.prompt(messages, [self.writer.picture(image) for image in images])

    def batch(self, rows: list[dict[str, Any]], max_new_tokens: int = 256) -> list[str]:
        """Answers to many prompts at once, padded to a common length; nothing of them is kept.

        Args:
            rows: each with `prompt` (messages) and `images`.
        """
        from smolvlm_exp.evaluation.generate import generate_answers

        model = getattr(self.model, "model", self.model)
        with self.turns:
            return generate_answers(model, self.processor, rows, max(len(rows), 1), max_new_tokens)

    def stop(self) -> None:
        """End all answers that are being given, each after its next token."""
        self.stopping.set()
        self.stopping = threading.Event()

    def read(self, prompt: Prompt) -> tuple[torch.Tensor, Any, int]:
        """Logits of what follows the prompt; keys and values of it; how many of its tokens were known."""
        with self.turns:
            past, known = self.longest(prompt)
            places, features = [], []
            for start, picture in prompt.pictures:
                if start >= known:
                    at = range(start, start + len(picture.ids))
                    places += [i - known for i in at if prompt.ids[i] == self.writer.image_token]
                    features.append(self.features(picture))
            logits, past = self.model.extend(prompt.ids[known:], places, features, past)
            return logits, past, known

    def features(self, picture: Picture) -> Any:
        key = ("picture", picture.key, self.model.identity())
        found = self.kept.get(key)
        if found is None:
            found = self.model.features(picture.pixel_values, picture.pixel_attention_mask)
            self.kept.put(key, found, found.nbytes)
        return found

    def longest(self, prompt: Prompt) -> tuple[Any, int]:
        """What is kept of the longest start that anything shares with the prompt. Its last token is left to read."""
        best, length = None, 0
        for key, found in self.kept.items():
            if key[0] != "turn" or key[1] != self.model.identity():  # type: ignore[index]
                continue
            shared = prompt.outside(min(prompt.shared(found[0]), len(prompt.ids) - 1))
            if shared > length:
                best, length = key, shared
        if best is None:
            return (), 0
        keys, past = self.kept.get(best)
        if length < len(keys):
            return self.model.cut(past, length), length
        self.kept.drop(best)  # it grows: what comes of it takes its place
        return past, length

    def keep(self, keys: list[int | str], past: Any, identity: tuple[Any, ...]) -> None:
        """Remember what was read; `past` lacks the last token of an answer.

        Args:
            identity: the model's, when it was read.
        """
        with self.turns:
            length = self.model.length(past)
            self.kept.put(("turn", identity, next(self.numbers)), (keys[:length], past), self.model.size(past))


class Answer:
    """An answer that is being given: iterate over its pieces, or `finish()` it.

    Attributes:
        text, ids: what came so far.
        ended_by: `stop` (the model, or a stop text), `length`, or `stopped` (by a person).
        known: of `prompt_tokens`, how many were not read again.
        first_token: seconds until it came.
    """

    def __init__(self, session: SmolVLMSession, prompt: Prompt, sampling: Sampling) -> None:
        self.session, self.prompt, self.sampling = session, prompt, sampling
        self.text, self.ended_by, self.ids = "", "stopped", list[int]()
        self.prompt_tokens, self.known, self.first_token = len(prompt.ids), 0, 0.0
        self.stopping = session.stopping
        self.pieces = self.run()

    def __iter__(self) -> Iterator[str]:
        return self.pieces

    def finish(self) -> str:
        """The whole answer."""
        for _ in self.pieces:
            pass
        return self.text.strip()

    def stop(self) -> None:
        self.stopping = threading.Event()
        self.stopping.set()

    def run(self) -> Iterator[str]:
        held = max(map(len, self.sampling.stop), default=1) - 1  # letters that may be the start of a stop text
        begun, told = time.perf_counter(), 0
        tokens = self.tokens(begun)
        stream = DecodeStream(skip_special_tokens=True)
        try:
            for token in tokens:
                self.text += stream.step(self.session.writer.tokenizer._tokenizer, token) or ""
                at = min((i for i in map(self.text.find, self.sampling.stop) if i >= 0), default=None)
                if at is not None:
                    self.text, self.ended_by = self.text[:at], "stop"
                    break
                if len(self.text) - held > told:
                    yield self.text[told : len(self.text) - held]
                    told = len(self.text) - held
            if self.text[told:]:
                yield self.text[told:]
        finally:
            tokens.close()

    def tokens(self, begun: float) -> Generator[int, None, None]:
        """The answer's tokens, with its end; what was read is kept, however it ends."""
        session, sampling = self.session, self.sampling
        draw, identity = torch.Generator().manual_seed(sampling.seed), session.model.identity()
        logits, past, self.known = session.read(self.prompt)
        room = min(sampling.max_new_tokens, session.limit - self.prompt_tokens)
        try:
            while not self.stopping.is_set():
                token = sample_token(logits, sampling, draw)
                self.first_token = self.first_token or time.perf_counter() - begun
                self.ids.append(token)
                self.prompt.add([token])
                if token == session.writer.end:
                    self.ended_by = "stop"
                    return
                yield token
                if len(self.ids) >= room:
                    self.ended_by = "length"
                    return
                with session.turns:
                    logits, past = session.model.extend([token], [], [], past)
        finally:
            session.keep(self.prompt.keys, past, identity)


class Conversation:
    """Turns that follow each other. Raw ids are what it consists of: an answer is never written out and read again."""

    def __init__(self, session: SmolVLMSession) -> None:
        self.session, self.so_far = session, Prompt()

    def say(self, text: str, images: Sequence[Image] = (), sampling: Sampling | None = None) -> Answer:
        """The answer to the user's next turn.

        Raises:
            RequestError: the conversation is too long; it stays as it was.
        """
        pictures = [self.session.writer.picture(image) for image in images]
        asked = self.session.writer.turn(self.so_far.copy(), text, pictures)
        answer = self.session.answer(asked, sampling)
        self.so_far = asked
        return answer


def sample_token(logits: torch.Tensor, sampling: Sampling, draw: torch.Generator) -> int:
    """
    Args:
        logits: (vocabulary,).
    """
    if not sampling.temperature:
        return int(logits.argmax())
    chances, order = (logits / sampling.temperature).softmax(0).sort(descending=True)
    chances[chances.cumsum(0) - chances >= sampling.top_p] = 0  # the nucleus (arXiv 1904.09751), never empty
    return int(order[torch.multinomial(chances, 1, generator=draw)])

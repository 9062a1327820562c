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

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from peft import PeftModel
from PIL.Image import Image

from smolvlm_exp.data.images import ImageLimits
from smolvlm_exp.data.messages import user
from smolvlm_exp.deploy.session.answer import Answer
from smolvlm_exp.deploy.session.backends import BaseModel, TorchModel, load_folder
from smolvlm_exp.deploy.session.cache import SessionCache
from smolvlm_exp.deploy.session.prompt import Prompt, PromptBuilder
from smolvlm_exp.deploy.session.runner import ModelRunner
from smolvlm_exp.deploy.session.scheduler import Scheduler
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.units import GIB

ROWS = 16  # answers that are generated at a time, unless a session says otherwise


class SmolVLMSession:
    def __init__(
        self,
        model: Any,
        processor: Any,
        budget: int = GIB,
        max_edge: int = 512,
        limits: ImageLimits | None = None,
        rows: int = ROWS,
    ) -> None:
        """
        Args:
            model: a TorchModel or an OnnxModel.
            budget: of the cache of conversations and images, in bytes; 0: no cache.
            max_edge: in pixels; larger images are shrunk to it, as training did (data.max_edge).
            limits: of image files; None: the defaults of data.*.
            rows: answers that are generated at a time; further ones wait.
        """
        self.model, self.processor = model, processor
        self.prompts = PromptBuilder(processor, max_edge, limits or ImageLimits())
        self.cache = SessionCache(budget)
        self.context_length: int = model.config.text_config.max_position_embeddings
        lock = threading.Lock()
        models = {False: model}
        if isinstance(model, TorchModel) and isinstance(model.model, PeftModel):
            models[True] = BaseModel(model.model)
        runners = {base: ModelRunner(each, self.cache, self.prompts, lock) for base, each in models.items()}
        self.scheduler = Scheduler(runners, lock, rows)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        precision: str | None = None,
        budget: int = GIB,
        max_edge: int = 512,
        rows: int = ROWS,
    ) -> Self:
        """A folder with onnx/ in it is run by ONNX Runtime, another by PyTorch; RequestError where it has no model."""
        return cls(*load_folder(Path(folder), precision), budget=budget, max_edge=max_edge, rows=rows)

    def conversation(self) -> "Conversation":
        return Conversation(self)

    @property
    def has_base(self) -> bool:
        """Whether the model has an adapter that answers may leave out."""
        return True in self.scheduler.runners

    def answer(self, prompt: Prompt, sampling: Sampling | None = None, base: bool = False) -> "Answer":
        """RequestError where the prompt leaves no room for an answer.

        Args:
            base: answer without the adapter.
        """
        if base and not self.has_base:
            raise RequestError("base=True: this model has no adapter that could be left out.")
        if len(prompt.ids) >= self.context_length:
            raise RequestError(
                f"the conversation has {len(prompt.ids)} tokens; the model's context holds {self.context_length}."
            )
        sampling = sampling or Sampling()
        room = self.context_length - len(prompt.ids)
        limited = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        return Answer(self.scheduler.submit, self.prompts, prompt, limited, base)

    def close(self) -> None:
        """Stop all answers, those to come too."""
        self.scheduler.close()


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

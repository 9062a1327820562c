"""An answer as it is generated: the scheduler's thread adds tokens, and a reader gets pieces of text."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tokenizers.decoders import DecodeStream

from smolvlm_exp.deploy.session.prompt import Prompt, PromptBuilder
from smolvlm_exp.engine.generation.sampling import Sampling

Deliver = Callable[[str | None], Any]  # gets each piece of text, in the scheduler's thread; None once it has ended


class AnswerError(RuntimeError):
    """An answer could not be generated; others are not affected."""


class Answer:
    """Iterate over its pieces, or `finish()` it: either begins it. AnswerError where it fails.

    Attributes:
        text, ids: generated so far.
        base: it is the base's, without the adapter.
        ended_by: `stop` (the model, or a stop text), `length`, or `stopped` (by a person).
        cached_tokens: how many of `prompt_tokens` came from the cache.
        first_token: seconds until the first token.
    """

    def __init__(
        self,
        submit: Callable[["Answer"], None],
        prompts: PromptBuilder,
        prompt: Prompt,
        sampling: Sampling,
        base: bool = False,
    ) -> None:
        """`submit`: the scheduler's."""
        self.submit, self.prompt, self.sampling, self.base = submit, prompt, sampling, base
        self.tokenizer, self.end_token = prompts.tokenizer._tokenizer, prompts.end
        self.text, self.ended_by, self.ids = "", "stopped", list[int]()
        self.prompt_tokens, self.cached_tokens, self.first_token = len(prompt.ids), 0, 0.0
        self.ended, self.stopping, self.error = False, threading.Event(), ""
        self.stream, self.sent = DecodeStream(skip_special_tokens=True), 0
        self.held_back = max(map(len, sampling.stop), default=1) - 1  # characters that may begin a stop text
        self.pieces = self.read()

    # Its reader

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

    def read(self) -> Iterator[str]:
        pieces = queue.SimpleQueue[str | None]()
        self.start(pieces.put)
        try:
            while (piece := pieces.get()) is not None:
                yield piece
        finally:
            self.stop()
        self.check()

    def start(self, deliver: Deliver) -> None:
        """Let the scheduler generate it, and `deliver` its pieces."""
        self.deliver, self.began = deliver, time.perf_counter()
        self.submit(self)

    def check(self) -> None:
        """AnswerError if it failed."""
        if self.error:
            raise AnswerError(self.error)

    # The scheduler

    def add(self, token: int) -> None:
        """The next token; the text is sent up to where a stop text may begin."""
        self.first_token = self.first_token or time.perf_counter() - self.began
        self.ids.append(token)
        self.prompt.ids.append(token)
        if token == self.end_token:
            self.end("stop")
            return
        self.text += self.stream.step(self.tokenizer, token) or ""
        stop = min((i for i in map(self.text.find, self.sampling.stop) if i >= 0), default=None)
        if stop is not None:
            self.text = self.text[:stop]
            self.end("stop")
        elif len(self.ids) == self.sampling.max_new_tokens:
            self.end("length")
        else:
            self.send(len(self.text) - self.held_back)

    def end(self, by: str, error: str = "") -> None:
        self.ended_by, self.error, self.ended = by, error, True
        self.send(len(self.text))
        self.deliver(None)

    def send(self, until: int) -> None:
        if until > self.sent:
            self.deliver(self.text[self.sent : until])
            self.sent = until

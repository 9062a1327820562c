"""A model's rows: answers enter its batch, get a token per step, and leave when they end."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from smolvlm_exp.deploy.session.answer import Answer
from smolvlm_exp.deploy.session.backends import TorchModel
from smolvlm_exp.deploy.session.cache import SessionCache
from smolvlm_exp.deploy.session.prompt import EncodedImage, PromptBuilder
from smolvlm_exp.deploy.session.sequential import SequentialBatch
from smolvlm_exp.engine.generation.continuous import ContinuousBatch, Past, Request, past_length
from smolvlm_exp.engine.generation.decoder import Decoder, decoder_obstacle
from smolvlm_exp.engine.generation.sampler import plan_sampling
from smolvlm_exp.engine.memory.probe import free_memory

log = logging.getLogger(__name__)

TILES = 64  # of images that go through the tower together
TYPICAL = 4096, 1024  # tokens of a prompt and an answer that should fit beside unpacked weights


class ModelRunner:
    def __init__(self, model: Any, cache: SessionCache, prompts: PromptBuilder, lock: threading.Lock) -> None:
        """
        Args:
            model: a TorchModel or an OnnxModel.
            prompts: what builds the answers' prompts.
            lock: held while `active` changes.
        """
        self.model, self.cache, self.lock = model, cache, lock
        self.end, self.image_token, self.normalise = prompts.end, prompts.image_token, prompts.normalise
        self.active = list[Answer]()  # of the batch's rows, in their order
        self.begun: tuple[list[Answer], Callable[[], list[int]]] | None = None  # a step whose tokens are not read yet
        self.identity: str | None = None  # of the model that `batch` runs
        self.batch: ContinuousBatch | SequentialBatch

    def prepare(self) -> None:
        """Make a batch for the adapters that are active now, once no answer needs the last one."""
        identity = self.model.identity()
        if not self.active and identity != self.identity:
            self.batch, self.identity = make_batch(self.model, self.end), identity

    def free(self) -> None:
        """Free the memory of all rows."""
        if self.identity is not None:
            self.batch.clear()

    # Entering

    def fits(self, answers: Sequence[Answer]) -> bool:
        """Whether further rows have room for these, with the adapters that are active now."""
        lengths, counts = [a.prompt_tokens for a in answers], [a.sampling.max_new_tokens for a in answers]
        return self.model.identity() == self.identity and self.batch.fits(lengths, counts)

    def enter(self, answers: Sequence[Answer]) -> None:
        """Read prompts together; where that fails one by one, so that an answer fails for itself alone."""
        if not answers:
            return
        try:
            tokens = self.batch.enter(self.requests(answers))
        except Exception as error:
            if len(answers) == 1:
                log.exception("an answer failed")
                answers[0].end("stopped", describe(error))
            else:
                for answer in answers:
                    self.enter([answer])
            return
        with self.lock:
            self.active += answers
        for answer, token in zip(answers, tokens, strict=True):
            answer.add(token)
        self.free_rows()

    def requests(self, answers: Sequence[Answer]) -> list[Request]:
        pasts = [self.cache.take_prefix(self.identity, answer.prompt.keys[:-1]) for answer in answers]
        new = []  # of each, the images that its past does not have
        for answer, past in zip(answers, pasts, strict=True):
            answer.cached_tokens = past_length(past)
            new.append([(start, image) for start, image in answer.prompt.images if start >= answer.cached_tokens])
        features = self.features([image for images in new for _, image in images])
        return [
            Request(
                ids=answer.prompt.ids[answer.cached_tokens :],
                sampling=answer.sampling,
                past=past,
                image_at=[
                    i - answer.cached_tokens
                    for start, image in images
                    for i in range(start, start + len(image.ids))
                    if answer.prompt.ids[i] == self.image_token
                ],
                features=[features[image.key] for _, image in images],
            )
            for answer, past, images in zip(answers, pasts, new, strict=True)
        ]

    def features(self, images: Sequence[EncodedImage]) -> dict[int, Any]:
        """Each image's features by its key: (n, hidden). Images that are new go through the tower together."""
        keys = {image.key: ("image", self.identity, image.key) for image in images}
        features = {image: self.cache.get(key)[0] for image, key in keys.items() if key in self.cache.entries}
        new = {image.key: image for image in images if image.key not in features}
        for part in parts_of(list(new.values()), TILES):
            together, start = self.model.features(torch.cat([image.tiles for image in part]), self.normalise), 0
            for image in part:
                end = start + image.ids.count(self.image_token)
                features[image.key] = together[list(range(start, end))]  # a copy: a view would keep all of `together`
                self.cache.put(keys[image.key], (features[image.key],))
                start = end
        return features

    # Tokens

    def advance(self) -> None:
        """A token for each active answer. A GPU begins the next step before the last one's tokens are looked at."""
        if not self.active:
            return
        begun = [*self.active], self.batch.step()
        if self.batch.runs_ahead:
            begun, self.begun = self.begun, begun  # type: ignore[assignment]
        if begun:
            answers, tokens = begun
            for answer, token in zip(answers, tokens(), strict=True):
                if not answer.ended:
                    answer.add(token)
        self.free_rows()
        if not self.active:
            self.begun = None

    def free_rows(self) -> None:
        for row in reversed(range(len(self.active))):
            answer = self.active[row]
            if answer.stopping.is_set() and not answer.ended:
                answer.end("stopped")
            if answer.ended:
                self.leave(row)

    def leave(self, row: int) -> None:
        """Cache what was read for a row's answer, and give the row to the last one."""
        answer = self.active[row]
        past: Past = self.batch.leave(row, len(answer.ids) - 1)
        read = tuple(answer.prompt.keys[: past_length(past)])
        self.cache.put(("tokens", self.identity, read), past)
        with self.lock:
            self.active[row] = self.active[-1]
            self.active.pop()


def parts_of(images: Sequence[EncodedImage], tiles: int) -> list[list[EncodedImage]]:
    """Images in order, `tiles` tiles at most in a part, or one image."""
    parts, room = list[list[EncodedImage]](), 0
    for image in images:
        count = len(image.tiles)
        if count > room:
            parts.append([])
            room = tiles
        parts[-1].append(image)
        room -= count
    return parts


def make_batch(model: Any, end: int) -> ContinuousBatch | SequentialBatch:
    """For a model with the adapters that are active now."""
    if not isinstance(model, TorchModel):
        return SequentialBatch(model, end)
    with model.adapters():
        if obstacle := decoder_obstacle(model.model):
            log.info(f"answers: a row after another by transformers' forward pass, and slower: {obstacle}")
            return SequentialBatch(model, end)
        plan = plan_sampling(model.model, free_memory(model.model.device), *TYPICAL)
        return ContinuousBatch(Decoder(model.model, plan.merge), end)


def describe(error: Exception) -> str:
    return f"the answer failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

"""Rows that take turns, a token each: for ONNX graphs, and for PyTorch models that the engine does not run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smolvlm_exp.engine.generation.continuous import Past, Request
from smolvlm_exp.engine.generation.sampling import Sampling, draw, uniforms


@dataclass
class Row:
    past: Past
    sampling: Sampling
    uniforms: torch.Tensor  # (max_new_tokens,)
    tokens: list[int]


class SequentialBatch:
    """The interface of `ContinuousBatch`, by a model's `extend`."""

    runs_ahead = False

    def __init__(self, model: Any, end: int) -> None:
        """`model`: a TorchModel or an OnnxModel."""
        self.model, self.end, self.rows = model, end, list[Row]()

    def fits(self, lengths: Sequence[int], counts: Sequence[int]) -> bool:
        return True  # nothing is set aside for a row

    def clear(self) -> None:
        self.rows = []

    def enter(self, requests: Sequence[Request]) -> list[int]:
        rows = []
        for request in requests:
            sampling = request.sampling
            row = Row(request.past, sampling, uniforms([sampling.seed], sampling.max_new_tokens)[0], [])
            self.extend(row, request.ids, request.image_at, request.features)
            rows.append(row)
        self.rows += rows
        return [row.tokens[-1] for row in rows]

    def step(self) -> Callable[[], list[int]]:
        for row in self.rows:
            self.extend(row, row.tokens[-1:], [], [])
        tokens = [row.tokens[-1] for row in self.rows]
        return lambda: tokens

    def extend(self, row: Row, ids: list[int], image_at: list[int], features: list[Any]) -> None:
        logits, row.past = self.model.extend(ids, image_at, features, row.past)
        drawn = len(row.tokens)
        if drawn < row.sampling.min_new_tokens:
            logits[self.end] = -torch.inf
        row.tokens.append(int(draw(logits[None], row.uniforms[drawn : drawn + 1], row.sampling)))

    def leave(self, row: int, read: int) -> Past:
        """`read` is what `extend` was given: all of the answer's tokens but the last."""
        past, self.rows[row] = self.rows[row].past, self.rows[-1]
        self.rows.pop()
        return past

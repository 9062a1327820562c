"""How the next token is drawn from the model's logits: greedy, temperature, top-k and top-p (the nucleus).

A row draws with numbers of its own, made beforehand from its own seed, so that its answer does not depend on what
else is in the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen, and when it ends."""

    max_new_tokens: int = 256
    min_new_tokens: int = 0  # before the end token may come
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # of the likeliest tokens, those that come to this probability; 1: all
    top_k: int = 0  # of the likeliest tokens, so many; 0: all
    seed: int = 0
    stop: tuple[str, ...] = ()  # texts that end an answer, and are no part of it

    @property
    def truncates(self) -> bool:
        """Whether some tokens are left out before a token is drawn."""
        return bool(self.temperature) and (self.top_p < 1 or self.top_k > 0)


def uniforms(seeds: Sequence[int], count: int) -> torch.Tensor:
    """(rows, count) float32 in [0, 1): what the rows with these seeds draw their tokens with."""
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def draw(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """One token of each row: the likeliest, or by inverting the cumulative distribution at `uniform`.

    Args:
        logits: (rows, vocabulary) float32; uniform: (rows,).

    Returns:
        (rows,) int64.
    """
    if not sampling.temperature:
        return logits.argmax(1)
    probabilities = (logits / sampling.temperature).softmax(1)
    if not sampling.truncates:
        return inverse_cdf(probabilities, uniform)
    probabilities, order = probabilities.sort(dim=1, descending=True)
    likelier = probabilities.cumsum(1) - probabilities  # the probability of all that come before
    probabilities[:, 1:] = probabilities[:, 1:].masked_fill(likelier[:, 1:] >= sampling.top_p, 0)  # arXiv 1904.09751
    if sampling.top_k:
        probabilities[:, sampling.top_k :] = 0
    return order.gather(1, inverse_cdf(probabilities, uniform)[:, None])[:, 0]


def inverse_cdf(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """(rows,) the first place whose cumulative weight is above `uniform` of the total; weights: (rows, places)."""
    cumulative = weights.cumsum(1)
    found = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return found.clamp(max=weights.shape[1] - 1)

"""How the next token is drawn from the model's logits: greedy, temperature, top-k and top-p (the nucleus).

A row draws with numbers of its own, made beforehand from its own seed, so that its answer does not depend on what
else is in the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

GOLDEN = 0x9E3779B1  # 2**32 / the golden ratio: its multiples lie far apart, so that blocks of seeds do not meet
COLDEST = 1e-6  # temperatures below it draw like it, which is the likeliest token


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen, and when it ends."""

    max_new_tokens: int = 256
    min_new_tokens: int = 0  # before the end token may come
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # of the likeliest tokens, those that come to this probability; 1: all
    top_k: int = 0  # of the likeliest tokens, so many; 0: all
    seed: int = 0
    suppress: tuple[int, ...] = ()  # ids that are never drawn
    stop: tuple[str, ...] = ()  # texts that end a session's answer, and are no part of it

    @property
    def truncates(self) -> bool:
        """Whether some tokens are left out before a token is drawn."""
        return bool(self.temperature) and (self.top_p < 1 or self.top_k > 0)


def uniforms(seeds: Sequence[int], count: int) -> torch.Tensor:
    """(rows, count) float32 in [0, 1): what the rows with these seeds draw their tokens with."""
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(folded(seed))) for seed in seeds])


def folded(seed: int) -> int:
    """A seed of any size in the 32 bits that PyTorch's generator on a CPU looks at; a smaller one as it is."""
    return (seed + (seed >> 32) * GOLDEN) % 2**32


def draw(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """One token of each row: the likeliest, or by inverting the cumulative distribution at `uniform`.

    Args:
        logits: (rows, vocabulary) float32; uniform: (rows,).

    Returns:
        (rows,) int64.
    """
    if not sampling.temperature:
        return logits.argmax(1)
    probabilities = tempered(logits, max(sampling.temperature, COLDEST)).softmax(1)
    if not sampling.truncates:
        return inverse_cdf(probabilities, uniform)
    return draw_truncated(probabilities, uniform, sampling.top_p, sampling.top_k or logits.shape[1])


def tempered(logits: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """(rows, vocabulary) logits at a temperature of `COLDEST` at least, less a row's largest: nothing overflows."""
    return (logits - logits.amax(1, keepdim=True)) / temperature


def draw_rows(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    truncates: bool,
) -> torch.Tensor:
    """`draw` where each row has a sampling of its own: the same token as from `draw` alone.

    Args:
        temperature, top_p, top_k: (rows,) float32, with the meaning that they have in `Sampling`.
        truncates: whether a row's sampling does; sorting takes time.
    """
    probabilities = tempered(logits, temperature.clamp(min=COLDEST)[:, None]).softmax(1)
    tokens = inverse_cdf(probabilities, uniform)
    if truncates:
        most = top_k.masked_fill(top_k == 0, logits.shape[1])
        likely = draw_truncated(probabilities, uniform, top_p[:, None], most[:, None])
        tokens = torch.where((top_p < 1) | (top_k > 0), likely, tokens)
    return torch.where(temperature == 0, logits.argmax(1), tokens)


def draw_truncated(
    probabilities: torch.Tensor, uniform: torch.Tensor, top_p: float | torch.Tensor, top_k: float | torch.Tensor
) -> torch.Tensor:
    """(rows,) drawn from the `top_k` likeliest and the nucleus (arXiv 1904.09751), which has one token at least.

    Args:
        probabilities: (rows, vocabulary); uniform: (rows,); top_p, top_k: numbers, or (rows, 1).
    """
    probabilities, order = probabilities.sort(dim=1, descending=True)
    likelier = probabilities.cumsum(1) - probabilities  # the probability of all that come before
    rank = torch.arange(probabilities.shape[1], device=probabilities.device)
    excluded = ((likelier >= top_p) & (rank > 0)) | (rank >= top_k)
    return order.gather(1, inverse_cdf(probabilities.masked_fill(excluded, 0), uniform)[:, None])[:, 0]


def inverse_cdf(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """(rows,) the first place whose cumulative weight is above `uniform` of the total; weights: (rows, places)."""
    cumulative = weights.cumsum(1)
    found = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return found.clamp(max=weights.shape[1] - 1)

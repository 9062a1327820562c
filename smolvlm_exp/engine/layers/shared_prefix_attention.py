"""Attention over a packed batch whose answers share their prompts (packing.py), for transformers' models.

Two sets of sequences: causal over each [P C]; and the queries of [p R] over the keys [P before p, p R], causal from the
bottom right. Both see what they would see if every answer had its prompt to itself. bfloat16 and float16 on a GPU run
`varlen_attn` (flash attention over sequences of any length); everything else runs SDPA on padded copies.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

PREFIX = "shared_prefix_"


@dataclass
class Layout:
    """Where each sequence of a packed batch lies: packing.pack's fields of the same names."""

    tokens: int
    middle: int
    cu_first: torch.Tensor
    cu_second: torch.Tensor
    cu_keys: torch.Tensor
    keys_at: torch.Tensor
    max_first: int
    max_second: int
    max_keys: int

    @classmethod
    def of(cls, packed: Mapping[str, Any]) -> "Layout":
        return cls(**{field.name: packed[field.name] for field in fields(cls)})

    # The same as one set of 2B sequences, for kernels that take queries and keys of different lengths.

    @cached_property
    def sources(self) -> torch.Tensor:
        """(S,) the token that each key is: the first half's in order, then `keys_at`."""
        return torch.cat((torch.arange(self.middle, device=self.keys_at.device), self.keys_at))

    @cached_property
    def slots(self) -> torch.Tensor:
        """(T,) int32, where a token stands in `sources` as a key of the second half; -1 where it does not."""
        slots = torch.full((self.tokens,), -1, dtype=torch.int32, device=self.keys_at.device)
        places = torch.arange(len(self.keys_at), dtype=torch.int32, device=self.keys_at.device)
        return slots.index_copy_(0, self.keys_at, places + self.middle)

    @cached_property
    def cu_queries(self) -> torch.Tensor:
        """(2B + 1,) int32 over the whole line."""
        return torch.cat((self.cu_first, self.cu_second[1:] + self.middle))

    @cached_property
    def cu_sources(self) -> torch.Tensor:
        """(2B + 1,) int32 over `sources`."""
        return torch.cat((self.cu_first, self.cu_keys[1:] + self.middle))

    @property
    def max_queries(self) -> int:
        return max(self.max_first, self.max_second)

    @property
    def max_sources(self) -> int:
        return max(self.max_first, self.max_keys)

    @cached_property
    def padded(self) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """`padding` of the first half, of the second half's queries; (B, max_keys) places among its keys."""
        first = padding(self.cu_first, self.max_first, self.middle)
        second = padding(self.cu_second, self.max_second, self.tokens - self.middle)
        return first, second, padding(self.cu_keys, self.max_keys, len(self.keys_at))[0]

    @cached_property
    def second_mask(self) -> torch.Tensor:
        """(B, 1, max_second, max_keys), true where a query of [p R] may look."""
        queries, keys = self.cu_second.diff()[:, None, None], self.cu_keys.diff()[:, None, None]
        i = torch.arange(self.max_second, device=keys.device)[None, :, None]
        j = torch.arange(self.max_keys, device=keys.device)[None, None, :]
        return ((j <= i + keys - queries) & (j < keys))[:, None]


def padding(offsets: torch.Tensor, longest: int, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """From a line of sequences to a padded (B, longest) table and back, without waiting for the device.

    Args:
        offsets: (B + 1,) where each sequence begins; longest: of their lengths; total: T, all of them.

    Returns:
        (B, longest) places in the line, past a sequence's end its last token's; (T,) places in the flattened table.
    """
    lengths = offsets.diff()
    steps = torch.arange(longest, device=offsets.device)
    there = offsets[:-1, None] + torch.minimum(steps[None], lengths[:, None] - 1)
    rows = torch.arange(len(lengths), device=offsets.device).repeat_interleave(lengths, output_size=total)
    back = torch.arange(total, device=offsets.device) - offsets[rows] + rows * longest
    return there, back


def use_shared_prefix(text_model: nn.Module) -> None:
    """Let `text_model` attend over packed batches when it is given a layout, and as before when it is not.

    Raises:
        ValueError: its attention is `eager`, which has no registered function to go on with.
    """
    config: Any = text_model.config
    before = config._attn_implementation
    if before.startswith(PREFIX):
        return
    if before == "eager":
        raise ValueError("model.attn_implementation=eager goes with trainer.engine=stock alone; use auto or sdpa.")
    name, ordinary = f"{PREFIX}{before}", ALL_ATTENTION_FUNCTIONS[before]

    def attention(
        module: nn.Module, query: Any, key: Any, value: Any, mask: Any, layout: Layout | None = None, **kwargs: Any
    ) -> Any:
        if layout is None:
            return ordinary(module, query, key, value, mask, **kwargs)
        return shared_prefix_attention(query[0], key[0], value[0], layout, kwargs["scaling"])[None], None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    config._attn_implementation = name


def shared_prefix_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float
) -> torch.Tensor:
    """softmax(scale Q K^T + mask) V over the two halves of a packed line.

    Args:
        query: (heads, T, D); key and value: (key heads, T, D), rotated already. Key heads may be fewer (GQA).

    Returns:
        (T, heads, D).
    """
    query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    key, value = key[layout.sources], value[layout.sources]
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or varlen_attn is None:
        return padded(query, key, value, layout, scale)
    causal: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}  # aligned at the bottom right
    if query.shape[1] != key.shape[1] and "enable_gqa" in signature(varlen_attn).parameters:
        causal["enable_gqa"] = True
    cu_lengths = layout.cu_queries, layout.cu_sources
    return varlen_attn(query, key, value, *cu_lengths, layout.max_queries, layout.max_sources, **causal)


def padded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float) -> torch.Tensor:
    """The same with SDPA on padded copies, one call per half, for any device and dtype.

    Args:
        query: (T, Q, D); key and value: (S, K, D), the tokens `layout.sources`.

    Returns:
        (T, Q, D).
    """
    gqa: Any = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    middle = layout.middle
    (there, back), (there_second, back_second), keys = layout.padded
    q, k, v = (part[:middle][there].transpose(1, 2) for part in (query, key, value))  # (B, heads, max_first, D)
    first = F.scaled_dot_product_attention(q, k, v, is_causal=True, **gqa)
    second_rows = query[middle:][there_second], key[middle:][keys], value[middle:][keys]
    q, k, v = (part.transpose(1, 2) for part in second_rows)
    second = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.second_mask, **gqa)
    return torch.cat([rows.transpose(1, 2).flatten(0, 1)[way] for rows, way in ((first, back), (second, back_second))])

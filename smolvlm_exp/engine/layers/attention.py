"""Attention over packed answers that share their prompts (packing.py), and within the vision tower's tiles.

A packed batch is two sets of sequences: causal over each [P C]; and the queries of [p R] over the keys [P before p, p
R], causal from the bottom right. Both see what they would see if every answer had its prompt to itself. PyTorch's
kernels do it on a GPU: flash attention in 16 bits (arXiv 2307.08691), on Ampere and newer, else its memory-efficient
attention (2112.05682); SDPA elsewhere, on padded copies of a packed batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from smolvlm_exp.utils.gpu import has

PREFIX = "shared_prefix_"
Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # queries, keys and values, or their gradients
MASKS = (0, 2)  # memory-efficient attention's numbers: none; causal from the bottom right
State = tuple[Any, ...]  # what a kernel needs for its backward pass besides its inputs and its result


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
    copies: int

    @classmethod
    def of(cls, packed: Mapping[str, Any]) -> "Layout":
        return cls(**{field.name: packed[field.name] for field in fields(cls)})

    @cached_property
    def keys(self) -> int:
        """S, of both halves."""
        return self.middle + len(self.keys_at)

    @cached_property
    def sources(self) -> torch.Tensor:
        """(S,) the token of each key: the first half's in order, then `keys_at`."""
        return torch.cat((torch.arange(self.middle, device=self.keys_at.device), self.keys_at))

    @cached_property
    def slots(self) -> torch.Tensor:
        """(1 + copies, T) int32, a token's places in `sources`, -1 where it has fewer: its own, then the second half's.

        A prompt's tokens are keys of the second half once for each answer but the first.
        """
        keys, order = self.keys_at.sort(stable=True)
        places = torch.arange(len(keys), device=keys.device)
        copy = places - torch.searchsorted(keys, keys)  # which of its token's occurrences a key is
        slots = torch.full((1 + self.copies, self.tokens), -1, dtype=torch.int32, device=keys.device)
        slots[0, : self.middle] = torch.arange(self.middle, device=keys.device)
        slots[1 + copy, keys] = (order + self.middle).int()
        return slots

    @cached_property
    def sequences(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Where B + S sequences begin, (B + S + 1,) int32, in the T tokens and in `sources`; the longest of each."""
        cu_queries = torch.cat((self.cu_first, self.cu_second[1:] + self.middle))
        cu_sources = torch.cat((self.cu_first, self.cu_keys[1:] + self.middle))
        return cu_queries, cu_sources, max(self.max_first, self.max_second), max(self.max_first, self.max_keys)

    @cached_property
    def padded(self) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """`padding` of the first half and of the second half's queries; (S, max_keys) places of the latter's keys."""
        first = padding(self.cu_first, self.max_first, self.middle)
        second = padding(self.cu_second, self.max_second, self.tokens - self.middle)
        return first, second, padding(self.cu_keys, self.max_keys, len(self.keys_at))[0]

    @cached_property
    def second_mask(self) -> torch.Tensor:
        """(S, 1, max_second, max_keys), true where a query of [p R] attends to a key."""
        queries, keys = self.cu_second.diff()[:, None, None], self.cu_keys.diff()[:, None, None]
        i = torch.arange(self.max_second, device=keys.device)[None, :, None]
        j = torch.arange(self.max_keys, device=keys.device)[None, None, :]
        return ((j <= i + keys - queries) & (j < keys))[:, None]


def padding(offsets: torch.Tensor, longest: int, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """From a line of `total` tokens, sequences from `offsets` (B + 1,) on, to a padded table and back; no device sync.

    Returns:
        (B, longest) places in the line, past a sequence's end its last token's; (total,) places in the flattened table.
    """
    lengths = offsets.diff()
    steps = torch.arange(longest, device=offsets.device)
    there = offsets[:-1, None] + torch.minimum(steps[None], lengths[:, None] - 1)
    rows = torch.arange(len(lengths), device=offsets.device).repeat_interleave(lengths, output_size=total)
    back = torch.arange(total, device=offsets.device) - offsets[rows] + rows * longest
    return there, back


def use_shared_prefix(text_model: nn.Module) -> None:
    """Let `text_model` attend over packed batches when it gets a layout, and as before when it does not.

    Raises:
        ValueError: its attention is `eager`, which has no registered function to fall back on.
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
    """softmax(scale Q K^T + mask) V over a packed batch, for autograd.

    Args:
        query: (heads, T, D); key and value: (key heads, T, D), rotated already. Key heads may be fewer (GQA).

    Returns:
        (T, heads, D).
    """
    query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    return attend((query, key[layout.sources], value[layout.sources]), layout, scale)[0]


def attend(inputs: Qkv, layout: Layout | None, scale: float) -> tuple[torch.Tensor, State]:
    """Both halves of a packed batch at once, B + S sequences, each causal from the bottom right; or tiles.

    Args:
        inputs: (T, Q, D) queries; (S, K, D) keys and values, the tokens `layout.sources`; K may be smaller (GQA).
        layout: None: within each tile every patch to every patch, all (n, patches, heads, D).

    Returns:
        The result, in the queries' shape, and what `attend_backward` needs.
    """
    query = inputs[0]
    if not query.is_cuda:
        if torch.is_grad_enabled():
            return sdpa(inputs, layout, scale), ()
        state = sdpa_graph(inputs, layout, scale)  # a CPU has room for it, and little time to compute it again
        return state[0].detach(), state
    if not uses_flash(query):
        return efficient(inputs, layout, scale)
    if layout is None and has_cudnn_attention(query.device.index):
        heads_first = (part.transpose(1, 2) for part in inputs)
        out, *state, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *heads_first, None, True, 0.0, False, False, scale=scale
        )
        return out.transpose(1, 2), tuple(state)
    out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
        *inputs, *sequences(query, layout), 0.0, layout is not None, False, scale=scale
    )
    return out, (lse, rng, unused)


def attend_backward(
    dout: torch.Tensor, inputs: Qkv, out: torch.Tensor, state: State, layout: Layout | None, scale: float
) -> Qkv:
    """Gradients for `inputs`."""
    query = inputs[0]
    if not query.is_cuda:
        graph, *leaves = state
        dquery, dkey, dvalue = torch.autograd.grad(graph, leaves, dout)
        return dquery, dkey, dvalue
    if not uses_flash(query):
        return efficient_backward(dout, inputs, out, state, layout, scale)
    if layout is None and has_cudnn_attention(query.device.index):
        lse, cu_q, cu_k, max_q, max_k, seed, offset = state
        heads_first = (part.transpose(1, 2) for part in (dout, *inputs, out))
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *heads_first, lse, seed, offset, None, cu_q, cu_k, max_q, max_k, 0.0, False, scale=scale
        )
        dquery, dkey, dvalue = (grad.transpose(1, 2) for grad in grads)
        return dquery, dkey, dvalue
    lse, rng, unused = state
    return torch.ops.aten._flash_attention_backward(
        dout, *inputs, out, lse, *sequences(query, layout), 0.0, layout is not None, rng, unused, scale=scale
    )


def efficient(inputs: Qkv, layout: Layout | None, scale: float) -> tuple[torch.Tensor, State]:
    """`attend` by torch's memory-efficient attention."""
    cu_queries, cu_keys, *longest = sequences(inputs[0], layout)
    out, *state = torch.ops.aten._efficient_attention_forward(
        *batched(inputs, layout), None, cu_queries, cu_keys, *longest, 0.0, MASKS[layout is not None], True, scale=scale
    )
    return out.view_as(inputs[0]), tuple(state)


def efficient_backward(
    dout: torch.Tensor, inputs: Qkv, out: torch.Tensor, state: State, layout: Layout | None, scale: float
) -> Qkv:
    """Of `efficient`; the gradient of a key that several heads share is their sum."""
    query, key, _ = inputs
    cu_queries, cu_keys, *_ = sequences(query, layout)
    lse, seed, offset, *longest = state
    dquery, *others, _ = torch.ops.aten._efficient_attention_backward(
        dout.view(-1, *query.shape[-3:]), *batched(inputs, layout), None, out.view(-1, *query.shape[-3:]),
        cu_queries, cu_keys, *longest, lse, 0.0, seed, offset, MASKS[layout is not None], False, scale=scale,
    )  # fmt: skip
    if layout is None:
        dkey, dvalue = others
    else:
        dkey, dvalue = (d.unflatten(2, (key.shape[1], -1)).sum(3)[0] for d in others)
    return dquery.view_as(query), dkey, dvalue


def batched(inputs: Qkv, layout: Layout | None) -> Qkv:
    """A packed batch as one row with a key for each query head, as memory-efficient attention wants it."""
    if layout is None:
        return inputs
    query, key, value = inputs
    shared = query.shape[1] // key.shape[1]
    return query[None], key.repeat_interleave(shared, 1)[None], value.repeat_interleave(shared, 1)[None]


def uses_flash(query: torch.Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and has("flash")


@cache
def has_cudnn_attention(device: int) -> bool:
    """Hopper and newer: there it is half as fast again as flash attention 2 (27 x 104 tiles: 3.9 against 6.0 ms)."""
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)


def sequences(query: torch.Tensor, layout: Layout | None) -> tuple[Any, Any, int, int]:
    """What flash attention needs to know of the sequences; tiles are a batch of equal ones."""
    return layout.sequences if layout else (None, None, query.shape[1], query.shape[1])


def sdpa_graph(inputs: Qkv, layout: Layout | None, scale: float) -> tuple[torch.Tensor, ...]:
    """`sdpa`'s result with its graph, and the inputs that the graph begins with, whatever is recorded around it."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in inputs)
    with torch.enable_grad():
        return sdpa((query, key, value), layout, scale), query, key, value


def sdpa(inputs: Qkv, layout: Layout | None, scale: float) -> torch.Tensor:
    """`attend`'s result on a CPU; a packed batch on padded copies, one call per half."""
    if layout is None:
        q, k, v = (part.transpose(1, 2) for part in inputs)
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    query, key, value = inputs
    gqa: Any = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    middle = layout.middle
    (there, back), (there_second, back_second), keys = layout.padded
    q, k, v = (part[:middle][there].transpose(1, 2) for part in (query, key, value))  # (B, heads, max_first, D)
    first = F.scaled_dot_product_attention(q, k, v, is_causal=True, **gqa)
    second_rows = query[middle:][there_second], key[middle:][keys], value[middle:][keys]
    q, k, v = (part.transpose(1, 2) for part in second_rows)
    second = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.second_mask, **gqa)
    return torch.cat([rows.transpose(1, 2).flatten(0, 1)[way] for rows, way in ((first, back), (second, back_second))])

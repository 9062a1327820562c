"""Attention with its own backward pass, for layers that are one autograd function (decoder.py, encoder.py).

On a GPU in 16 bits these are PyTorch's flash-attention kernels, called as they are, so that their results are computed
once; elsewhere SDPA, computed again for the backward pass.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from smolvlm_exp.engine.attention import Layout, padding

State = tuple[Any, ...]  # what a kernel needs for its backward pass beside its inputs and its result


def flash(query: torch.Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float
) -> tuple[torch.Tensor, State]:
    """Both halves of a packed line at once: 2B sequences, each causal from the bottom right.

    Args:
        query: (T, Q, D); key and value: (S, K, D), the tokens `layout.sources`; K may be smaller (GQA).

    Returns:
        (T, Q, D), and what `attend_backward` wants.
    """
    if not flash(query):
        return padded_twice(query, key, value, layout, scale), ()
    lengths = max(layout.max_first, layout.max_second), max(layout.max_first, layout.max_keys)
    out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, layout.cu_queries, layout.cu_sources, *lengths, 0.0, True, False, scale=scale
    )
    return out, (lse, rng, unused)


def attend_backward(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    state: State,
    layout: Layout,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for query, key and value."""
    if not flash(query):
        with torch.enable_grad():
            q, k, v = (each.detach().requires_grad_() for each in (query, key, value))
            again = padded_twice(q, k, v, layout, scale)
        dquery, dkey, dvalue = torch.autograd.grad(again, (q, k, v), dout)
        return dquery, dkey, dvalue
    lse, rng, unused = state
    lengths = max(layout.max_first, layout.max_second), max(layout.max_first, layout.max_keys)
    return torch.ops.aten._flash_attention_backward(
        dout, query, key, value, out, lse, layout.cu_queries, layout.cu_sources, *lengths, 0.0, True, rng, unused,
        scale=scale,
    )  # fmt: skip


def padded_twice(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float
) -> torch.Tensor:
    """The same with SDPA on padded copies, one call a half, for any device and dtype."""
    gqa: dict[str, Any] = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    middle = layout.middle
    there, back = layout.padded_first
    q, k, v = (each[:middle][there].transpose(1, 2) for each in (query, key, value))  # (B, heads, max_first, D)
    first = F.scaled_dot_product_attention(q, k, v, is_causal=True, **gqa)
    there, back_second = layout.padded_second
    keys_there, _ = padding(layout.cu_keys, layout.max_keys)
    second_rows = query[middle:][there], key[middle:][keys_there], value[middle:][keys_there]
    q, k, v = (each.transpose(1, 2) for each in second_rows)
    second = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.second_mask, **gqa)
    halves = (first, back), (second, back_second)
    return torch.cat([half.transpose(1, 2).flatten(0, 1)[way] for half, way in halves])


def attend_tiles(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, State]:
    """Within each tile, every patch to every patch; all (n, patches, heads, D)."""
    if not flash(query):
        return sdpa(query, key, value, scale), ()
    if cudnn(query):
        heads_first = (each.transpose(1, 2) for each in (query, key, value))
        out, *state, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *heads_first, None, True, 0.0, False, False, scale=scale
        )
        return out.transpose(1, 2), tuple(state)
    patches = query.shape[1]
    out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, None, None, patches, patches, 0.0, False, False, scale=scale
    )
    return out, (lse, rng, unused)


def attend_tiles_backward(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    state: State,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for query, key and value of `attend_tiles`."""
    if not flash(query):
        with torch.enable_grad():
            q, k, v = (each.detach().requires_grad_() for each in (query, key, value))
            again = sdpa(q, k, v, scale)
        dquery, dkey, dvalue = torch.autograd.grad(again, (q, k, v), dout)
        return dquery, dkey, dvalue
    if cudnn(query):
        lse, cu_q, cu_k, max_q, max_k, seed, offset = state
        heads_first = (each.transpose(1, 2) for each in (dout, query, key, value, out))
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *heads_first, lse, seed, offset, None, cu_q, cu_k, max_q, max_k, 0.0, False, scale=scale
        )
        dquery, dkey, dvalue = (grad.transpose(1, 2) for grad in grads)
        return dquery, dkey, dvalue
    lse, rng, unused = state
    patches = query.shape[1]
    return torch.ops.aten._flash_attention_backward(
        dout, query, key, value, out, lse, None, None, patches, patches, 0.0, False, rng, unused, scale=scale
    )


@cache
def has_cudnn_attention(device: int) -> bool:
    """Hopper and newer: there it is half as fast again as flash attention 2 (27 x 104 tiles: 3.9 against 6.0 ms)."""
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)


def cudnn(query: torch.Tensor) -> bool:
    return has_cudnn_attention(query.device.index)


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

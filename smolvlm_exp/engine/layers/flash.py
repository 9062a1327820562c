"""Attention with its own backward pass, for layers that are one autograd function (text_layer.py, vision_layer.py).

On a GPU in 16 bits these are PyTorch's flash-attention kernels, called as they are, so that their results are computed
once; elsewhere SDPA, computed again for the backward pass.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from smolvlm_exp.engine.layers.shared_prefix_attention import Layout, padded

State = tuple[Any, ...]  # what a kernel needs for its backward pass beside its inputs and its result


def uses_flash(query: torch.Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout | None, scale: float
) -> tuple[torch.Tensor, State]:
    """Both halves of a packed line at once, 2B sequences, each causal from the bottom right; or tiles.

    Args:
        query: (T, Q, D); key and value: (S, K, D), the tokens `layout.sources`; K may be smaller (GQA).
        layout: None: within each tile every patch to every patch, all (n, patches, heads, D).

    Returns:
        The result, in `query`'s shape, and what `attend_backward` wants.
    """
    if not uses_flash(query):
        return reference_attention(query, key, value, layout, scale), ()
    if layout is None and has_cudnn_attention(query.device.index):
        heads_first = (part.transpose(1, 2) for part in (query, key, value))
        out, *state, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *heads_first, None, True, 0.0, False, False, scale=scale
        )
        return out.transpose(1, 2), tuple(state)
    out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, *sequences(query, layout), 0.0, layout is not None, False, scale=scale
    )
    return out, (lse, rng, unused)


def attend_backward(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    state: State,
    layout: Layout | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for query, key and value."""
    if not uses_flash(query):
        with torch.enable_grad():
            query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
            again = reference_attention(query, key, value, layout, scale)
        dquery, dkey, dvalue = torch.autograd.grad(again, (query, key, value), dout)
        return dquery, dkey, dvalue
    if layout is None and has_cudnn_attention(query.device.index):
        lse, cu_q, cu_k, max_q, max_k, seed, offset = state
        heads_first = (part.transpose(1, 2) for part in (dout, query, key, value, out))
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *heads_first, lse, seed, offset, None, cu_q, cu_k, max_q, max_k, 0.0, False, scale=scale
        )
        dquery, dkey, dvalue = (grad.transpose(1, 2) for grad in grads)
        return dquery, dkey, dvalue
    lse, rng, unused = state
    return torch.ops.aten._flash_attention_backward(
        dout, query, key, value, out, lse, *sequences(query, layout), 0.0, layout is not None, rng, unused, scale=scale
    )


def sequences(query: torch.Tensor, layout: Layout | None) -> tuple[Any, Any, int, int]:
    """Where sequences of queries and of keys begin, and the longest of each; tiles are a batch of equal ones."""
    if layout is None:
        return None, None, query.shape[1], query.shape[1]
    return layout.cu_queries, layout.cu_sources, layout.max_queries, layout.max_sources


@cache
def has_cudnn_attention(device: int) -> bool:
    """Hopper and newer: there it is half as fast again as flash attention 2 (27 x 104 tiles: 3.9 against 6.0 ms)."""
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)


def reference_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout | None, scale: float
) -> torch.Tensor:
    if layout is not None:
        return padded(query, key, value, layout, scale)
    q, k, v = (part.transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

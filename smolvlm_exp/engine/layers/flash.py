"""Attention with its own backward pass, for layers that are one autograd function (text_layer.py, vision_layer.py).

On a GPU in 16 bits these are PyTorch's flash-attention kernels, called as they are, so that their results are computed
once; elsewhere SDPA, computed again for the backward pass.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from smolvlm_exp.engine.layers.shared_prefix_attention import Layout, padded

State = tuple[Any, ...]  # what a kernel needs for its backward pass beside its inputs and its result


def uses_flash(query: torch.Tensor) -> bool:
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
    if not uses_flash(query):
        return padded(query, key, value, layout, scale), ()
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
    if not uses_flash(query):
        return recompute_gradients(partial(padded, layout=layout, scale=scale), dout, query, key, value)
    lse, rng, unused = state
    lengths = max(layout.max_first, layout.max_second), max(layout.max_first, layout.max_keys)
    return torch.ops.aten._flash_attention_backward(
        dout, query, key, value, out, lse, layout.cu_queries, layout.cu_sources, *lengths, 0.0, True, rng, unused,
        scale=scale,
    )  # fmt: skip


def attend_tiles(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, State]:
    """Within each tile, every patch to every patch; all (n, patches, heads, D)."""
    if not uses_flash(query):
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
    if not uses_flash(query):
        return recompute_gradients(partial(sdpa, scale=scale), dout, query, key, value)
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


def recompute_gradients(
    function: Callable[..., torch.Tensor], dout: torch.Tensor, *inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for query, key and value of `function`, which is computed again."""
    with torch.enable_grad():
        query, key, value = (each.detach().requires_grad_() for each in inputs)
        again = function(query, key, value)
    dquery, dkey, dvalue = torch.autograd.grad(again, (query, key, value), dout)
    return dquery, dkey, dvalue

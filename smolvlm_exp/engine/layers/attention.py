"""Attention over packed answers that share their prompts (packing.py), and within the vision tower's tiles.

A packed batch is two sets of sequences: causal over each [P C]; and the queries of [p R] over the keys [P before p, p
R], causal from the bottom right. Both see what they would see if every answer had its prompt to itself. A GPU has
kernels for it (gpu_attention.py); elsewhere it is SDPA, on padded copies of a packed batch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from smolvlm_exp.engine.layers.gpu_attention import Qkv, State, kernel_for
from smolvlm_exp.engine.layers.layout import Layout

PREFIX = "shared_prefix_"


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
    if query.is_cuda:
        forward, _ = kernel_for(query, layout, differentiable=torch.is_grad_enabled())
        return forward(inputs, layout, scale)
    if torch.is_grad_enabled():
        return sdpa(inputs, layout, scale), ()
    state = sdpa_graph(inputs, layout, scale)  # a CPU has room for it, and little time to compute it again
    return state[0].detach(), state


def attend_backward(
    dout: torch.Tensor, inputs: Qkv, out: torch.Tensor, state: State, layout: Layout | None, scale: float
) -> Qkv:
    """Gradients for `inputs`, of what `attend` gave without recording gradients."""
    query = inputs[0]
    if query.is_cuda:
        _, backward = kernel_for(query, layout)
        return backward(dout, inputs, out, state, layout, scale)
    graph, *leaves = state
    dquery, dkey, dvalue = torch.autograd.grad(graph, leaves, dout)
    return dquery, dkey, dvalue


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
    q, k, v = (take(part[:middle], there).transpose(1, 2) for part in (query, key, value))  # (B, heads, max_first, D)
    first = F.scaled_dot_product_attention(q, k, v, is_causal=True, **gqa)
    second_rows = take(query[middle:], there_second), take(key[middle:], keys), take(value[middle:], keys)
    q, k, v = (part.transpose(1, 2) for part in second_rows)
    second = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.second_mask, **gqa)
    halves = (first, back), (second, back_second)
    return torch.cat([take(rows.transpose(1, 2).flatten(0, 1), way) for rows, way in halves])


def take(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x[rows], with a gradient that a CPU adds up faster than indexing's."""
    return x.index_select(0, rows.flatten()).unflatten(0, rows.shape)

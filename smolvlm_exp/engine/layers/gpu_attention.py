"""A GPU's attention and its backward pass: flash attention where it can be had, else memory-efficient attention.

Each kernel is a pair of functions with the arguments of attention.py's `attend` and `attend_backward`.
"""

from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from smolvlm_exp.engine.layers.layout import Layout
from smolvlm_exp.utils.gpu import has

Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # queries, keys and values, or their gradients
State = tuple[Any, ...]  # what a kernel needs for its backward pass besides its inputs and its result
Forward = Callable[[Qkv, Layout | None, float], tuple[torch.Tensor, State]]
Backward = Callable[[torch.Tensor, Qkv, torch.Tensor, State, Layout | None, float], Qkv]
MASKS = (0, 2)  # memory-efficient attention's numbers: none; causal from the bottom right


def kernel_for(query: torch.Tensor, layout: Layout | None, differentiable: bool = False) -> tuple[Forward, Backward]:
    """The fastest that this GPU and dtype have; `differentiable`: by autograd too."""
    if query.dtype not in (torch.bfloat16, torch.float16) or not has("flash"):
        return efficient, efficient_backward
    major, _ = capability(query.device.index)
    if major == 9 and not differentiable and has_flash_4():  # on newer ones it was never tried
        return flash_4, flash_4_backward
    if major >= 9 and layout is None and torch.backends.cudnn.is_available():
        return cudnn, cudnn_backward
    return flash, flash_backward


@cache
def capability(device: int) -> tuple[int, int]:
    """9.0 is Hopper's."""
    return torch.cuda.get_device_capability(device)


@cache
def has_flash_4() -> bool:
    try:
        return bool(version("flash-attn-4"))
    except PackageNotFoundError:
        return False


def sequences(query: torch.Tensor, layout: Layout | None) -> tuple[Any, Any, int, int]:
    """What a kernel needs to know of the sequences; tiles are a batch of equal ones."""
    return layout.sequences if layout else (None, None, query.shape[1], query.shape[1])


def flash(inputs: Qkv, layout: Layout | None, scale: float) -> tuple[torch.Tensor, State]:
    """PyTorch's flash attention 2 (arXiv 2307.08691)."""
    out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
        *inputs, *sequences(inputs[0], layout), 0.0, layout is not None, False, scale=scale
    )
    return out, (lse, rng, unused)


def flash_backward(
    dout: torch.Tensor, inputs: Qkv, out: torch.Tensor, state: State, layout: Layout | None, scale: float
) -> Qkv:
    lse, rng, unused = state
    return torch.ops.aten._flash_attention_backward(
        dout, *inputs, out, lse, *sequences(inputs[0], layout), 0.0, layout is not None, rng, unused, scale=scale
    )


def cudnn(inputs: Qkv, layout: Layout | None, scale: float) -> tuple[torch.Tensor, State]:
    """cuDNN's, within tiles: on Hopper half as fast again as flash attention 2 (27 x 104 tiles: 3.9 against 6.0 ms)."""
    heads_first = (part.transpose(1, 2) for part in inputs)
    out, *state, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, None, True, 0.0, False, False, scale=scale
    )
    return out.transpose(1, 2), tuple(state)


def cudnn_backward(
    dout: torch.Tensor, inputs: Qkv, out: torch.Tensor, state: State, layout: Layout | None, scale: float
) -> Qkv:
    lse, cu_q, cu_k, max_q, max_k, seed, offset = state
    heads_first = (part.transpose(1, 2) for part in (dout, *inputs, out))
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *heads_first, lse, seed, offset, None, cu_q, cu_k, max_q, max_k, 0.0, False, scale=scale
    )
    dquery, dkey, dvalue = (grad.transpose(1, 2) for grad in grads)
    return dquery, dkey, dvalue


def flash_4(inputs: Qkv, layout: Layout | None, scale: float) -> tuple[torch.Tensor, State]:
    """Flash attention 4, where the package flash-attn-4 is installed: made for Hopper (arXiv 2407.08608) and newer.

    A packed batch at SmolVLM-Instruct's shape, 16 pairs, on an H200: 0.48 ms a layer against 0.87, backward 1.19
    against 2.08; 104 tiles 0.81 against cuDNN's 0.88, backward 2.18 against 2.84.
    """
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(
        *inputs, **lengths(inputs[0], layout), softmax_scale=scale, causal=layout is not None, return_lse=True
    )
    return out, (lse,)


def flash_4_backward(
    dout: torch.Tensor, inputs: Qkv, out: torch.Tensor, state: State, layout: Layout | None, scale: float
) -> Qkv:
    from flash_attn.cute.interface import _flash_attn_bwd

    dquery, dkey, dvalue, *_ = _flash_attn_bwd(
        *inputs, out, dout, *state, **lengths(inputs[0], layout), softmax_scale=scale, causal=layout is not None
    )
    return dquery, dkey, dvalue


def lengths(query: torch.Tensor, layout: Layout | None) -> dict[str, Any]:
    """`sequences` by flash-attn-4's names, which need none for tiles."""
    if layout is None:
        return {}
    cu_queries, cu_keys, longest_queries, longest_keys = layout.sequences
    return {
        "cu_seqlens_q": cu_queries, "cu_seqlens_k": cu_keys,
        "max_seqlen_q": longest_queries, "max_seqlen_k": longest_keys,
    }  # fmt: skip


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

"""The weight of a frozen linear layer, whatever it is stored in: 16 or 32 bits, 8 bits, 4 bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from smolvlm_exp.engine.layers.ops import kernels, uses_kernels

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None  # type: ignore[assignment]


def is_4bit(layer: Any) -> bool:
    return bnb is not None and isinstance(layer, bnb.nn.Linear4bit)


def is_8bit(layer: Any) -> bool:
    return bnb is not None and isinstance(layer, bnb.nn.Linear8bitLt)


def is_quantised(layer: Any) -> bool:
    return is_4bit(layer) or is_8bit(layer)


@contextmanager
def keeping_scales(model: torch.nn.Module) -> Iterator[None]:
    """For PEFT adding an adapter: on a CPU its DoRA loses the scales of 8-bit weights."""
    layers: list[Any] = [layer for layer in model.modules() if is_8bit(layer)]
    states = [(layer, layer.state.CB, layer.state.SCB) for layer in layers if layer.state.CB is not None]
    yield
    for layer, codes, scales in states:
        layer.state.CB, layer.state.SCB = codes, scales
        layer.weight.CB = layer.weight.SCB = None


def frozen_weight(layer: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The layer's (out, in) weight in `dtype` (None: as it is stored, or was before quantising)."""
    weight: Any = layer.weight
    if is_4bit(layer):
        state = weight.quant_state
        return unpack_4bit(layer, torch.empty(state.shape, dtype=dtype or state.dtype, device=weight.device))
    if is_8bit(layer):
        codes, scales = (weight.CB, weight.SCB) if layer.state.CB is None else (layer.state.CB, layer.state.SCB)
        codes = weight.data if codes is None else codes
        return (codes.float() * scales.float()[:, None] / 127).to(dtype or torch.float32)
    return weight if dtype is None else weight.to(dtype)


def unpack_4bit(layer: Any, out: torch.Tensor) -> torch.Tensor:
    """Write the layer's weight into `out`, (out, in); bit for bit what bitsandbytes would write."""
    weight: Any = layer.weight
    state = weight.quant_state
    if uses_kernels(out) and kernels.unpacks(state):
        return kernels.unpack_4bit(weight.data, state, out)
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    weights = torch.ops.bitsandbytes.dequantize_4bit(
        weight.data, absmax.float(), state.blocksize, state.quant_type, state.shape, out.dtype
    )
    return out.copy_(weights)


def product_f32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, summed and returned in float32."""
    if left.is_cuda and left.dtype is not torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()

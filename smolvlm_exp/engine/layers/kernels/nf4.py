"""nf4 weights unpacked."""

from typing import Any

import torch
import triton
import triton.language as tl


def unpacks(state: Any) -> bool:
    """Whether `unpack_4bit` knows how these 4-bit weights are stored."""
    return state.quant_type == "nf4" and (not state.nested or state.state2.blocksize == 256)


def unpack_4bit(packed: torch.Tensor, state: Any, out: torch.Tensor) -> torch.Tensor:
    """nf4, double quantisation undone on the way (arXiv 2305.14314, eq. 6): one read of 4 bits, one write.

    `out` may be a part of wider rows.
    """
    count, columns, groups = out.numel(), out.shape[1], 64
    nested = state.state2 if state.nested else None
    _unpack_4bit[(triton.cdiv(count, groups * state.blocksize),)](
        packed, state.code, state.absmax,
        nested.code if nested else state.code, nested.absmax if nested else state.absmax,
        state.offset if nested else state.absmax, out, count // 2, out.stride(0) - columns,
        COLUMNS=columns, HALF=state.blocksize // 2, GROUPS=groups, NESTED=nested is not None,
        WIDER=out.stride(0) != columns, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit
def _unpack_4bit(
    packed, code, absmax, nested_code, nested_absmax, offset, out, count, gap, COLUMNS: tl.constexpr,
    HALF: tl.constexpr, GROUPS: tl.constexpr, NESTED: tl.constexpr, WIDER: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * HALF + tl.arange(0, HALF)[None, :]
    inside = at < count
    there = group * HALF < count
    byte = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    if NESTED:
        index = tl.load(absmax + group, mask=there, other=0).to(tl.int32)
        largest = tl.load(nested_code + index) * tl.load(nested_absmax + group // 256, mask=there, other=0.0)
        largest = largest + tl.load(offset)
    else:
        largest = tl.load(absmax + group, mask=there, other=0.0)
    high = tl.load(code + (byte >> 4)) * largest[:, None]
    low = tl.load(code + (byte & 15)) * largest[:, None]
    both = tl.reshape(tl.join(high, low), (GROUPS, 2 * HALF))
    to = group[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    place = to.to(tl.int64)
    if WIDER:
        place += (to // COLUMNS).to(tl.int64) * gap
    tl.store(out + place, both.to(out.dtype.element_ty), mask=to < 2 * count)

"""Gains, biases and sums with the residual."""

# mypy: disable-error-code="index"
# What @triton.jit compiles is not quite Python.

import torch
import triton
import triton.language as tl

from smolvlm_exp.engine.layers.kernels.launch_grid import BM, BN, WIDE, Gain, split_rows


def affine(h: torch.Tensor | None, u: torch.Tensor, gain: Gain, bias: torch.Tensor | None) -> torch.Tensor:
    """h + gain * u + bias, or without h."""
    rows, columns = u.shape
    out = u.new_empty(rows, columns)
    _scaled[(rows, triton.cdiv(columns, WIDE))](
        out if h is None else h, u, u.stride(0), out if gain is None else gain, out if bias is None else bias, out,
        columns, ADD=h is not None, GAIN=gain is not None, BIAS=bias is not None, BLOCK=WIDE,
    )  # fmt: skip
    return out


@triton.jit
def _scaled(
    h, u, u_row, gain, bias, out, columns,
    ADD: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    value = tl.load(u + row * u_row + at, mask=inside, other=0.0).to(tl.float32)
    if GAIN:
        value = value * tl.load(gain + at, mask=inside, other=0.0)
    if BIAS:
        value += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(h + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + at, value.to(out.dtype.element_ty), mask=inside)


def scale_backward_parts(
    grads: tuple[torch.Tensor, ...], u: torch.Tensor | None, gain: Gain, tail: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    parts = [grad.contiguous() for grad in grads]
    width = parts[0].numel() // (rows := len(parts[0]) if u is None else u.shape[0])
    columns = width * len(parts)
    du = parts[0].new_empty(rows, columns + tail)
    chunks, size = split_rows(rows, columns)
    partial = torch.empty(chunks, columns, dtype=torch.float32, device=du.device) if gain is not None else None
    _scale_backward[(chunks, triton.cdiv(width, BN), len(parts))](
        parts[0], parts[len(parts) // 2], parts[-1], du if u is None else u, 0 if u is None else u.stride(0),
        du if gain is None else gain, du, columns + tail, du if partial is None else partial,
        rows, width, columns, size, GAIN=gain is not None, BM=BM, BN=BN,
    )  # fmt: skip
    return du, None if partial is None else partial.sum(0)


@triton.jit
def _scale_backward(
    first, second, third, u, u_row, gain, du, du_row, partial, rows, width, columns, size,
    GAIN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    chunk, part = tl.program_id(0), tl.program_id(2)
    dy = first
    if part == 1:
        dy = second
    if part == 2:
        dy = third
    own = tl.program_id(1) * BN + tl.arange(0, BN)  # columns of the part
    at = part * width + own  # columns of u
    g = tl.load(gain + at, mask=own < width, other=0.0) if GAIN else 1.0
    total = tl.zeros((BN,), tl.float32)
    for start in range(0, size, BM):
        row = (chunk * size + start + tl.arange(0, BM)).to(tl.int64)
        inside = (row < rows)[:, None] & (own < width)[None, :]
        d = tl.load(dy + row[:, None] * width + own[None, :], mask=inside, other=0.0).to(tl.float32)
        if GAIN:
            value = tl.load(u + row[:, None] * u_row + at[None, :], mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(d * value, axis=0)
            d = d * g[None, :]
        tl.store(du + row[:, None] * du_row + at[None, :], d.to(du.dtype.element_ty), mask=inside)
    if GAIN:
        tl.store(partial + chunk * columns + at, total, mask=own < width)

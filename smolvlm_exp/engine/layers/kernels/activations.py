"""SwiGLU, which has no bias, and GELU; a backward pass writes the result over `da` once `again`."""

# mypy: disable-error-code="index"
# What @triton.jit compiles is not quite Python.

from typing import Any

import torch
import triton
import triton.language as tl

from smolvlm_exp.engine.layers.kernels.launch_grid import BM, BN, WIDE, Gain, split_rows


def with_spare(u: torch.Tensor, tail: int) -> torch.Tensor:
    """`u` and `tail` columns that are allocated beside it."""
    assert u.stride(0) >= u.shape[1] + tail
    return u.as_strided((u.shape[0], u.shape[1] + tail), u.stride())


def swiglu(u: torch.Tensor, gain: Gain, tail: int) -> torch.Tensor:
    return forward(_swiglu, u, gain, None, u.shape[1] // 2, tail)


def gelu(u: torch.Tensor, gain: Gain, bias: torch.Tensor | None, tail: int) -> torch.Tensor:
    return forward(_gelu, u, gain, bias, u.shape[1], tail)


def forward(
    kernel: Any, u: torch.Tensor, gain: Gain, bias: torch.Tensor | None, columns: int, tail: int
) -> torch.Tensor:
    out = u.new_empty(u.shape[0], columns + tail)
    kernel[(u.shape[0], triton.cdiv(columns, WIDE))](
        u, u.stride(0), out if gain is None else gain, out if bias is None else bias, out, columns + tail, columns,
        GAIN=gain is not None, BIAS=bias is not None, BLOCK=WIDE,
    )  # fmt: skip
    return out


def swiglu_backward(
    da: torch.Tensor, u: torch.Tensor, gain: Gain, tail: int, again: bool, over: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    return backward(_swiglu_backward, da, u, gain, None, tail, again, over)


def gelu_backward(
    da: torch.Tensor, u: torch.Tensor, gain: Gain, bias: torch.Tensor | None, tail: int, again: bool, over: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    return backward(_gelu_backward, da, u, gain, bias, tail, again, over)


def backward(
    kernel: Any, da: torch.Tensor, u: torch.Tensor, gain: Gain, bias: torch.Tensor | None, tail: int,
    again: bool, over: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    (rows, columns), width = da.shape, u.shape[1]
    du = with_spare(u, tail) if over else da.new_empty(rows, width + tail)  # each number is read, then written
    chunks, size = split_rows(rows, columns)
    partial = torch.empty(chunks, width, dtype=torch.float32, device=da.device) if gain is not None else None
    kernel[(chunks, triton.cdiv(columns, BN))](
        da, u, u.stride(0), da if gain is None else gain, da if bias is None else bias, du, du.stride(0),
        da if partial is None else partial, rows, columns, size,
        GAIN=gain is not None, BIAS=bias is not None, AGAIN=again, BM=BM, BN=BN,
    )  # fmt: skip
    return du, da if again else None, None if partial is None else partial.sum(0)


@triton.jit
def _swiglu(u, u_row, gain, bias, out, out_row, columns, GAIN: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    gate = tl.load(u + row * u_row + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(u + row * u_row + columns + at, mask=inside, other=0.0).to(tl.float32)
    if GAIN:
        gate = gate * tl.load(gain + at, mask=inside, other=0.0)
        up = up * tl.load(gain + columns + at, mask=inside, other=0.0)
    tl.store(out + row * out_row + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    da, u, u_row, gain, bias, du, du_row, partial, rows, columns, size,
    GAIN: tl.constexpr, BIAS: tl.constexpr, AGAIN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    at = tl.program_id(1) * BN + tl.arange(0, BN)
    gain_gate = tl.load(gain + at, mask=at < columns, other=0.0) if GAIN else 1.0
    gain_up = tl.load(gain + columns + at, mask=at < columns, other=0.0) if GAIN else 1.0
    total_gate, total_up = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    for start in range(0, size, BM):
        row = (chunk * size + start + tl.arange(0, BM)).to(tl.int64)
        inside = (row < rows)[:, None] & (at < columns)[None, :]
        here, there = row[:, None] * columns + at[None, :], row[:, None] * u_row + at[None, :]
        d = tl.load(da + here, mask=inside, other=0.0).to(tl.float32)
        raw_gate = tl.load(u + there, mask=inside, other=0.0).to(tl.float32)
        raw_up = tl.load(u + there + columns, mask=inside, other=0.0).to(tl.float32)
        gate, up = raw_gate, raw_up
        if GAIN:
            gate, up = gate * gain_gate[None, :], up * gain_up[None, :]
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        dgate, dup = d * up * (sigmoid + silu * (1 - sigmoid)), d * silu
        if AGAIN:
            tl.store(da + here, (silu * up).to(da.dtype.element_ty), mask=inside)
        if GAIN:
            total_gate += tl.sum(dgate * raw_gate, axis=0)
            total_up += tl.sum(dup * raw_up, axis=0)
            dgate, dup = dgate * gain_gate[None, :], dup * gain_up[None, :]
        to = row[:, None] * du_row + at[None, :]
        tl.store(du + to, dgate.to(du.dtype.element_ty), mask=inside)
        tl.store(du + to + columns, dup.to(du.dtype.element_ty), mask=inside)
    if GAIN:
        tl.store(partial + chunk * 2 * columns + at, total_gate, mask=at < columns)
        tl.store(partial + chunk * 2 * columns + columns + at, total_up, mask=at < columns)


@triton.jit
def _tanh_of_gelu(x):
    return 2 * tl.sigmoid(2 * 0.7978845608028654 * (x + 0.044715 * x * x * x)) - 1


@triton.jit
def _gelu(u, u_row, gain, bias, out, out_row, columns, GAIN: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(u + row * u_row + at, mask=inside, other=0.0).to(tl.float32)
    if GAIN:
        x = x * tl.load(gain + at, mask=inside, other=0.0)
    if BIAS:
        x += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    value = 0.5 * x * (1 + _tanh_of_gelu(x))
    tl.store(out + row * out_row + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_backward(
    da, u, u_row, gain, bias, du, du_row, partial, rows, columns, size,
    GAIN: tl.constexpr, BIAS: tl.constexpr, AGAIN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    at = tl.program_id(1) * BN + tl.arange(0, BN)
    g = tl.load(gain + at, mask=at < columns, other=0.0) if GAIN else 1.0
    shift = tl.load(bias + at, mask=at < columns, other=0.0).to(tl.float32) if BIAS else 0.0
    total = tl.zeros((BN,), tl.float32)
    for start in range(0, size, BM):
        row = (chunk * size + start + tl.arange(0, BM)).to(tl.int64)
        inside = (row < rows)[:, None] & (at < columns)[None, :]
        here = row[:, None] * columns + at[None, :]
        d = tl.load(da + here, mask=inside, other=0.0).to(tl.float32)
        raw = tl.load(u + row[:, None] * u_row + at[None, :], mask=inside, other=0.0).to(tl.float32)
        x = raw
        if GAIN:
            x = x * g[None, :]
        if BIAS:
            x = x + shift[None, :]
        t = _tanh_of_gelu(x)
        slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
        if AGAIN:
            tl.store(da + here, (0.5 * x * (1 + t)).to(da.dtype.element_ty), mask=inside)
        d = d * slope
        if GAIN:
            total += tl.sum(d * raw, axis=0)
            d = d * g[None, :]
        tl.store(du + row[:, None] * du_row + at[None, :], d.to(du.dtype.element_ty), mask=inside)
    if GAIN:
        tl.store(partial + chunk * columns + at, total, mask=at < columns)

"""Elementwise kernels: gains, biases, sums with the residual, SwiGLU (which has no bias) and GELU."""

import torch
import triton
import triton.language as tl

Gain = torch.Tensor | None
WIDE = 1024  # columns a program of a plain elementwise kernel takes
WIDEST = 4096  # where it takes whole rows if they are no wider
BM, BN = 8, 128  # rows and columns of a tile where columns are summed on the way: measured on an H200
PROGRAMS = 4096  # about how many programs such a kernel is split into: several for each multiprocessor


def split_rows(rows: int, columns: int, high: int, wide: int) -> tuple[int, int]:
    """(chunks, rows per chunk) for a kernel over tiles, `high` x `wide`, that sums columns within each chunk."""
    chunks = min(max(PROGRAMS // triton.cdiv(columns, wide), 1), triton.cdiv(rows, high))
    size = triton.cdiv(triton.cdiv(rows, chunks), high) * high
    return triton.cdiv(rows, size), size


def affine(h: torch.Tensor | None, u: torch.Tensor, gain: Gain, bias: torch.Tensor | None) -> torch.Tensor:
    """h + gain * u + bias, or without h."""
    rows, columns = u.shape
    out, block = u.new_empty(rows, columns), min(triton.next_power_of_2(columns), WIDEST)
    _scaled[(rows, triton.cdiv(columns, block))](
        out if h is None else h, u, u.stride(0), out if gain is None else gain, out if bias is None else bias, out,
        columns, ADD=h is not None, GAIN=gain is not None, BIAS=bias is not None, BLOCK=block, num_warps=8,
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


def scale_backward(
    grads: list[torch.Tensor], u: torch.Tensor | None, gain: Gain, tail: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    parts = [grad.contiguous() for grad in grads]
    rows, width = parts[0].shape
    columns = width * len(parts)
    du = parts[0].new_empty(rows, columns + tail)
    chunks, size = split_rows(rows, columns, BM, BN)
    partial = torch.empty(chunks, columns, dtype=torch.float32, device=du.device) if gain is not None else None
    _scale_backward[(chunks, triton.cdiv(width, BN), len(parts))](
        parts[0], parts[len(parts) // 2], parts[-1], du if u is None else u, 0 if u is None else u.stride(0),
        du if gain is None else gain, du, columns + tail, du if partial is None else partial,
        rows, width, columns, size, GAIN=gain is not None, BM=BM, BN=BN, num_warps=2,
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
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, size, BM):
        row = (chunk * size + start + tl.arange(0, BM)).to(tl.int64)
        inside = (row < rows)[:, None] & (own < width)[None, :]
        d = tl.load(dy + row[:, None] * width + own[None, :], mask=inside, other=0.0).to(tl.float32)
        if GAIN:
            value = tl.load(u + row[:, None] * u_row + at[None, :], mask=inside, other=0.0).to(tl.float32)
            total += d * value
            d = d * g[None, :]
        tl.store(du + row[:, None] * du_row + at[None, :], d.to(du.dtype.element_ty), mask=inside)
    if GAIN:
        tl.store(partial + chunk * columns + at, tl.sum(total, axis=0), mask=own < width)


def activation(u: torch.Tensor, gain: Gain, bias: torch.Tensor | None, tail: int, gated: bool) -> torch.Tensor:
    rows, columns = u.shape[0], u.shape[1] // (1 + gated)
    out = u.new_empty(rows, columns + tail)
    _activation[(rows, triton.cdiv(columns, WIDE))](
        u, u.stride(0), out if gain is None else gain, out if bias is None else bias, out, columns + tail, columns,
        GATED=gated, GAIN=gain is not None, BIAS=bias is not None, BLOCK=WIDE,
    )  # fmt: skip
    return out


@triton.jit
def _activation(
    u, u_row, gain, bias, out, out_row, columns,
    GATED: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(u + row * u_row + at, mask=inside, other=0.0).to(tl.float32)
    if GAIN:
        x = x * tl.load(gain + at, mask=inside, other=0.0)
    if BIAS:
        x += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(u + row * u_row + columns + at, mask=inside, other=0.0).to(tl.float32)
        if GAIN:
            up = up * tl.load(gain + columns + at, mask=inside, other=0.0)
        value = x * tl.sigmoid(x) * up
    else:
        value = 0.5 * x * (1 + _tanh_of_gelu(x))
    tl.store(out + row * out_row + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _tanh_of_gelu(x):
    return 2 * tl.sigmoid(2 * 0.7978845608028654 * (x + 0.044715 * x * x * x)) - 1


def activation_backward(
    da: torch.Tensor, u: torch.Tensor, gain: Gain, bias: torch.Tensor | None, tail: int,
    with_result: bool, in_place: bool, gated: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """The result goes into `da` if `with_result`, the gradient into `u` and `tail` spare columns if `in_place`."""
    (rows, columns), width = da.shape, u.shape[1]
    if in_place:  # each number is read, then written
        assert u.stride(0) >= width + tail
        du = u.as_strided((rows, width + tail), u.stride())
    else:
        du = da.new_empty(rows, width + tail)
    chunks, size = split_rows(rows, columns, BM, BN)
    partial = torch.empty(chunks, width, dtype=torch.float32, device=da.device) if gain is not None else None
    _activation_backward[(chunks, triton.cdiv(columns, BN))](
        da, u, u.stride(0), da if gain is None else gain, da if bias is None else bias, du, du.stride(0),
        da if partial is None else partial, rows, columns, size,
        GATED=gated, GAIN=gain is not None, BIAS=bias is not None, RESULT=with_result, BM=BM, BN=BN,
    )  # fmt: skip
    return du, da if with_result else None, None if partial is None else partial.sum(0)


@triton.jit
def _activation_backward(
    da, u, u_row, gain, bias, du, du_row, partial, rows, columns, size, GATED: tl.constexpr, GAIN: tl.constexpr,
    BIAS: tl.constexpr, RESULT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    at = tl.program_id(1) * BN + tl.arange(0, BN)
    g = tl.load(gain + at, mask=at < columns, other=0.0) if GAIN else 1.0
    g_up = tl.load(gain + columns + at, mask=at < columns, other=0.0) if GAIN and GATED else 1.0
    shift = tl.load(bias + at, mask=at < columns, other=0.0).to(tl.float32) if BIAS else 0.0
    total, total_up = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for start in range(0, size, BM):
        row = (chunk * size + start + tl.arange(0, BM)).to(tl.int64)
        inside = (row < rows)[:, None] & (at < columns)[None, :]
        here, there = row[:, None] * columns + at[None, :], row[:, None] * u_row + at[None, :]
        to = row[:, None] * du_row + at[None, :]
        d = tl.load(da + here, mask=inside, other=0.0).to(tl.float32)
        raw = tl.load(u + there, mask=inside, other=0.0).to(tl.float32)
        x = raw
        if GAIN:
            x = x * g[None, :]
        if BIAS:
            x = x + shift[None, :]
        if GATED:
            raw_up = tl.load(u + there + columns, mask=inside, other=0.0).to(tl.float32)
            up = raw_up
            if GAIN:
                up = up * g_up[None, :]
            sigmoid = tl.sigmoid(x)
            silu = x * sigmoid
            value = silu * up
            dx, dup = d * up * (sigmoid + silu * (1 - sigmoid)), d * silu
            if GAIN:
                total_up += dup * raw_up
                dup = dup * g_up[None, :]
            tl.store(du + to + columns, dup.to(du.dtype.element_ty), mask=inside)
        else:
            t = _tanh_of_gelu(x)
            value = 0.5 * x * (1 + t)
            dx = d * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x))
        if RESULT:
            tl.store(da + here, value.to(da.dtype.element_ty), mask=inside)
        if GAIN:
            total += dx * raw
            dx = dx * g[None, :]
        tl.store(du + to, dx.to(du.dtype.element_ty), mask=inside)
    if GAIN:
        tl.store(partial + chunk * (1 + GATED) * columns + at, tl.sum(total, axis=0), mask=at < columns)
        if GATED:
            tl.store(partial + (chunk * 2 + 1) * columns + at, tl.sum(total_up, axis=0), mask=at < columns)

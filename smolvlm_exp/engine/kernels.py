"""elementwise.py and weights.py in Triton: one pass over memory for what lies between two matrix products.

Importing this fails where there is no Triton, and the torch code there serves. Rows are a token's; a matrix may be a
part of a wider one, so each kernel takes the distance between rows beside the pointer. Sums are float32.
"""

from typing import Any

# mypy: disable-error-code="index"
# What @triton.jit compiles is not quite Python.
import torch
import triton
import triton.language as tl

Gain = torch.Tensor | None
WIDE = 1024  # columns a program of a plain elementwise kernel takes
BM, BN = 32, 128  # rows and columns of a tile where columns are summed on the way: measured on an H100
ROTARY_BM = 16  # the same for a head's columns
PROGRAMS = 2048  # about how many programs such a kernel is split into: several for each multiprocessor


def split_rows(rows: int, columns: int) -> tuple[int, int]:
    """(chunks, rows a chunk) for a kernel over BM x BN tiles that sums columns within each chunk."""
    chunks = min(max(PROGRAMS // triton.cdiv(columns, BN), 1), triton.cdiv(rows, BM))
    size = triton.cdiv(triton.cdiv(rows, chunks), BM) * BM
    return triton.cdiv(rows, size), size


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


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, tail: int) -> torch.Tensor:
    return _norm(x, weight, None, eps, tail)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, tail: int) -> torch.Tensor:
    return _norm(x, weight, bias, eps, tail)


def _norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, tail: int) -> torch.Tensor:
    rows, columns = x.shape
    out = x.new_empty(rows, columns + tail)
    _norm_forward[(rows,)](
        x, weight, x if bias is None else bias, out, columns + tail, columns, eps,
        CENTRED=bias is not None, BLOCK=triton.next_power_of_2(columns),
    )  # fmt: skip
    return out


@triton.jit
def _norm_forward(x, weight, bias, out, out_row, columns, eps, CENTRED: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < columns
    value = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        value = tl.where(inside, value - tl.sum(value) / columns, 0.0)
    normal = value * tl.rsqrt(tl.sum(value * value) / columns + eps)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        normal = normal * w + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    else:
        normal = normal.to(out.dtype.element_ty).to(tl.float32) * w
    tl.store(out + row * out_row + at, normal.to(out.dtype.element_ty), mask=inside)


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor
) -> torch.Tensor:
    return _norm_gradient(dy, x, weight, eps, residual, centred=False)


def layer_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor
) -> torch.Tensor:
    return _norm_gradient(dy, x, weight, eps, residual, centred=True)


def _norm_gradient(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor, centred: bool
) -> torch.Tensor:
    out = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    _norm_backward[(x.shape[0],)](dy, x, weight, residual, out, x.shape[1], eps, CENTRED=centred, BLOCK=block)
    return out


@triton.jit
def _norm_backward(dy, x, weight, residual, out, columns, eps, CENTRED: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, here = at < columns, row * columns + at
    value = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        value = tl.where(inside, value - tl.sum(value) / columns, 0.0)
    scale = tl.rsqrt(tl.sum(value * value) / columns + eps)
    normal = value * scale
    inner = tl.load(dy + here, mask=inside, other=0.0).to(tl.float32)
    inner = inner * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    rest = normal * (tl.sum(inner * normal) / columns)
    if CENTRED:
        rest += tl.sum(inner) / columns
    total = tl.load(residual + here, mask=inside, other=0.0).to(tl.float32) + scale * (inner - rest)
    tl.store(out + here, total.to(out.dtype.element_ty), mask=inside)


def add(h: torch.Tensor, u: torch.Tensor, gain: Gain, bias: torch.Tensor | None) -> torch.Tensor:
    return _affine(h, u, gain, bias)


def scale(u: torch.Tensor, gain: Gain, bias: torch.Tensor | None) -> torch.Tensor:
    return _affine(None, u, gain, bias)


def _affine(h: torch.Tensor | None, u: torch.Tensor, gain: Gain, bias: torch.Tensor | None) -> torch.Tensor:
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


def scale_backward(
    dy: torch.Tensor, u: torch.Tensor | None, gain: Gain, tail: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return scale_backward_parts((dy,), u, gain, tail)


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


def swiglu(u: torch.Tensor, gain: Gain, tail: int) -> torch.Tensor:
    rows, columns = u.shape[0], u.shape[1] // 2
    out = u.new_empty(rows, columns + tail)
    _swiglu[(rows, triton.cdiv(columns, WIDE))](
        u, u.stride(0), out if gain is None else gain, out, columns + tail, columns, GAIN=gain is not None, BLOCK=WIDE
    )
    return out


@triton.jit
def _swiglu(u, u_row, gain, out, out_row, columns, GAIN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    gate = tl.load(u + row * u_row + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(u + row * u_row + columns + at, mask=inside, other=0.0).to(tl.float32)
    if GAIN:
        gate = gate * tl.load(gain + at, mask=inside, other=0.0)
        up = up * tl.load(gain + columns + at, mask=inside, other=0.0)
    tl.store(out + row * out_row + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


def swiglu_backward(
    da: torch.Tensor, u: torch.Tensor, gain: Gain, tail: int, again: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    rows, columns = da.shape
    du, inner = da.new_empty(rows, 2 * columns + tail), torch.empty_like(da) if again else None
    chunks, size = split_rows(rows, columns)
    partial = torch.empty(chunks, 2 * columns, dtype=torch.float32, device=da.device) if gain is not None else None
    _swiglu_backward[(chunks, triton.cdiv(columns, BN))](
        da, u, u.stride(0), da if gain is None else gain, du, 2 * columns + tail, da if inner is None else inner,
        da if partial is None else partial, rows, columns, size, GAIN=gain is not None, AGAIN=again, BM=BM, BN=BN,
    )  # fmt: skip
    return du, inner, None if partial is None else partial.sum(0)


@triton.jit
def _swiglu_backward(
    da, u, u_row, gain, du, du_row, inner, partial, rows, columns, size,
    GAIN: tl.constexpr, AGAIN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
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
            tl.store(inner + here, (silu * up).to(inner.dtype.element_ty), mask=inside)
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


def gelu(u: torch.Tensor, gain: Gain, bias: torch.Tensor | None, tail: int) -> torch.Tensor:
    rows, columns = u.shape
    out = u.new_empty(rows, columns + tail)
    _gelu[(rows, triton.cdiv(columns, WIDE))](
        u, u.stride(0), out if gain is None else gain, out if bias is None else bias, out, columns + tail, columns,
        GAIN=gain is not None, BIAS=bias is not None, BLOCK=WIDE,
    )  # fmt: skip
    return out


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


def gelu_backward(
    da: torch.Tensor, u: torch.Tensor, gain: Gain, bias: torch.Tensor | None, tail: int, again: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    rows, columns = da.shape
    du, inner = da.new_empty(rows, columns + tail), torch.empty_like(da) if again else None
    chunks, size = split_rows(rows, columns)
    partial = torch.empty(chunks, columns, dtype=torch.float32, device=da.device) if gain is not None else None
    _gelu_backward[(chunks, triton.cdiv(columns, BN))](
        da, u, u.stride(0), da if gain is None else gain, da if bias is None else bias, du, columns + tail,
        da if inner is None else inner, da if partial is None else partial, rows, columns, size,
        GAIN=gain is not None, BIAS=bias is not None, AGAIN=again, BM=BM, BN=BN,
    )  # fmt: skip
    return du, inner, None if partial is None else partial.sum(0)


@triton.jit
def _gelu_backward(
    da, u, u_row, gain, bias, du, du_row, inner, partial, rows, columns, size,
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
            tl.store(inner + here, (0.5 * x * (1 + t)).to(inner.dtype.element_ty), mask=inside)
        d = d * slope
        if GAIN:
            total += tl.sum(d * raw, axis=0)
            d = d * g[None, :]
        tl.store(du + row[:, None] * du_row + at[None, :], d.to(du.dtype.element_ty), mask=inside)
    if GAIN:
        tl.store(partial + chunk * columns + at, total, mask=at < columns)


def rotary(
    u: torch.Tensor, gain: Gain, cos: torch.Tensor, sin: torch.Tensor,
    slots: torch.Tensor, middle: int, sources: int, heads: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    tokens, (queries, keys), size = u.shape[0], heads, cos.shape[1]
    query = u.new_empty(tokens, queries, size)
    key, value = (u.new_empty(sources, keys, size) for _ in range(2))
    _rotary[(triton.cdiv(tokens, ROTARY_BM), queries + 2 * keys)](
        u, u.stride(0), query if gain is None else gain, cos, sin, slots, query, key, value, tokens, middle,
        QUERIES=queries, KEYS=keys, HALF=size // 2, GAIN=gain is not None, BM=ROTARY_BM,
    )  # fmt: skip
    return query, key, value


@triton.jit
def _rotary(
    u, u_row, gain, cos, sin, slots, query, key, value, tokens, middle,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr, GAIN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    head = tl.program_id(1)
    at = tl.arange(0, HALF)
    inside = (row < tokens)[:, None] & (at >= 0)[None, :]
    column = head * 2 * HALF + at
    first = tl.load(u + row[:, None] * u_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(u + row[:, None] * u_row + column[None, :] + HALF, mask=inside, other=0.0).to(tl.float32)
    if GAIN:
        first = first * tl.load(gain + column)[None, :]
        second = second * tl.load(gain + column + HALF)[None, :]
    if head < QUERIES + KEYS:
        angle = row[:, None] * 2 * HALF + at[None, :]
        c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
    kind = query.dtype.element_ty
    if head < QUERIES:
        to = query + (row[:, None] * QUERIES + head) * 2 * HALF + at[None, :]
        tl.store(to, first.to(kind), mask=inside)
        tl.store(to + HALF, second.to(kind), mask=inside)
    else:
        base, own = key, head - QUERIES
        if head >= QUERIES + KEYS:
            base, own = value, head - QUERIES - KEYS
        slot = tl.load(slots + row, mask=row < tokens, other=-1).to(tl.int64)
        early, late = inside & (row < middle)[:, None], inside & (slot >= 0)[:, None]
        to = base + (row[:, None] * KEYS + own) * 2 * HALF + at[None, :]
        tl.store(to, first.to(kind), mask=early)
        tl.store(to + HALF, second.to(kind), mask=early)
        to = base + (slot[:, None] * KEYS + own) * 2 * HALF + at[None, :]
        tl.store(to, first.to(kind), mask=late)
        tl.store(to + HALF, second.to(kind), mask=late)


def rotary_backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor], u: torch.Tensor, gain: Gain,
    cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor, middle: int, tail: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    dquery, dkey, dvalue = (grad.contiguous() for grad in grads)
    tokens, queries, size = dquery.shape
    keys, columns = dkey.shape[1], u.shape[1]
    du = u.new_empty(tokens, columns + tail)
    chunks, rows = split_rows(tokens, columns)
    partial = torch.empty(chunks, columns, dtype=torch.float32, device=u.device) if gain is not None else None
    _rotary_backward[(chunks, queries + 2 * keys)](
        dquery, dkey, dvalue, u, u.stride(0), du if gain is None else gain, cos, sin, slots,
        du, columns + tail, du if partial is None else partial, tokens, middle, rows,
        QUERIES=queries, KEYS=keys, HALF=size // 2, GAIN=gain is not None, BM=ROTARY_BM,
    )  # fmt: skip
    return du, None if partial is None else partial.sum(0)


@triton.jit
def _rotary_backward(
    dquery, dkey, dvalue, u, u_row, gain, cos, sin, slots, du, du_row, partial, tokens, middle, size,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr, GAIN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, HALF)
    column = head * 2 * HALF + at
    gain_first = tl.load(gain + column) if GAIN else 1.0
    gain_second = tl.load(gain + column + HALF) if GAIN else 1.0
    total_first, total_second = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    for start in range(0, size, BM):
        row = (chunk * size + start + tl.arange(0, BM)).to(tl.int64)
        inside = (row < tokens)[:, None] & (at >= 0)[None, :]
        if head < QUERIES:
            there = dquery + (row[:, None] * QUERIES + head) * 2 * HALF + at[None, :]
            first = tl.load(there, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(there + HALF, mask=inside, other=0.0).to(tl.float32)
        else:
            base, own = dkey, head - QUERIES
            if head >= QUERIES + KEYS:
                base, own = dvalue, head - QUERIES - KEYS
            slot = tl.load(slots + row, mask=row < tokens, other=-1).to(tl.int64)
            early, late = inside & (row < middle)[:, None], inside & (slot >= 0)[:, None]
            there = base + (row[:, None] * KEYS + own) * 2 * HALF + at[None, :]
            then = base + (slot[:, None] * KEYS + own) * 2 * HALF + at[None, :]
            first = tl.load(there, mask=early, other=0.0).to(tl.float32)
            first += tl.load(then, mask=late, other=0.0).to(tl.float32)
            second = tl.load(there + HALF, mask=early, other=0.0).to(tl.float32)
            second += tl.load(then + HALF, mask=late, other=0.0).to(tl.float32)
        if head < QUERIES + KEYS:
            angle = row[:, None] * 2 * HALF + at[None, :]
            c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
            turned = first * c + second * s
            second = second * c - first * s
            first = turned
        if GAIN:
            from_u = u + row[:, None] * u_row + column[None, :]
            total_first += tl.sum(first * tl.load(from_u, mask=inside, other=0.0).to(tl.float32), axis=0)
            total_second += tl.sum(second * tl.load(from_u + HALF, mask=inside, other=0.0).to(tl.float32), axis=0)
            first, second = first * gain_first[None, :], second * gain_second[None, :]
        to = du + row[:, None] * du_row + column[None, :]
        tl.store(to, first.to(du.dtype.element_ty), mask=inside)
        tl.store(to + HALF, second.to(du.dtype.element_ty), mask=inside)
    if GAIN:
        columns = (QUERIES + 2 * KEYS) * 2 * HALF
        tl.store(partial + chunk * columns + column, total_first)
        tl.store(partial + chunk * columns + column + HALF, total_second)

"""Rotary positions, gains included, from a product's columns to attention's queries, keys and values and back."""

import torch
import triton
import triton.language as tl

from smolvlm_exp.engine.layers.kernels.elementwise import Gain, split_rows

ROWS = 32  # of a tile, a head wide: measured on an H200


def rotary(
    u: torch.Tensor, gain: Gain, cos: torch.Tensor, sin: torch.Tensor,
    slots: torch.Tensor, sources: int, heads: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    tokens, (queries, keys), size = u.shape[0], heads, cos.shape[1]
    query = u.new_empty(tokens, queries, size)
    key, value = (u.new_empty(sources, keys, size) for _ in range(2))
    _rotary[(triton.cdiv(tokens, ROWS), queries + 2 * keys)](
        u, u.stride(0), query if gain is None else gain, cos, sin, slots, len(slots), query, key, value, tokens,
        QUERIES=queries, KEYS=keys, HALF=size // 2, GAIN=gain is not None, BM=ROWS, num_warps=2,
    )  # fmt: skip
    return query, key, value


@triton.jit
def _rotary(
    u, u_row, gain, cos, sin, slots, copies, query, key, value, tokens,
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
        for copy in range(copies):
            slot = tl.load(slots + copy * tokens + row, mask=row < tokens, other=-1).to(tl.int64)
            there = inside & (slot >= 0)[:, None]
            to = base + (slot[:, None] * KEYS + own) * 2 * HALF + at[None, :]
            tl.store(to, first.to(kind), mask=there)
            tl.store(to + HALF, second.to(kind), mask=there)


def rotary_backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor], u: torch.Tensor, gain: Gain,
    cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor, tail: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    dquery, dkey, dvalue = (grad.contiguous() for grad in grads)
    tokens, queries, size = dquery.shape
    keys, columns = dkey.shape[1], u.shape[1]
    du = u.new_empty(tokens, columns + tail)
    chunks, rows = split_rows(tokens, columns, ROWS, size)
    partial = torch.empty(chunks, columns, dtype=torch.float32, device=u.device) if gain is not None else None
    _rotary_backward[(chunks, queries + 2 * keys)](
        dquery, dkey, dvalue, u, u.stride(0), du if gain is None else gain, cos, sin, slots, len(slots),
        du, columns + tail, du if partial is None else partial, tokens, rows,
        QUERIES=queries, KEYS=keys, HALF=size // 2, GAIN=gain is not None, BM=ROWS, num_warps=2,
    )  # fmt: skip
    return du, None if partial is None else partial.sum(0)


@triton.jit
def _rotary_backward(
    dquery, dkey, dvalue, u, u_row, gain, cos, sin, slots, copies, du, du_row, partial, tokens, size,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr, GAIN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, HALF)
    column = head * 2 * HALF + at
    gain_first = tl.load(gain + column) if GAIN else 1.0
    gain_second = tl.load(gain + column + HALF) if GAIN else 1.0
    total_first, total_second = tl.zeros((BM, HALF), tl.float32), tl.zeros((BM, HALF), tl.float32)
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
            first, second = tl.zeros((BM, HALF), tl.float32), tl.zeros((BM, HALF), tl.float32)
            for copy in range(copies):
                slot = tl.load(slots + copy * tokens + row, mask=row < tokens, other=-1).to(tl.int64)
                late = inside & (slot >= 0)[:, None]
                then = base + (slot[:, None] * KEYS + own) * 2 * HALF + at[None, :]
                first += tl.load(then, mask=late, other=0.0).to(tl.float32)
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
            total_first += first * tl.load(from_u, mask=inside, other=0.0).to(tl.float32)
            total_second += second * tl.load(from_u + HALF, mask=inside, other=0.0).to(tl.float32)
            first, second = first * gain_first[None, :], second * gain_second[None, :]
        to = du + row[:, None] * du_row + column[None, :]
        tl.store(to, first.to(du.dtype.element_ty), mask=inside)
        tl.store(to + HALF, second.to(du.dtype.element_ty), mask=inside)
    if GAIN:
        columns = (QUERIES + 2 * KEYS) * 2 * HALF
        tl.store(partial + chunk * columns + column, tl.sum(total_first, axis=0))
        tl.store(partial + chunk * columns + column + HALF, tl.sum(total_second, axis=0))

"""A step's attention in Triton: two launches a layer, from the product's columns to attention's result.

The first attends from all rows of a group to a part of its prompt, so that the prompt's keys are read once for all of
them; the second rotates and stores the row's new key and value, attends to the row's own keys, and puts the parts
together by their log-sum-exps (as in FlashDecoding).
"""

# mypy: disable-error-code="index"
# What @triton.jit compiles is not quite Python.

import torch
import triton
import triton.language as tl

PART = 128  # keys of a prompt that one program looks at
OWN = 64  # own keys that a program loads at a time


def step_attention(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, prompt: torch.Tensor, own: torch.Tensor,
    lengths: torch.Tensor, at: torch.Tensor, scale: float, heads: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    """What batch.py's `step_attention` says; see there."""
    (queries, keys), rows, (groups, longest) = heads, len(at), (prompt.shape[1], prompt.shape[3])
    size, answers, parts = cos.shape[1], rows // groups, triton.cdiv(longest, PART)
    partial = qkv.new_empty(rows, queries, parts, size, dtype=torch.float32)
    lse = qkv.new_empty(rows, queries, parts, dtype=torch.float32)
    result = qkv.new_empty(rows, queries * size)
    shape = {"QUERIES": queries, "KEYS": keys, "HALF": size // 2}
    _prompt_part[(groups * keys, parts)](
        qkv, cos, sin, prompt[0], prompt[1], lengths, partial, lse, scale, longest,
        **shape, ANSWERS=answers, M=max(16, triton.next_power_of_2(answers * queries // keys)), PART=PART,
    )  # fmt: skip
    _own_part[(rows * keys,)](
        qkv, cos, sin, own[0], own[1], at, partial, lse, result, scale, own.shape[3],
        **shape, PARTS=parts, PADDED=triton.next_power_of_2(parts), OWN=OWN,
    )  # fmt: skip
    return result


@triton.jit
def _rotated(base, cos, sin, angle, at, valid, HALF: tl.constexpr):
    """Both halves of heads, turned; `base` and `angle` point at their first columns."""
    first = tl.load(base + at, mask=valid, other=0.0).to(tl.float32)
    second = tl.load(base + at + HALF, mask=valid, other=0.0).to(tl.float32)
    c = tl.load(cos + angle + at, mask=valid, other=0.0).to(tl.float32)
    s = tl.load(sin + angle + at, mask=valid, other=0.0).to(tl.float32)
    return first * c - second * s, second * c + first * s


@triton.jit
def _prompt_part(
    qkv, cos, sin, keys, values, lengths, partial, lse, scale, longest,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr, ANSWERS: tl.constexpr,
    M: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    group, head = (tl.program_id(0) // KEYS).to(tl.int64), tl.program_id(0) % KEYS
    part, parts = tl.program_id(1), tl.num_programs(1)
    each: tl.constexpr = QUERIES // KEYS
    member = tl.arange(0, M)  # a row of the group and one of the queries that share this key head
    valid = member < ANSWERS * each
    row, query = group * ANSWERS + member // each, head * each + member % each
    place = (row * QUERIES + query) * parts + part
    length = tl.load(lengths + group)
    if part * PART >= length:
        tl.store(lse + place, tl.full((M,), float("-inf"), tl.float32), mask=valid)
        return
    at = tl.arange(0, HALF)[None, :]
    columns = 2 * HALF * (QUERIES + 2 * KEYS)
    base, angle = qkv + (row * columns + query * 2 * HALF)[:, None], (row * 2 * HALF)[:, None]
    first, second = _rotated(base, cos, sin, angle, at, valid[:, None] & (at >= 0), HALF)
    kind = keys.dtype.element_ty
    offset = part * PART + tl.arange(0, PART)
    there = (offset < length)[:, None] & (at >= 0)
    key = keys + ((group * KEYS + head) * longest + offset)[:, None] * 2 * HALF + at
    value = values + ((group * KEYS + head) * longest + offset)[:, None] * 2 * HALF + at
    scores = tl.dot(first.to(kind), tl.trans(tl.load(key, mask=there, other=0.0)), input_precision="ieee")
    scores += tl.dot(second.to(kind), tl.trans(tl.load(key + HALF, mask=there, other=0.0)), input_precision="ieee")
    scores = tl.where((offset < length)[None, :], scores * scale, float("-inf"))
    top = tl.max(scores, 1)
    weights = tl.exp(scores - top[:, None])
    total = tl.sum(weights, 1)
    weights = (weights / total[:, None]).to(kind)
    to = partial + place[:, None] * 2 * HALF + at
    left = tl.dot(weights, tl.load(value, mask=there, other=0.0), input_precision="ieee")
    right = tl.dot(weights, tl.load(value + HALF, mask=there, other=0.0), input_precision="ieee")
    tl.store(to, left, mask=valid[:, None] & (at >= 0))
    tl.store(to + HALF, right, mask=valid[:, None] & (at >= 0))
    tl.store(lse + place, top + tl.log(total), mask=valid)


@triton.jit
def _own_part(
    qkv, cos, sin, keys, values, positions, partial, lse, result, scale, width,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr,
    OWN: tl.constexpr,
):  # fmt: skip
    row, head = (tl.program_id(0) // KEYS).to(tl.int64), tl.program_id(0) % KEYS
    each: tl.constexpr = QUERIES // KEYS
    size: tl.constexpr = 2 * HALF
    position = tl.load(positions + row)
    at = tl.arange(0, HALF)
    valid = at >= 0
    base = qkv + row * size * (QUERIES + 2 * KEYS)
    kind = keys.dtype.element_ty
    own_keys = keys + (row * KEYS + head) * width * size
    own_values = values + (row * KEYS + head) * width * size
    new_first, new_second = _rotated(base + (QUERIES + head) * size, cos, sin, row * size, at, valid, HALF)
    new_first, new_second = new_first.to(kind), new_second.to(kind)
    value_at = base + (QUERIES + KEYS + head) * size + at
    new_left, new_right = tl.load(value_at), tl.load(value_at + HALF)
    tl.store(own_keys + position * size + at, new_first)
    tl.store(own_keys + position * size + HALF + at, new_second)
    tl.store(own_values + position * size + at, new_left)
    tl.store(own_values + position * size + HALF + at, new_right)
    for j in tl.static_range(each):
        query = head * each + j
        first, second = _rotated(base + query * size, cos, sin, row * size, at, valid, HALF)
        first, second = first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)
        # The new token itself is where the running softmax begins.
        top = tl.sum(first * new_first.to(tl.float32) + second * new_second.to(tl.float32), 0) * scale
        total = 1.0
        left, right = new_left.to(tl.float32), new_right.to(tl.float32)
        for start in range(0, position, OWN):
            offset = start + tl.arange(0, OWN)
            there = (offset < position)[:, None] & valid[None, :]
            key = own_keys + offset[:, None] * size + at[None, :]
            value = own_values + offset[:, None] * size + at[None, :]
            scores = tl.sum(tl.load(key, mask=there, other=0.0).to(tl.float32) * first[None, :], 1)
            scores += tl.sum(tl.load(key + HALF, mask=there, other=0.0).to(tl.float32) * second[None, :], 1)
            scores = tl.where(offset < position, scores * scale, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 0))
            shrink, weights = tl.exp(top - higher), tl.exp(scores - higher)
            total = total * shrink + tl.sum(weights, 0)
            left = left * shrink + tl.sum(tl.load(value, mask=there, other=0.0).to(tl.float32) * weights[:, None], 0)
            right = right * shrink + tl.sum(
                tl.load(value + HALF, mask=there, other=0.0).to(tl.float32) * weights[:, None], 0
            )
            top = higher
        parts = tl.arange(0, PADDED)
        place = (row * QUERIES + query) * PARTS + parts
        sums = tl.load(lse + place, mask=parts < PARTS, other=float("-inf"))
        higher = tl.maximum(top, tl.max(sums, 0))
        shrink, shares = tl.exp(top - higher), tl.exp(sums - higher)
        known = (sums > float("-inf"))[:, None] & valid[None, :]
        of_prompt = partial + place[:, None] * size + at[None, :]
        left = left * shrink + tl.sum(tl.load(of_prompt, mask=known, other=0.0) * shares[:, None], 0)
        right = right * shrink + tl.sum(tl.load(of_prompt + HALF, mask=known, other=0.0) * shares[:, None], 0)
        total = total * shrink + tl.sum(shares, 0)
        to = result + row * QUERIES * size + query * size + at
        tl.store(to, (left / total).to(result.dtype.element_ty))
        tl.store(to + HALF, (right / total).to(result.dtype.element_ty))

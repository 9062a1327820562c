"""RMSNorm and LayerNorm, a row a program."""

import torch
import triton
import triton.language as tl


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, tail: int) -> torch.Tensor:
    """LayerNorm; without a bias RMSNorm."""
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


def norm_backward(
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

"""What happens between a layer's matrix products, forward and backward: norms, rotary positions, SwiGLU, GELU, gains.

Each function has one meaning and two ways: Triton kernels on a GPU that has them (kernels/), and the torch code here,
which is also what the kernels are tested against. All sums are float32; results have the inputs' dtype.

A *product* (linear.py) is one matrix multiplication for several linear layers and their adapters; `u` is its (T, N)
result. A *gain* is DoRA's magnitude / norm, float32 (N,), or None where it is 1. `tail` asks for a result with that
many columns to spare, which the caller fills. In a backward function `du` is the gradient for u, and the gain's own
gradient `sum_t dy_t * u_t` comes back as float32 (N,), None without a gain.
"""

import torch
import torch.nn.functional as F

from smolvlm_exp.engine.layers.gpu_attention import Qkv
from smolvlm_exp.engine.layers.layout import Layout
from smolvlm_exp.utils.gpu import has

try:
    from smolvlm_exp.engine.layers import kernels
except ImportError:  # no Triton
    kernels = None  # type: ignore[assignment]

Gain = torch.Tensor | None


def uses_kernels(x: torch.Tensor) -> bool:
    return kernels is not None and x.is_cuda and has("triton")


def with_tail(x: torch.Tensor, tail: int) -> torch.Tensor:
    """(T, N) -> (T, N + tail), the last columns not yet written."""
    return x if tail == 0 else torch.cat((x, x.new_empty(x.shape[0], tail)), dim=1)


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, tail: int = 0) -> torch.Tensor:
    """LayerNorm (arXiv 1607.06450, eq. 4), or RMSNorm without a bias (1910.07467, eq. 4); (T, H) -> (T, H + tail)."""
    if uses_kernels(x):
        return kernels.norm(x, weight, bias, eps, tail)
    if bias is not None:
        return with_tail(F.layer_norm(x, (x.shape[-1],), weight, bias, eps), tail)
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return with_tail((x.float() * scale).to(x.dtype) * weight, tail)


def norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor, centred: bool
) -> torch.Tensor:
    """residual + the gradient for x of `norm`, given its result's gradient `dy`; all (T, H); `centred`: LayerNorm."""
    if uses_kernels(x):
        return kernels.norm_backward(dy, x, weight, eps, residual, centred)
    value, inner = x.float(), dy.float() * weight.float()
    if centred:
        value = value - value.mean(-1, keepdim=True)
    scale = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    normal = value * scale
    rest = normal * (inner * normal).mean(-1, keepdim=True)
    if centred:
        inner = inner - inner.mean(-1, keepdim=True)
    return (residual.float() + scale * (inner - rest)).to(x.dtype)


def affine(h: torch.Tensor | None, u: torch.Tensor, gain: Gain, bias: torch.Tensor | None) -> torch.Tensor:
    """h + gain * u + bias, or without h; (T, N), contiguous."""
    if uses_kernels(u):
        return kernels.affine(h, u, gain, bias)
    value = scaled(u, gain, bias)
    return (value if h is None else h.float() + value).to(u.dtype).contiguous()


def scaled(u: torch.Tensor, gain: Gain, bias: torch.Tensor | None) -> torch.Tensor:
    """gain * u + bias in float32."""
    value = u.float() if gain is None else gain * u.float()
    return value if bias is None else value + bias.float()


def scale_backward(
    grads: list[torch.Tensor], u: torch.Tensor | None, gain: Gain, tail: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of gain * u: du, (T, N + tail), and the gain's gradient; `grads`, each (T, N / parts), lie side by side."""
    if gain is None and tail == 0 and len(grads) == 1:
        return grads[0], None
    if uses_kernels(grads[0]):
        return kernels.scale_backward(grads, u, gain, tail)
    return gain_backward(torch.cat(grads, dim=1), u, gain, tail)


def gain_backward(
    dy: torch.Tensor, u: torch.Tensor | None, gain: Gain, tail: int, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`scale_backward` of one gradient in torch; `dtype` is du's, where `dy` is float32 still."""
    du = dy.new_empty(dy.shape[0], dy.shape[1] + tail, dtype=dtype)
    if gain is None:
        du[:, : dy.shape[1]] = dy
        return du, None
    assert u is not None
    torch.mul(dy.float(), gain, out=du[:, : dy.shape[1]])
    return du, (dy.float() * u.float()).sum(0)


def activation(u: torch.Tensor, gain: Gain, bias: torch.Tensor | None, tail: int, gated: bool) -> torch.Tensor:
    """Of x = gain * u + bias, (T, I + tail): SwiGLU where `gated`, else GELU's tanh form (arXiv 1606.08415, sec. 2).

    SwiGLU is silu(gate) * up (2002.05202, eq. 6), where x = [gate | up], (T, 2I), without a bias.
    """
    if uses_kernels(u):
        return kernels.activation(u, gain, bias, tail, gated)
    x = scaled(u, gain, bias)
    if gated:
        gate, up = x.chunk(2, dim=-1)
        return with_tail((F.silu(gate) * up).to(u.dtype), tail)
    return with_tail(F.gelu(x, approximate="tanh").to(u.dtype), tail)


def activation_backward(
    da: torch.Tensor,
    u: torch.Tensor,
    gain: Gain,
    bias: torch.Tensor | None,
    tail: int,
    with_result: bool,
    in_place: bool,
    gated: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Of `activation`: du, `u`'s shape and `tail` columns; its result (T, I) if `with_result`; the gain's gradient.

    It may write over `da`; `in_place` over `u` too, which then has `tail` columns to spare.
    """
    if uses_kernels(da):
        return kernels.activation_backward(da, u, gain, bias, tail, with_result, in_place, gated)
    x = scaled(u, gain, bias)
    if gated:
        gate, up = x.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu, dx = gate * sigmoid, torch.empty_like(x)
        result = silu * up
        dgate, dup = dx.chunk(2, dim=-1)
        torch.mul(da.float(), silu, out=dup)
        torch.mul(da.float(), up, out=dgate).mul_(sigmoid + silu * (1 - sigmoid))
    else:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            result = F.gelu(x, approximate="tanh")
        (dx,) = torch.autograd.grad(result, x, da.float())
    du, dgain = gain_backward(dx, u, gain, tail, da.dtype)
    return du, result.detach().to(da.dtype) if with_result else None, dgain


def rotary(
    u: torch.Tensor, gain: Gain, cos: torch.Tensor, sin: torch.Tensor, layout: Layout, heads: tuple[int, int]
) -> Qkv:
    """Queries, keys and values for attention over `layout`, gains applied, queries and keys rotated (RoPE, 2104.09864).

    Args:
        u: (T, (Q + 2K) D) = [queries | keys | values]; cos and sin: (T, D), halves alike; heads: (Q, K).

    Returns:
        (T, Q, D) queries; (S, K, D) keys and values, as `layout.sources` lists them.
    """
    if uses_kernels(u):
        return kernels.rotary(u, gain, cos, sin, layout.slots, layout.keys, heads)
    query, key, value = split_heads(scaled(u, gain, None), heads)
    query, key = (rotate(part, cos, sin).to(u.dtype) for part in (query, key))
    return query, key[layout.sources], value.to(u.dtype)[layout.sources]


def rotary_backward(
    grads: Qkv, u: torch.Tensor, gain: Gain, cos: torch.Tensor, sin: torch.Tensor, layout: Layout, tail: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of `rotary`: du (T, (Q + 2K) D + tail), the gain's gradient."""
    dquery, dkey, dvalue = grads
    if uses_kernels(u):
        return kernels.rotary_backward(grads, u, gain, cos, sin, layout.slots, tail)
    tokens = dquery.shape[0]
    dkey, dvalue = (
        torch.zeros(tokens, *d.shape[1:], dtype=torch.float32, device=d.device).index_add_(0, layout.sources, d.float())
        for d in (dkey, dvalue)
    )
    dquery, dkey = (rotate(d.float(), cos, -sin) for d in (dquery, dkey))  # a rotation's transpose turns it back
    dy = torch.cat([d.reshape(tokens, -1) for d in (dquery, dkey, dvalue)], dim=-1)
    return gain_backward(dy, u, gain, tail, u.dtype)


def split_heads(u: torch.Tensor, heads: tuple[int, int]) -> Qkv:
    """(T, (Q + 2K) D) -> (T, Q, D), (T, K, D), (T, K, D)."""
    query, key = heads
    size = u.shape[1] // (query + 2 * key)
    parts = u.view(u.shape[0], -1, size).split((query, key, key), dim=1)
    return parts[0], parts[1], parts[2]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x cos + rotate_half(x) sin; x: (T, heads, D) float32."""
    (first, second), (sin_first, sin_second) = x.chunk(2, dim=-1), sin.float()[:, None].chunk(2, dim=-1)
    result = x * cos.float()[:, None]
    left, right = result.chunk(2, dim=-1)
    left -= second * sin_first
    right += first * sin_second
    return result

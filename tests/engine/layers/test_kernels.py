"""The Triton kernels against the torch code that says what they mean; TRITON_INTERPRET=1 runs them without a GPU."""

import os
from types import SimpleNamespace

import pytest
import torch

from smolvlm_exp.engine.layers import ops as ew

pytest.importorskip("triton")
from smolvlm_exp.engine.layers import kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
CASES = [(True, True), (True, False), (False, True), (False, False)]
KINDS = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def draw(*shape, kind=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(kind)


def near(found, expected):
    """Within the rounding of the result's own dtype; None where None is meant."""
    if expected is None:
        assert found is None
        return
    found, expected = found.float(), expected.float()
    assert torch.isfinite(found).all()
    bound = 1e-5 if found.dtype is torch.float32 and [torch.float32] == KINDS else 1e-2
    assert (found - expected).norm() <= bound * expected.norm().clamp_min(1e-6)


def meaning(function, *args, **kwargs):
    """The torch code of ops.py, whatever the device."""
    held, ew.kernels = ew.kernels, None
    try:
        return function(*args, **kwargs)
    finally:
        ew.kernels = held


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(5, 48), (37, 200)])
def test_norms(kind, rows, columns):
    x, dy, residual, weight = (draw(*s, kind=kind) for s in ((rows, columns),) * 3 + ((columns,),))
    for tail in (0, 8):
        for bias in (None, residual[0]):
            found = kernels.norm(x, weight, bias, 1e-5, tail)
            assert found.shape == (rows, columns + tail)
            near(found[:, :columns], meaning(ew.norm, x, weight, bias, 1e-5))
    for centred in (False, True):
        expected = meaning(ew.norm_backward, dy, x, weight, 1e-5, residual, centred)
        near(kernels.norm_backward(dy, x, weight, 1e-5, residual, centred), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gained", [True, False])
@pytest.mark.parametrize("tail", [0, 8])
def test_gains_and_activations(kind, gained, tail):
    rows, columns = 37, 136
    whole = draw(rows, columns + tail, kind=kind)
    u, bias = whole[:, :columns], draw(columns, kind=kind)
    h, dy = (draw(rows, columns, kind=kind) for _ in range(2))
    gain = draw(columns) if gained else None
    for b in (bias, None):
        near(kernels.affine(h, u, gain, b), meaning(ew.add, h, u, gain, b))
        near(kernels.affine(None, u, gain, b), meaning(ew.scale, u, gain, b))
        near(kernels.gelu(u, gain, b, tail)[:, :columns], meaning(ew.gelu, u, gain, b))
        expected = meaning(ew.gelu_backward, dy, u, gain, b, tail, True)
        for again, over in CASES:  # they may write over their first argument, and over the second once `over`
            found = kernels.gelu_backward(dy.clone(), whole.clone()[:, :columns], gain, b, tail, again, over)
            near(found[0][:, :columns], expected[0][:, :columns])
            near(found[1], expected[1] if again else None)
            near(found[2], expected[2])
    found = kernels.scale_backward_parts((dy,), u, gain, tail)
    expected = meaning(ew.scale_backward, dy, u, gain, tail)
    assert found[0].shape == (rows, columns + tail)
    near(found[0][:, :columns], expected[0][:, :columns])
    near(found[1], expected[1])
    parts = tuple(draw(rows, 2, 20, kind=kind) for _ in range(3))
    u3, g3 = draw(rows, 120 + tail, kind=kind)[:, :120], gain[:120] if gained else None
    found = kernels.scale_backward_parts(parts, u3, g3, tail)
    expected = meaning(ew.scale_backward_parts, parts, u3, g3, tail)
    near(found[0][:, :120], expected[0][:, :120])
    near(found[1], expected[1])
    half = dy[:, : columns // 2].contiguous()
    near(kernels.swiglu(u, gain, tail)[:, : columns // 2], meaning(ew.swiglu, u, gain))
    expected = meaning(ew.swiglu_backward, half, u, gain, tail, True)
    for again, over in CASES:
        found = kernels.swiglu_backward(half.clone(), whole.clone()[:, :columns], gain, tail, again, over)
        near(found[0][:, :columns], expected[0][:, :columns])
        near(found[1], expected[1] if again else None)
        near(found[2], expected[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gained", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_rotary(kind, gained, heads):
    tokens, middle, size, tail = 70, 45, 16, 8
    keys_at = torch.tensor([*range(10), *range(45, 60), *range(20, 31), *range(60, 70)], device=DEVICE)
    slots = torch.full((tokens,), -1, dtype=torch.int32, device=DEVICE)
    slots[keys_at] = torch.arange(len(keys_at), dtype=torch.int32, device=DEVICE) + middle
    sources = torch.cat((torch.arange(middle, device=DEVICE), keys_at))
    layout = SimpleNamespace(sources=sources, slots=slots, middle=middle)
    columns = (heads[0] + 2 * heads[1]) * size
    u = draw(tokens, columns + tail, kind=kind)[:, :columns]
    angle = draw(tokens, size // 2).repeat(1, 2)
    cos, sin = angle.cos().to(kind), angle.sin().to(kind)
    gain = draw(columns) if gained else None
    found = kernels.rotary(u, gain, cos, sin, slots, middle, len(sources), heads)
    expected = meaning(ew.rotary, u, gain, cos, sin, layout, heads)
    for one, other in zip(found, expected, strict=True):
        near(one, other)
    grads = tuple(draw(*each.shape, kind=kind) for each in expected)
    found = kernels.rotary_backward(grads, u, gain, cos, sin, slots, middle, tail)
    expected = meaning(ew.rotary_backward, grads, u, gain, cos, sin, layout, tail)
    near(found[0][:, :columns], expected[0][:, :columns])
    near(found[1], expected[1])


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(64, 128), (40, 1152), (16, 100)])
def test_4_bit_weights_are_unpacked_bit_for_bit(double, shape):
    from bitsandbytes import functional

    weight = draw(*shape)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    for kind in KINDS:
        state.dtype = kind
        expected = functional.dequantize_4bit(packed, state)
        found = kernels.unpack_4bit(packed, state, torch.empty(shape, dtype=kind, device=DEVICE))
        assert torch.equal(found, expected)
        wider = torch.zeros(shape[0], shape[1] + 8, dtype=kind, device=DEVICE)
        kernels.unpack_4bit(packed, state, wider[:, : shape[1]])
        assert torch.equal(wider[:, : shape[1]], expected)
        assert not wider[:, shape[1] :].any()

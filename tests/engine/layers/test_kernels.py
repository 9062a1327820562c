"""The Triton kernels against the torch code that says what they mean; TRITON_INTERPRET=1 runs them without a GPU."""

import os

import pytest
import torch

from smolvlm_exp.engine.layers import ops
from smolvlm_exp.engine.layers.layout import Layout

pytest.importorskip("triton")
from smolvlm_exp.engine.layers import kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
KINDS = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def draw(*shape, kind=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(kind)


def assert_near(found, expected):
    """Every tensor without its tail, within the rounding of the results' own dtype; None where None is expected."""
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None
            continue
        one, other = one[..., : other.shape[-1]].float(), other.float()
        assert torch.isfinite(one).all()
        assert (one - other).norm() <= (1e-5 if INTERPRETED else 1e-2) * other.norm().clamp_min(1e-6)


@pytest.fixture
def reference(monkeypatch):
    """ops.py's torch code, whatever the device."""

    def run(name, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(ops, "kernels", None)
            return getattr(ops, name)(*args, **kwargs)

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(5, 48), (37, 200)])
def test_norms(reference, kind, rows, columns):
    x, dy, residual, weight = (draw(*s, kind=kind) for s in ((rows, columns),) * 3 + ((columns,),))
    for tail in (0, 8):
        for bias in (None, residual[0]):
            found = kernels.norm(x, weight, bias, 1e-5, tail)
            assert found.shape == (rows, columns + tail)
            assert_near([found], [reference("norm", x, weight, bias, 1e-5)])
    for centred in (False, True):
        args = dy, x, weight, 1e-5, residual, centred
        assert_near([kernels.norm_backward(*args)], [reference("norm_backward", *args)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gained", [True, False])
@pytest.mark.parametrize("tail", [0, 8])
def test_gains_and_activations(reference, kind, gained, tail):
    rows, columns = 37, 144
    whole = draw(rows, columns + tail, kind=kind)
    u, gain = whole[:, :columns], draw(columns) if gained else None
    bias, h, dy = draw(columns, kind=kind), draw(rows, columns, kind=kind), draw(rows, columns, kind=kind)
    for gated, b in ((False, bias), (False, None), (True, None)):
        for residual in (h, None):
            assert_near([kernels.affine(residual, u, gain, b)], [reference("affine", residual, u, gain, b)])
        found = kernels.activation(u, gain, b, tail, gated)
        assert_near([found], [reference("activation", u, gain, b, 0, gated)])
        da = dy[:, : found.shape[1] - tail].contiguous()
        expected = reference("activation_backward", da, u, gain, b, 0, True, False, gated)
        for with_result, in_place in (
            (True, True),
            (True, False),
            (False, True),
            (False, False),
        ):  # they write over da and u
            args = da.clone(), whole.clone()[:, :columns], gain, b, tail, with_result, in_place, gated
            du, result, dgain = kernels.activation_backward(*args)
            assert du.shape == (rows, columns + tail)
            assert_near((du, result, dgain), (expected[0], expected[1] if with_result else None, expected[2]))
    for parts in ([dy], list(dy.chunk(3, dim=1))):
        du, dgain = kernels.scale_backward(parts, u, gain, tail)
        assert du.shape == (rows, columns + tail)
        assert_near((du, dgain), reference("scale_backward", parts, u, gain, 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gained", [True, False])
@pytest.mark.parametrize(("heads", "copies"), [((4, 4), 1), ((6, 2), 1), ((4, 4), 3)])
def test_rotary(reference, kind, gained, heads, copies):
    tokens, middle, size, tail = 70, 45, 16, 8
    keys = [*range(10), *range(45, 60), *range(20, 31), *range(60, 70)]
    keys += [*range(10), *range(20, 31)] * (copies - 1)  # prompts with more answers
    layout = Layout(tokens, middle, *[torch.empty(0)] * 3, torch.tensor(keys, device=DEVICE), 0, 0, 0, copies)
    columns = (heads[0] + 2 * heads[1]) * size
    u, gain = draw(tokens, columns + tail, kind=kind)[:, :columns], draw(columns) if gained else None
    angle = draw(tokens, size // 2).repeat(1, 2)
    cos, sin = angle.cos().to(kind), angle.sin().to(kind)
    expected = reference("rotary", u, gain, cos, sin, layout, heads)
    found = kernels.rotary(u, gain, cos, sin, layout.slots, layout.keys, heads)
    assert_near(found, expected)
    grads = tuple(draw(*part.shape, kind=kind) for part in expected)
    du, dgain = kernels.rotary_backward(grads, u, gain, cos, sin, layout.slots, tail)
    assert_near((du, dgain), reference("rotary_backward", grads, u, gain, cos, sin, layout, 0))


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

"""Attention over packed answers against the same attention with one explicit mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvlm_exp.engine.inputs.packing import pack_answers
from smolvlm_exp.engine.layers import attention, gpu_attention
from smolvlm_exp.engine.layers.attention import PREFIX, shared_prefix_attention, use_shared_prefix
from smolvlm_exp.engine.layers.layout import Layout
from tests.engine.stock import IMAGE, random_row, tiny_model

LENGTHS = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))


def make_groups(lengths, answers):
    """Prompts and their answers: one of the first prompt, then as many as `answers` says, at least one."""
    rows = [random_row(p, c, r, [], seed=i) for i, (p, c, r) in enumerate(lengths)]
    groups = [
        [torch.cat((row["chosen_ids"], row["rejected_ids"]))[: 1 + (i + j) % 5] for j in range(1 + (i * answers) % 4)]
        for i, row in enumerate(rows)
    ]
    return [row["prompt_ids"] for row in rows], groups


def packed_groups(prompts, groups):
    starts = iter(range(0, 10**6, 100))
    return pack_answers(prompts, groups, [[next(starts) for _ in own] for own in groups], IMAGE)


def visible(prompts, groups, tokens):
    """(T, T), true where a token attends: to its own prompt and answer, not ahead."""
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    start, second = 0, sum(len(p) + len(own[0]) - 1 for p, own in zip(prompts, groups, strict=True))
    for prompt, (answer, *others) in zip(prompts, groups, strict=True):
        first = torch.arange(start, start + len(prompt) + len(answer) - 1)
        mask[first[:, None], first[None]] = first[None] <= first[:, None]
        start += len(first)
        for other in others:
            own = torch.arange(second, second + len(other))
            mask[own[:, None], first[None, : len(prompt) - 1]] = True
            mask[own[:, None], own[None]] = own[None] <= own[:, None]
            second += len(own)
    return mask


def explicit(query, key, value, mask, scale):
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = (query @ key.transpose(1, 2) * scale).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(0, 1)


def compare(prompts, groups, heads, size, scale, dtype=torch.float64, device="cpu"):
    """(found, expected) results and gradients for query, key and value, the expected ones in float64."""
    packed = packed_groups(prompts, groups)
    packed = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in packed.items()}
    torch.manual_seed(packed["tokens"])
    shapes = [(n, packed["tokens"], size) for n in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    exact = [part.detach().double().requires_grad_() for part in inputs]
    found = shared_prefix_attention(*inputs, Layout.of(packed), scale)
    expected = explicit(*exact, visible(prompts, groups, packed["tokens"]).to(device), scale)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, inputs, upstream.to(dtype)), torch.autograd.grad(expected, exact, upstream)
    return (found, expected), *zip(*gradients, strict=True)


@settings(max_examples=40, deadline=None)
@given(st.lists(LENGTHS, min_size=1, max_size=5), st.sampled_from([(4, 4), (4, 2), (3, 1)]), st.integers(0, 3))
def test_packed_attention_equals_one_explicit_mask(lengths, heads, answers):
    for found, expected in compare(*make_groups(lengths, answers), heads, size=8, scale=0.3):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


GPU_PATHS = [("flash", torch.bfloat16, 1e-2), ("efficient", torch.float16, 2e-3), ("efficient", torch.float32, 1e-5)]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("answers", [0, 1, 3])
@pytest.mark.parametrize(("kernel", "dtype", "tolerance"), GPU_PATHS)
def test_a_gpus_attention_equals_one_explicit_mask(heads, answers, kernel, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(gpu_attention, "has", lambda part: kernel == part)
    groups = make_groups([(70, 9, 30), (2, 1, 1), (20, 40, 3)], answers)
    for found, expected in compare(*groups, heads, 64, 0.125, dtype, "cuda"):
        assert (found.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("flash", [True, False])
def test_a_gpus_attention_within_tiles(kind, flash, monkeypatch):
    monkeypatch.setattr(gpu_attention, "has", lambda part: flash)
    torch.manual_seed(0)
    inputs = [torch.randn(3, 50, 4, 72, device="cuda", dtype=kind) for _ in range(3)]  # 72: the 2.2B model's tower
    exact = [part.double().requires_grad_() for part in inputs]
    q, k, v = (part.transpose(1, 2) for part in exact)
    expected = ((q @ k.transpose(2, 3) * 0.1).softmax(-1) @ v).transpose(1, 2)
    with torch.no_grad():
        found, state = attention.attend(tuple(inputs), None, 0.1)
    dout = torch.randn_like(found)
    gradients = attention.attend_backward(dout, tuple(inputs), found, state, None, 0.1)
    pairs = zip((found, *gradients), (expected, *torch.autograd.grad(expected, exact, dout.double())), strict=True)
    for mine, exactly in pairs:
        assert (mine.double() - exactly).norm() < (1e-5 if kind is torch.float32 else 1e-2) * exactly.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not gpu_attention.has_flash_4(), reason="flash-attn-4 is not installed")
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_flash_attention_4_is_used_and_equals_the_other(heads):
    packed = packed_groups(*make_groups([(700, 90, 300), (2, 1, 1), (200, 400, 30)], 1))
    layout = Layout.of({k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in packed.items()})
    torch.manual_seed(0)
    counts = (layout.tokens, heads[0]), (layout.keys, heads[1]), (layout.keys, heads[1])
    inputs = tuple(torch.randn(*count, 64, device="cuda", dtype=torch.bfloat16) for count in counts)
    assert gpu_attention.kernel_for(inputs[0], layout) == (gpu_attention.flash_4, gpu_attention.flash_4_backward)
    found, expected = gpu_attention.flash_4(inputs, layout, 0.125), gpu_attention.flash(inputs, layout, 0.125)
    dout = torch.randn_like(found[0])
    mine = gpu_attention.flash_4_backward(dout, inputs, *found, layout, 0.125)
    others = gpu_attention.flash_backward(dout, inputs, *expected, layout, 0.125)
    for one, other in zip((found[0], *mine), (expected[0], *others), strict=True):
        assert (one.float() - other.float()).norm() < 5e-3 * other.float().norm()


def test_a_model_without_a_layout_is_unchanged():
    model = tiny_model()
    ids, mask = torch.randint(9, 40, (2, 7)), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    before = model(input_ids=ids, attention_mask=mask).logits
    made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    use_shared_prefix(model.model.text_model)
    use_shared_prefix(model.model.text_model)  # twice is once
    assert model.config.text_config._attn_implementation == f"{PREFIX}sdpa"
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    again = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(again, made)


def test_eager_attention_is_refused():
    model = tiny_model()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"eager goes with trainer\.engine=stock"):
        use_shared_prefix(model.model.text_model)

"""Attention over packed pairs against the same attention with one explicit mask, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvlm_exp.engine.inputs.packing import pack
from smolvlm_exp.engine.layers.shared_prefix_attention import PREFIX, Layout, shared_prefix_attention, use_shared_prefix
from tests.engine.stock import IMAGE, random_row, tiny_model

LENGTHS = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))


def packed_rows(lengths, rejected=True):
    rows = [random_row(p, c, r, [], seed=i) for i, (p, c, r) in enumerate(lengths)]
    if not rejected:
        rows = [{k: v for k, v in row.items() if k != "rejected_ids"} for row in rows]
    return rows, pack(rows, IMAGE)


def visible(rows, tokens):
    """(T, T), true where a token may look: in its own prompt and answer, not ahead."""
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    start, second = 0, sum(len(row["prompt_ids"]) + len(row["chosen_ids"]) - 1 for row in rows)
    for row in rows:
        p, c = len(row["prompt_ids"]), len(row["chosen_ids"])
        first = torch.arange(start, start + p + c - 1)
        mask[first[:, None], first[None]] = first[None] <= first[:, None]
        start += len(first)
        if "rejected_ids" in row:
            own = torch.arange(second, second + len(row["rejected_ids"]))
            mask[own[:, None], first[None, : p - 1]] = True
            mask[own[:, None], own[None]] = own[None] <= own[:, None]
            second += len(own)
    return mask


def dense(query, key, value, mask, scale):
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = (query @ key.transpose(1, 2) * scale).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(0, 1)


def tensors(tokens, heads, kv_heads, dtype=torch.float64, device="cpu", size=8):
    torch.manual_seed(tokens)
    shapes = (heads, kv_heads, kv_heads)
    return [torch.randn(n, tokens, size, device=device).to(dtype).requires_grad_() for n in shapes]


@settings(max_examples=40, deadline=None)
@given(st.lists(LENGTHS, min_size=1, max_size=5), st.sampled_from([(4, 4), (4, 2), (3, 1)]), st.booleans())
def test_equal_to_one_explicit_mask(lengths, heads, rejected):
    rows, packed = packed_rows(lengths, rejected)
    inputs = tensors(packed["tokens"], *heads)
    got = shared_prefix_attention(*inputs, Layout.of(packed), 0.3)
    wanted = dense(*inputs, visible(rows, packed["tokens"]), 0.3)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    weights = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad(got, inputs, weights), torch.autograd.grad(wanted, inputs, weights), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("rejected", [True, False])
def test_flash_attention_on_a_gpu(heads, rejected):
    rows, packed = packed_rows([(70, 9, 30), (2, 1, 1), (20, 40, 3)], rejected)
    packed = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in packed.items()}
    inputs = tensors(packed["tokens"], *heads, torch.bfloat16, "cuda", size=64)
    got = shared_prefix_attention(*inputs, Layout.of(packed), 0.125)
    exact = [each.detach().double().requires_grad_() for each in inputs]
    wanted = dense(*exact, visible(rows, packed["tokens"]).cuda(), 0.125)
    torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-2)
    weights = torch.randn_like(wanted)
    mine = torch.autograd.grad(got, inputs, weights.to(got.dtype))
    for a, b in zip(mine, torch.autograd.grad(wanted, exact, weights), strict=True):
        assert (a.double() - b).norm() < 1e-2 * b.norm()


def test_a_model_without_a_layout_is_what_it_was():
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


def test_eager_attention_is_told():
    model = tiny_model()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"eager goes with trainer\.engine=stock"):
        use_shared_prefix(model.model.text_model)

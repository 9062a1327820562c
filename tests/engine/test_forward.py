"""The engine's forward pass against stock TRL's in float32: loss, every gradient, every metric, on random shapes."""

import copy

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from smolvlm_exp.engine.forward import add_packed_forward, image_features
from smolvlm_exp.engine.inputs.packing import collate
from smolvlm_exp.engine.model_parts import base_of
from tests.engine.stock import (
    DPO,
    IMAGE,
    PAD,
    Loss,
    pixels,
    random_row,
    stock_batch,
    stock_forward,
    tiny_adapter,
    tiny_model,
)

ROW = st.builds(
    random_row,
    prompt=st.integers(1, 6),
    chosen=st.one_of(st.just(1), st.integers(1, 7)),
    rejected=st.one_of(st.just(1), st.integers(1, 7)),
    tiles=st.lists(st.integers(1, 5), max_size=3),
    same=st.integers(0, 3),
    seed=st.integers(0, 999),
)
EVERY_LOSS = [
    {"loss_type": ["sigmoid"]}, {"loss_type": ["hinge"]}, {"loss_type": ["nca_pair"]}, {"loss_type": ["bco_pair"]},
    {"loss_type": ["aot"]}, {"loss_type": ["aot_unpaired"]}, {"loss_type": ["apo_zero"]}, {"loss_type": ["apo_down"]},
    {"loss_type": ["discopop"]}, {"loss_type": ["sft"]}, {"loss_type": ["sigmoid_norm"]},
    {"loss_type": ["ipo"], "beta": 0.5}, {"loss_type": ["sppo_hard"], "beta": 0.5},
    {"loss_type": ["exo_pair"], "label_smoothing": 0.01}, {"loss_type": ["robust"], "label_smoothing": 0.1},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": ["sigmoid"], "use_weighting": True}, {"loss_type": ["ipo"], "ld_alpha": 0.3, "beta": 0.5},
    {"loss_type": ["sigmoid"], "f_divergence_type": "forward_kl"},
    {"loss_type": ["ipo"], "beta": 0.5, "f_divergence_type": "js_divergence"},
    {"loss_type": ["hinge"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
]  # fmt: skip


def compare(rows: list, model: torch.nn.Module, checkpointing: bool = False, **options: object) -> None:
    """Both engines on the same rows with the same weights."""
    options = options or {"loss_type": ["sigmoid"]}
    stock, shared = model, copy.deepcopy(model)
    for each in (stock, shared):
        stock_forward(each)
        each.train()
    add_packed_forward(base_of(shared), pixels, DPO)
    if checkpointing:
        shared.gradient_checkpointing_enable()
    theirs, ours = Loss(stock, **options), Loss(shared, **options)
    batch, packed = stock_batch(rows), collate(rows, PAD, IMAGE, few_lengths=len(rows) % 2 == 1)
    if hasattr(stock, "peft_config"):
        reference, own = theirs.reference(batch), ours.reference(packed)
    else:
        spread = -3 - torch.arange(len(rows)).float()
        reference = own = {"ref_chosen_logps": spread, "ref_rejected_logps": spread}
    for name in reference:
        torch.testing.assert_close(own[name], reference[name], rtol=1e-6, atol=1e-6)
    (wanted, logged), (got, own_logged) = theirs({**batch, **reference}), ours({**packed, **reference})
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert own_logged == pytest.approx(logged, rel=1e-5, abs=2e-6)
    wanted.backward()
    got.backward()
    close_gradients(shared, stock)


def close_gradients(model: torch.nn.Module, wanted: torch.nn.Module) -> None:
    """Every gradient within 1e-5 of its own size; or, where a sum cancels nearly to nothing, of the largest one's."""
    pairs = [(n, p.grad, q.grad) for (n, p), q in zip(model.named_parameters(), wanted.parameters(), strict=True)]
    largest = max(q.norm() for _, _, q in pairs if q is not None)
    for name, p, q in pairs:
        if q is None or not q.any():
            assert p is None or not p.any(), name
        else:
            assert (p - q).norm() <= 1e-5 * q.norm() + 3e-7 * largest, name


HEADS = st.sampled_from([(4, 4), (4, 2), (3, 1)])
TARGETS = st.sampled_from(["text", "recipe", "all"])
QUICK = settings(
    max_examples=30, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.reuse, Phase.generate)
)  # shrinks slowly


@QUICK
@given(st.lists(ROW, min_size=1, max_size=6), TARGETS, HEADS, st.integers(0, 9), st.booleans())
def test_random_rows_and_models(rows, target, heads, seed, dora):
    compare(rows, tiny_adapter(tiny_model(seed, *heads), target, seed, use_dora=dora))


@QUICK
@given(st.lists(ROW, min_size=1, max_size=6), TARGETS, HEADS, st.sampled_from(EVERY_LOSS))
def test_random_rows_and_losses_in_float64(rows, target, heads, options):
    """Some losses blow up differences of rounding, so this is in float64; the head's sums are float32 all the same."""
    compare(rows, tiny_adapter(tiny_model(0, *heads).double(), target).double(), **options)


ROWS = [
    random_row(3, 4, 2, [2, 1], same=1, seed=1),
    random_row(1, 1, 1, [3], seed=2),
    random_row(5, 2, 6, [], same=2, seed=3),
    random_row(2, 6, 5, [5], same=5, seed=4),
]


@pytest.mark.parametrize("options", EVERY_LOSS, ids=str)
def test_every_loss_of_trl(options):
    compare(ROWS, tiny_adapter(tiny_model(), "recipe"), **options)


def test_full_fine_tuning():
    model = tiny_model()
    compare(ROWS, model)
    assert all(p.grad is not None for n, p in model.named_parameters() if "padding" not in n)


@pytest.mark.parametrize("target", ["text", "all"])
def test_checkpointing(target):
    compare(ROWS, tiny_adapter(tiny_model(), target), checkpointing=True)


def test_a_biased_adapter():
    compare(ROWS, tiny_adapter(tiny_model(), "text", bias="lora_only"))
    compare(ROWS, tiny_adapter(tiny_model(), "all", lora_bias=True))


def test_no_gradient_where_nothing_learns():
    """An adapter in the text model alone: the tower keeps nothing for a backward pass."""
    for target, wanted in (("text", False), ("recipe", True)):
        model = tiny_adapter(tiny_model(), target).get_base_model()
        assert image_features(model.model, pixels(ROWS[0]["tiles"])).requires_grad is wanted


def test_features_in_place_of_tiles():
    model = tiny_adapter(tiny_model(), "text")
    base = base_of(model)
    rows = [row for row in ROWS if len(row["tiles"])]
    features = [{**row, "features": image_features(base.model, pixels(row["tiles"]))} for row in rows]
    stock_forward(model)
    add_packed_forward(base, pixels, DPO)
    loss = Loss(model)
    batch, with_features = collate(rows, PAD, IMAGE), collate(features, PAD, IMAGE)
    assert "tiles" not in with_features["packed"]
    reference = loss.reference(batch)
    assert torch.equal(loss({**batch, **reference})[0], loss({**with_features, **reference})[0])


def test_generation_does_not_change():
    model = tiny_model()
    inputs = {"input_ids": ROWS[0]["prompt_ids"][None], "pixel_values": pixels(ROWS[0]["tiles"])[None]}
    before = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    stock_forward(model)
    add_packed_forward(model, pixels, DPO)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), before)

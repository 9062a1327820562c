"""Log-probabilities of answers, preference metrics, and generated answers."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from smolvlm_exp.engine.disk_cache import DiskCache
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.engine.precompute.features import keep_features
from smolvlm_exp.evaluation.generate import generate_answers, upstream_answers
from smolvlm_exp.evaluation.held_out import HeldOut
from smolvlm_exp.evaluation.preference import Logps, answer_logps, preference_metrics, sequence_logps
from smolvlm_exp.models.adapter import lora_config
from smolvlm_exp.utils.units import GIB
from tests.conftest import compose


def test_sequence_logps_by_hand():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]]))
    labels, mask = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]])
    assert sequence_logps(logits, labels, mask).item() == pytest.approx(math.log(0.8) + math.log(0.6), abs=1e-6)


def test_accuracy_is_per_token_and_a_tie_counts_half():
    chosen, rejected = torch.tensor([-2.0, -4.0, -3.0]), torch.tensor([-3.0, -3.0, -1.0])
    tokens = torch.tensor([2, 2, 3]), torch.tensor([2, 2, 1])
    own = Logps(chosen, rejected, *tokens)  # per token: -1 > -1.5; -2 < -1.5; -1 = -1
    metrics = preference_metrics(own)
    assert list(metrics) == ["preference_accuracy"]
    assert metrics["preference_accuracy"].value == pytest.approx(1.5 / 3)


def test_reward_is_against_the_reference():
    tokens = torch.ones(2), torch.ones(2)
    reference = Logps(torch.tensor([-2.0, -2.0]), torch.tensor([-2.0, -2.0]), *tokens)
    own = Logps(torch.tensor([-1.0, -3.0]), torch.tensor([-3.0, -2.0]), *tokens)
    metrics = preference_metrics(own, reference, beta=0.5)
    assert metrics["reward_accuracy"].value == pytest.approx(0.5)
    assert metrics["preference_margin"].value == pytest.approx(0.5 * (2 - 1) / 2)


def test_padding_changes_no_logp(model, processor, rows):
    together, alone = (answer_logps(model, processor, rows.test, size, None) for size in (16, 1))
    assert torch.allclose(together.chosen, alone.chosen, atol=1e-3)
    assert torch.equal(together.chosen_tokens, alone.chosen_tokens)


@pytest.mark.parametrize(
    ("adapter", "kept"), [(None, False), ("text", False), ("all", False), (None, True), ("text", True)]
)
def test_packed_evaluation_is_stock_collations(model, processor, rows, adapter, kept):
    """Log-probabilities and what the image contributes, with an adapter on and off, its features kept or not."""
    torch.manual_seed(0)
    if adapter:
        model = get_peft_model(model, lora_config(compose(f"adapter.target={adapter}").adapter, quantised=False)).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    few = replace(rows, test=rows.test.select(range(7)))  # a batch of four, and one that is not full
    stock, packed = HeldOut(few, processor, 4, None, packed=False), HeldOut(few, processor, 4, None)
    if kept:
        model.requires_grad_(False)
        keep_features(packed.rows, model, packed.pixels, DiskCache("unused", 0, GIB), 0)
    for mode in [nullcontext, *([model.disable_adapter] if adapter else [])]:
        with mode():
            expected, found = stock.logps(model), packed.logps(model)
            for side in ("chosen", "rejected"):
                tokens = getattr(expected, f"{side}_tokens")
                assert torch.equal(getattr(found, f"{side}_tokens"), tokens)
                per_token = (getattr(logps, side) / tokens for logps in (found, expected))
                torch.testing.assert_close(*per_token, atol=5e-6, rtol=0)
            drops = [held_out.image_reliance(model, held_out.logps(model)) for held_out in (stock, packed)]
            assert drops[0].keys() == drops[1].keys() == {"blank_image_drop", "wrong_image_drop"}
            for name, drop in drops[0].items():
                assert drops[1][name].value == pytest.approx(drop.value, abs=1e-5)


def test_eager_attention_is_evaluated_as_stock_trl_does(model, processor, rows):
    """It has no packed form, whatever task reads the rows."""
    model.set_attn_implementation("eager")
    stock, packed = HeldOut(rows, processor, 8, None, packed=False), HeldOut(rows, processor, 8, None)
    assert torch.equal(packed.logps(model).chosen, stock.logps(model).chosen)


def test_a_batch_that_does_not_fit_is_scored_in_halves(model, processor, rows):
    held_out = HeldOut(rows, processor, 16, None)
    whole, ordinary, sizes = held_out.logps(model), model.forward, []

    def forward(packed, labels):
        sizes.append(len(labels) // 2)
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ordinary(packed=packed, labels=labels)

    model.forward = forward
    found = held_out.logps(model)
    assert sizes == [16, 8, 4, 4, 8, 4, 4]
    torch.testing.assert_close(found.chosen, whole.chosen, atol=1e-5, rtol=1e-6)


def test_logits_are_computed_for_answers_only(model, processor, rows):
    """A prompt's would be most of the memory: image tokens times vocabulary."""
    positions = []
    model.lm_head.register_forward_hook(lambda *call: positions.append(call[-1].shape[1]))
    few = rows.test.select(range(4))
    answer_logps(model, processor, few, 4, None)
    prompts, longest = few["prompt_tokens"], max(few["uncut_tokens"])
    assert positions == [longest - min(prompts) + 1]
    assert positions[0] < min(prompts)


def test_answers_are_those_of_transformers(model, processor, rows):
    """Together and alone, from rows and from packed rows with and without kept features."""
    few = [rows.test[i] for i in range(8)]
    answers = generate_answers(model, processor, few, Sampling(40))
    assert len({len(answer) for answer in answers}) > 1
    assert all(answer.endswith(".") for answer in answers)
    assert answers == upstream_answers(model, processor, few, Sampling(40))
    assert answers == [generate_answers(model, processor, [row], Sampling(40))[0] for row in few]
    held_out = HeldOut(rows, processor, 8, None)
    assert answers == held_out.answers(model, 8, Sampling(40))
    model.requires_grad_(False)
    keep_features(held_out.rows, model, held_out.pixels, DiskCache("unused", 0, GIB), 0)
    assert answers == held_out.answers(model, 8, Sampling(40))


def test_sampled_answers_follow_the_seed_and_leave_the_random_state(model, processor, rows):
    few = [rows.test[i] for i in range(4)]
    state = torch.get_rng_state()
    for answers in (generate_answers, upstream_answers):
        drawn = [answers(model, processor, few, Sampling(30, temperature=1.5, seed=seed)) for seed in (0, 0, 1)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert drawn[0] != answers(model, processor, few, Sampling(30))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("answers", [generate_answers, upstream_answers])
def test_samples_are_drawn_from_all_of_the_vocabulary(model, processor, rows, answers):
    """Nearly uniform at this temperature: 160 first tokens, which upstream's default would draw from 50."""
    drawn = answers(model, processor, [rows.test[0]] * 160, Sampling(1, temperature=1e4))
    assert len(set(drawn)) > 60  # many are control tokens, which are no text

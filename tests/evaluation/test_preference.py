"""Log-probabilities of answers, and what is made of them."""

import math

import pytest
import torch

from smolvlm_exp.evaluation.generate import generate_answers
from smolvlm_exp.evaluation.preference import Logps, answer_logps, preference_metrics, sequence_logps


def test_sequence_logps_by_hand():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]]))
    labels, mask = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]])
    assert sequence_logps(logits, labels, mask).item() == pytest.approx(math.log(0.8) + math.log(0.6), abs=1e-6)


def test_accuracy_is_by_token_and_a_tie_counts_half():
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
    together = answer_logps(model, processor, rows.test, 16, None)
    alone = answer_logps(model, processor, rows.test, 1, None)
    assert torch.allclose(together.chosen, alone.chosen, atol=1e-3)
    assert torch.equal(together.chosen_tokens, alone.chosen_tokens)


def test_answers_do_not_depend_on_the_batch(model, processor, rows):
    few = [rows.test[i] for i in range(8)]
    together = generate_answers(model, processor, few, 8, max_new_tokens=40)
    assert together == [generate_answers(model, processor, [row], 1, max_new_tokens=40)[0] for row in few]
    assert all(answer.endswith(".") for answer in together)


def test_an_answer_stops_at_end_of_utterance(model, processor, rows):
    ordinary, end, seen = model.generate, processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>"), []

    def generate(**kwargs):
        ids = ordinary(**kwargs)
        seen.extend(ids[:, kwargs["input_ids"].shape[1] :].tolist())
        return ids

    model.generate, few = generate, [rows.test[i] for i in range(8)]
    answers = generate_answers(model, processor, few, 8, max_new_tokens=40)
    assert len({len(answer) for answer in answers}) > 1
    for said in seen:
        assert 0 < said.index(end) < 39
        assert set(said[said.index(end) + 1 :]) <= {processor.tokenizer.pad_token_id}


def test_sampled_answers_are_the_seeds_and_leave_the_random_state(model, processor, rows):
    few = [rows.test[i] for i in range(4)]
    state = torch.get_rng_state()
    drawn = [generate_answers(model, processor, few, 4, 30, temperature=1.5, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != generate_answers(model, processor, few, 4, 30)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_are_drawn_from_all_of_the_vocabulary(model, processor, rows):
    """Nearly uniform at this temperature: 160 first tokens, which upstream's default would draw from 50."""
    ordinary, seen = model.generate, []

    def generate(**kwargs):
        ids = ordinary(**kwargs)
        seen.extend(ids[:, kwargs["input_ids"].shape[1]].tolist())
        return ids

    model.generate = generate
    generate_answers(model, processor, [rows.test[0]] * 160, 160, 1, temperature=1e4)
    assert len(set(seen)) > 100

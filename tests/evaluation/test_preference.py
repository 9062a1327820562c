"""Log-probabilities of answers, preference metrics, and generated answers."""

import math

import pytest
import torch

from smolvlm_exp.evaluation.generate import generate_answers
from smolvlm_exp.evaluation.preference import Logps, answer_logps, preference_metrics, sequence_logps


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


def test_logits_are_computed_for_answers_only(model, processor, rows):
    """A prompt's would be most of the memory: image tokens times vocabulary."""
    positions = []
    model.lm_head.register_forward_hook(lambda *call: positions.append(call[-1].shape[1]))
    few = rows.test.select(range(4))
    answer_logps(model, processor, few, 4, None)
    prompts, longest = few["prompt_tokens"], max(few["uncut_tokens"])
    assert positions == [longest - min(prompts) + 1]
    assert positions[0] < min(prompts)


@pytest.fixture
def generated(model):
    """The ids that the model's `generate` returns, without the prompt."""
    ordinary, ids = model.generate, []

    def generate(**kwargs):
        output = ordinary(**kwargs)
        ids.extend(output[:, kwargs["input_ids"].shape[1] :].tolist())
        return output

    model.generate = generate
    return ids


def test_answers_end_at_end_of_utterance_and_do_not_depend_on_the_batch(model, processor, rows, generated):
    end, few = processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>"), [rows.test[i] for i in range(8)]
    answers = generate_answers(model, processor, few, 8, max_new_tokens=40)
    assert len({len(answer) for answer in answers}) > 1
    assert all(answer.endswith(".") for answer in answers)
    for ids in generated:
        assert 0 < ids.index(end) < 39
        assert set(ids[ids.index(end) + 1 :]) <= {processor.tokenizer.pad_token_id}
    assert answers == [generate_answers(model, processor, [row], 1, max_new_tokens=40)[0] for row in few]


def test_sampled_answers_follow_the_seed_and_leave_the_random_state(model, processor, rows):
    few = [rows.test[i] for i in range(4)]
    state = torch.get_rng_state()
    drawn = [generate_answers(model, processor, few, 4, 30, temperature=1.5, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != generate_answers(model, processor, few, 4, 30)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_are_drawn_from_all_of_the_vocabulary(model, processor, rows, generated):
    """Nearly uniform at this temperature: 160 first tokens, which upstream's default would draw from 50."""
    generate_answers(model, processor, [rows.test[0]] * 160, 160, 1, temperature=1e4)
    assert len({ids[0] for ids in generated}) > 100

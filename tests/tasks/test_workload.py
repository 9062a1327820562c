"""What a run does besides its steps, against what benchmarks/RESULTS.md has of it (one H200)."""

from dataclasses import replace

import pytest

from smolvlm_exp.engine.memory.cards import find_card
from smolvlm_exp.engine.memory.footprint import RowSizes
from smolvlm_exp.engine.memory.planner import best, proposals
from smolvlm_exp.evaluation import held_out, image_reliance
from smolvlm_exp.tasks import workload
from smolvlm_exp.tasks.workload import (
    CUTTING,
    GROUP,
    answer_seconds,
    forward,
    image_seconds,
    run_seconds,
    spec_of_config,
)
from smolvlm_exp.training import callbacks
from smolvlm_exp.utils.units import GIB
from tests.conftest import compose
from tests.engine.memory.test_roofline import rows_of, spec_of

H200 = find_card("h200")
PROMPTS = RowSizes([(1227, 1, 1, 13)] * 64)


def test_constants_are_those_of_evaluation():
    assert (workload.SAMPLES, workload.ABLATED_ROWS) == (held_out.SAMPLES, image_reliance.ABLATED_ROWS)
    assert (workload.SAMPLE_ROWS, workload.SAMPLE_TOKENS) == (callbacks.SAMPLE_ROWS, callbacks.SAMPLE_TOKENS)


@pytest.mark.parametrize(
    ("prompts", "answers", "merged", "measured"),
    [(1, 8, 0.41, 0.77), (8, 8, 0.88, 1.21), (32, 1, 2.53, 2.47)],
)
def test_answers_take_what_was_measured(prompts, answers, merged, measured):
    """ "Answers, by the sampler": 128 tokens, merged and as stored (in 4 bits)."""
    spec = spec_of("smolvlm", "text")
    for unpacked, seconds in ((True, merged), (False, measured)):
        predicted = answer_seconds(spec, PROMPTS, prompts, answers, 127, H200.expected(), merged=unpacked)
        assert predicted == pytest.approx(seconds, rel=0.25)


@pytest.mark.parametrize(("prompts", "measured"), [(1, (0.762, 0.742)), (8, (0.197, 0.188))])
def test_a_group_of_grpo_takes_what_was_measured(prompts, measured):
    """ "GRPO steps": groups of 8 answers of 128 tokens, sampled anew at every step; images in each sampling."""
    spec, card = spec_of("smolvlm", "text"), H200.expected()
    plan = best(proposals(spec, RowSizes([(1227, 128, 7 * 128, 13)] * 64), prompts, card), 139 * GIB)
    sampled = answer_seconds(spec, PROMPTS, prompts, 8, 128, card) / prompts
    assert [plan.seconds + sampled + GROUP] * 2 == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("tiles", "once"), [(1, 0.0252), (5, 0.0397), (10, 0.0427), (13, 0.0510)])
def test_what_comes_once_takes_what_was_measured(tiles, once):
    """ "What a resolution costs": features and reference of 64 rows, with the start of the processes that cut tiles."""
    spec, rows, card = spec_of("smolvlm", "text"), rows_of("smolvlm", tiles), H200.expected()
    predicted = CUTTING[0] / 64 + CUTTING[1] * tiles + image_seconds(spec, rows, 8, card) + forward(spec, rows, 8, card)
    assert predicted == pytest.approx(once, rel=0.25)


def test_a_whole_command_takes_what_was_measured():
    """ "A whole command": 552 and 48 rows, 18 steps of 32 pairs; 104, 97.6 and 102.6 s on three hosts."""
    config = compose("experiment=fast", "model.weights=random", "data=photos", "task.max_new_tokens=128")
    row, spec, card = (1225, 110, 110, 13), spec_of_config(config), H200.expected()
    work = workload.workload(config.trainer, [row] * 64, 552, [row] * 48, 48, False, 128)
    pair = best(proposals(spec, RowSizes(work.trained), 32, card), H200.usable).seconds
    parts = run_seconds(config.trainer, spec, work, card, pair)
    measured = {"training": 16.5, "image features": 16, "reference": 8.9, "sample answers": 2.7}
    assert {name: parts[name] for name in measured} == pytest.approx(measured, rel=0.25)
    assert sum(parts.values()) + workload.AROUND == pytest.approx(101, rel=0.15)


def test_evaluations_and_samples_are_counted():
    trainer = compose("experiment=fast", "data=photos").trainer
    assert workload.evaluations_between(trainer, 18) == 9  # eval_steps=0.1, rounded up to 2
    assert workload.evaluations_between(replace(trainer, eval_strategy="no"), 18) == 0
    assert workload.evaluations_between(replace(trainer, eval_strategy="epoch", num_train_epochs=2.0), 18) == 2
    assert workload.interval(0.25, 110) == 28


def test_only_what_a_trainer_does_is_counted():
    spec, card, row = spec_of("smolvlm", "text"), H200.expected(), (1225, 110, 110, 13)

    def parts(*settings):
        trainer = compose("model=smolvlm", "data=photos", *settings).trainer
        work = workload.workload(trainer, [row] * 8, 100, [row] * 8, 20, False, 64)
        return run_seconds(trainer, spec, work, card, 0.03)

    assert "reference" in parts("trainer=dpo")
    assert "reference" not in parts("trainer=sft")
    assert "sampling" in parts("trainer=grpo")
    assert "reference" in parts("trainer=grpo", "trainer.beta=0.1")
    assert parts("trainer=dpo", "trainer.max_steps=5")["training"] == pytest.approx(0.03 * 80)

"""GRPO's trainers: a resumed run is the run that was left alone, answers are logged, and steps are finite."""

import shutil

import pytest
import torch

from smolvlm_exp.evaluation.held_out import HeldOut
from smolvlm_exp.models.adapter import lora_config
from smolvlm_exp.models.model import load_model
from smolvlm_exp.reporting.sampled_answers import COMPLETIONS
from smolvlm_exp.rewards.build import Rewards
from smolvlm_exp.runs.event_log import read_events
from smolvlm_exp.training import grpo
from smolvlm_exp.training.arguments import TrainerInputs

SMALL = (
    "trainer=grpo", "adapter=lora", "adapter.r=2", "quant=none", "trainer.max_steps=4", "trainer.num_generations=4",
    "trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=2",
    "trainer.max_completion_length=6", "trainer.mask_truncated_completions=false", "trainer.learning_rate=5e-3",
    "trainer.save_strategy=steps",
)  # fmt: skip
CLOCKS = ("runtime", "per_second", "flos", "time")


def letters(completion_ids, **columns):
    """Of no meaning, but different from answer to answer."""
    return [(sum(ids) % 11) / 10 for ids in completion_ids]


def short(completion_ids, **columns):
    """Concerns every other answer."""
    return [None if i % 2 else 1 / len(ids) for i, ids in enumerate(completion_ids)]


REWARDS = Rewards({"letters": letters, "short": short}, {"letters": 1.0, "short": 0.5}, "sum_then_normalize", {})


@pytest.fixture
def build(quick, rows, processor):
    def built(folder, *overrides, callbacks=()):
        folder.mkdir(exist_ok=True)
        config = quick(*SMALL, *overrides)
        arguments = grpo.build_arguments(config.trainer, folder, "float32", None, config.seed)
        parts = TrainerInputs(
            load_model(config.model, None, config.seed), lora_config(config.adapter, quantised=False),
            HeldOut(rows, processor, 8, None), list(callbacks), folder, rewards=REWARDS,
        )  # fmt: skip
        return grpo.build_trainer(config.trainer, arguments, parts)

    return built


def learnt(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def logged(trainer):
    history = [event for event in trainer.state.log_history if "train_runtime" not in event]
    return [{k: v for k, v in event.items() if not any(clock in k for clock in CLOCKS)} for event in history]


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (2, ()),
        (3, ("trainer.num_iterations=2",)),
        (3, ("trainer.steps_per_generation=4",)),
        (1, ("trainer.steps_per_generation=4", "trainer.num_iterations=2", "trainer.logging_steps=2")),
        (3, ("trainer.steps_per_generation=4", "trainer.engine=stock")),
    ],
)
def test_a_resumed_run_is_the_run_that_was_left_alone(build, tmp_path, step, changes):
    """Bit for bit, also where steps to come learn from answers that were sampled before the checkpoint."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    changes = (*changes, f"trainer.save_steps={step}", "trainer.save_total_limit=4")
    first = build(whole, *changes)
    before = learnt(first)
    first.train()
    shutil.copytree(whole, again)  # with lines of completions.jsonl from after the checkpoint
    second = build(again, *changes)
    second.train(resume_from_checkpoint=str(whole / "checkpoints" / f"checkpoint-{step}"))
    assert second.resumed_at == step
    assert logged(second) == logged(first)
    assert all((p - before[name]).abs().max() > 1e-3 for name, p in learnt(first).items())
    assert all(p.equal(learnt(first)[name]) for name, p in learnt(second).items())
    assert (again / COMPLETIONS).read_text() == (whole / COMPLETIONS).read_text()


@pytest.mark.parametrize("engine", ["shared", "stock"])
def test_the_group_whose_rewards_differ_most_is_logged(build, rows, tmp_path, engine):
    trainer = build(tmp_path / "run", "trainer.max_steps=2", f"trainer.engine={engine}", "trainer.save_strategy=no")
    trainer.train()
    events = read_events(tmp_path / "run" / COMPLETIONS)
    assert [event["step"] for event in events] == [1, 2]
    for event in events:
        assert event["question"] in str(rows.train[event["row"]]["prompt"])
        rewards = [answer["rewards"] for answer in event["answers"]]
        assert [list(each) for each in rewards] == [["letters", "short"], ["letters"]] * 2  # None is left out
        totals = [each["letters"] + 0.5 * each.get("short", 0) for each in rewards]
        assert [answer["reward"] for answer in event["answers"]] == pytest.approx(totals)
        assert len(set(totals)) > 1


def test_a_ratio_that_overflows_skips_its_step(build, tmp_path, capsys):
    """exp(new - old) of log-probabilities 1000 nats apart is infinite: the step is left out, its rows are named."""
    trainer = build(tmp_path / "run", "trainer.num_iterations=2", "trainer.max_steps=3", "trainer.save_strategy=no")
    plain, weights = trainer._compute_loss, {}

    def far_apart(model, batch):
        weights[trainer.state.global_step] = learnt(trainer)
        if trainer.state.global_step == 1:
            batch = {**batch, "old_per_token_logps": batch["old_per_token_logps"] - 1000}
        return plain(model, batch)

    trainer._compute_loss = far_apart
    trainer.train()
    assert trainer.guard.skipped == [2]
    assert all(p.equal(weights[1][name]) for name, p in weights[2].items())
    assert not all(p.equal(weights[2][name]) for name, p in learnt(trainer).items())
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "not finite" in line)
    named = [int(row) for row in line.rpartition("train rows ")[2].split(", ")]
    assert named == sorted(set(trainer.rows_of(2)))
    assert len(named) == 2


def test_the_image_token_is_never_drawn(build, processor, tmp_path):
    trainer = build(tmp_path / "engine")
    assert trainer.sampling().suppress == (processor.image_token_id,)
    stock = build(tmp_path / "stock", "trainer.engine=stock")
    assert stock.generation_config.suppress_tokens == [processor.image_token_id]


def test_features_of_held_out_rows_are_not_taken_for_those_of_training(build, rows, tmp_path):
    """Both count from 0, and an evaluation comes between two steps on the same answers."""
    every_row = "trainer.max_steps=24"
    trainer = build(tmp_path / "run", "trainer.eval_strategy=steps", "trainer.keep_features=false", every_row)
    row = next(row for row in trainer.rows_ahead() if row < len(rows.test))
    trainer.model.train()
    of_training = trainer.features_of(row)
    trainer.model.eval()
    held_out = trainer.features_of(row)
    trainer.model.train()
    assert not torch.equal(of_training, held_out)
    assert torch.equal(trainer.features_of(row), of_training)

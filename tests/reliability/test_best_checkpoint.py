"""The best held-out evaluation decides: its checkpoint is saved and is the result, and training stops after it."""

import math
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from smolvlm_exp.runs.checkpoint import checkpoints, newest_intact, step_of
from smolvlm_exp.training.best_checkpoint import since_best
from smolvlm_exp.training.callbacks import StopCallback
from smolvlm_exp.utils.errors import RequestError
from tests.reliability.conftest import learnt, logged

# A rate at which held-out rows get worse after a step or two; steps are saved by their evaluation alone.
WORSE = (
    "trainer.max_steps=6", "trainer.eval_steps=1", "trainer.save_steps=100", "trainer.save_total_limit=1",
    "trainer.logging_steps=1", "trainer.warmup_steps=0", "trainer.learning_rate=0.3", "adapter.lora_dropout=0",
    "trainer.lr_scheduler_type=constant", "model.id=embedded",
)  # fmt: skip
KEEP_BEST = "trainer.load_best_model_at_end=true"


def evaluations(folder, metric):
    return {event["step"]: event[metric] for event in logged(folder) if metric in event}


def saved(checkpoint):
    return {name.replace(".weight", ""): tensor for name, tensor in load_file(checkpoint).items()}


@pytest.mark.parametrize(
    ("engine", "trainer", "metric"),
    [
        ("shared", "dpo", "rewards/margins"), ("stock", "sft", "loss"), ("shared", "grpo", "reward"),
        *(pytest.param(*each, "loss", marks=pytest.mark.slow) for each in (("shared", "sft"), ("stock", "dpo"))),
    ],
)  # fmt: skip
def test_the_result_is_the_checkpoint_of_the_best_evaluation(bench, tmp_path, engine, trainer, metric):
    own = (f"trainer.engine={engine}", f"trainer={trainer}", f"trainer.metric_for_best_model={metric}")
    few = ("trainer.num_generations=4", "trainer.max_completion_length=6", "trainer.per_device_train_batch_size=4")
    run = bench.run(tmp_path, *WORSE, KEEP_BEST, *own, *(few if trainer == "grpo" else ()))
    values = evaluations(tmp_path, f"eval_{metric}")
    assert len(values) == 6
    pick = min if metric == "loss" else max
    best = pick(values, key=lambda step: values[step])
    assert run.state.best_global_step == best
    file = tmp_path / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors"
    kept = {name.replace(".default", "").replace(".weight", ""): value for name, value in learnt(run).items()}
    for name, tensor in saved(file).items():
        assert torch.equal(kept[name], tensor)


def test_it_stops_early_and_after_a_resume_at_the_same_step(bench, tmp_path):
    stops = ("trainer.early_stopping_patience=2", "trainer.save_steps=1", "trainer.max_steps=8")
    whole = bench.run(tmp_path / "whole", *WORSE, *stops)
    values = list(evaluations(tmp_path / "whole", "eval_loss").values())
    assert whole.state.global_step == len(values) < 8
    assert since_best(values, greater_is_better=False) == 2
    last = checkpoints(tmp_path / "whole")[-1]  # which is the result, and from which it could be trained longer
    assert last.name == f"checkpoint-{whole.state.global_step}"
    assert bench.run(tmp_path / "whole", *WORSE, *stops).state.global_step == whole.state.global_step  # killed later
    first = tmp_path / "again" / "checkpoints"
    resumed = bench.run(tmp_path / "again", *WORSE, *stops, "trainer.save_total_limit=8", prepare=stop_before_last)
    assert resumed.state.global_step < whole.state.global_step
    assert newest_intact(first.parent).is_dir()
    assert bench.run(tmp_path / "again", *WORSE, *stops).state.global_step == whole.state.global_step


def stop_before_last(trainer):
    """One evaluation into the patience."""
    evaluate = trainer.evaluate

    def evaluated(*args, **kwargs):
        found = evaluate(*args, **kwargs)
        values = [event["eval_loss"] for event in trainer.state.log_history if "eval_loss" in event]
        if since_best(values, greater_is_better=False) == 1:
            trainer.control.should_training_stop = trainer.control.should_save = True
        return found

    trainer.evaluate = evaluated


def test_a_signal_in_the_evaluation_that_it_stops_after(bench, tmp_path):
    stops = ("trainer.early_stopping_patience=2", "trainer.save_steps=1", "trainer.max_steps=8")
    whole = bench.run(tmp_path / "whole", *WORSE, *stops)
    last = whole.state.global_step

    class Signal(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            if state.global_step == last:
                os.kill(os.getpid(), signal.SIGTERM)

    with StopCallback() as stop:
        bench.run(tmp_path / "again", *WORSE, *stops, callbacks=(Signal(), stop))
    assert max(evaluations(tmp_path / "again", "eval_loss")) < last == step_of(checkpoints(tmp_path / "again")[-1])
    resumed = bench.run(tmp_path / "again", *WORSE, *stops)
    assert resumed.state.global_step == last
    assert logged(tmp_path / "again") == logged(tmp_path / "whole")


def test_a_moved_run_finds_its_best_and_a_damaged_one_is_not_read(bench, tmp_path, capsys):
    """The last weights stay then, and the log says why."""
    keep = (*WORSE, KEEP_BEST, "trainer.save_steps=1", "trainer.save_total_limit=8")
    bench.run(tmp_path / "run", *keep, "trainer.max_steps=3")
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "run", moved)
    run = bench.run(moved, *keep, "trainer.max_steps=3")
    best = f"checkpoint-{run.state.best_global_step}"
    assert run.state.best_model_checkpoint == str(moved / "checkpoints" / best)
    assert best != checkpoints(moved)[-1].name
    with (moved / "checkpoints" / best / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x7f\x7f\x7f\x7f")
    capsys.readouterr()
    for harm in ("is damaged: adapter_model.safetensors has changed", "is gone; the last weights stay"):
        run = bench.run(moved, *keep, "trainer.max_steps=3")
        assert f"{best}, the best checkpoint, {harm}" in capsys.readouterr().out
        assert run.state.best_model_checkpoint is None  # which summary.json shows as best_step null
        last = saved(checkpoints(moved)[-1] / "adapter_model.safetensors")
        kept = {name.replace(".default", "").replace(".weight", ""): value for name, value in learnt(run).items()}
        assert all(kept[name].equal(tensor) for name, tensor in last.items())
        shutil.rmtree(moved / "checkpoints" / best, ignore_errors=True)


def test_without_a_best_evaluation_the_last_weights_stay(bench, tmp_path, capsys):
    def nan_losses(trainer):
        evaluate = trainer.evaluate
        trainer.evaluate = lambda *args, **kwargs: {**evaluate(*args, **kwargs), "eval_loss": math.nan}

    run = bench.run(tmp_path, *WORSE, KEEP_BEST, "trainer.max_steps=2", prepare=nan_losses)
    assert run.state.global_step == 2
    assert "no evaluation gave a number as eval_loss; the last weights stay" in capsys.readouterr().out


def test_how_many_evaluations_follow_the_best():
    assert since_best([0.5, 0.4, 0.4, math.nan, 0.6], greater_is_better=False) == 3
    assert since_best([0.5, 0.6], greater_is_better=True) == 0
    assert since_best([math.nan, math.nan], greater_is_better=True) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("trainer.eval_strategy=no",), "trainer.load_best_model_at_end needs trainer.eval_strategy=steps or epoch"),
        (("trainer.save_strategy=no",), "trainer.load_best_model_at_end needs trainer.save_strategy=steps or epoch"),
        (("trainer.metric_for_best_model=rewards/accuracy",), "Did you mean rewards/accuracies"),
    ],
)
def test_what_cannot_be_the_best_is_refused_before_anything_is_loaded(bench, tmp_path, monkeypatch, overrides, message):
    monkeypatch.setattr("tests.reliability.conftest.load_model", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(RequestError, match=message):
        bench.trainer(tmp_path, KEEP_BEST, *overrides)

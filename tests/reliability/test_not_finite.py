"""P6: a loss or gradient that is not finite never reaches weights or optimizer state."""

import contextlib
import copy
import json
import math
from dataclasses import asdict

import pytest
import torch
from transformers import TrainerCallback

from smolvlm_exp.runs.checkpoint import checkpoints, damage, newest_intact
from smolvlm_exp.tasks.doctor import doctor
from smolvlm_exp.tasks.train import train
from smolvlm_exp.training.callbacks import loss_spike
from smolvlm_exp.training.nan_guard import NanGuard
from smolvlm_exp.utils.errors import RunError
from tests.conftest import compose
from tests.reliability.conftest import learnt

FIVE = ("trainer.max_steps=5", "trainer.eval_strategy=no", "trainer.logging_steps=1", "trainer.save_strategy=no")
BAD = float("nan")
DIVERGES = ("adapter=lora", "quant=none", "trainer.learning_rate=1e30")


class Recorder(TrainerCallback):
    """Weights and optimizer state after every step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.states.append((weights, copy.deepcopy(optimizer.state_dict()["state"])))


def same(one, other):
    return all(one[0][name].equal(other[0][name]) for name in other[0]) and repr(one[1]) == repr(other[1])


def into_loss(trainer, steps, value):
    """The loss of these steps becomes `value`, and so does what flows back from it."""
    real = trainer._compute_loss

    def compute(*args, **kwargs):
        loss = real(*args, **kwargs)
        return loss * value if trainer.state.global_step + 1 in steps and trainer.model.training else loss

    trainer._compute_loss = compute


def into_gradient(trainer, steps, value):
    """One number of one gradient becomes `value`; the loss stays what it was."""
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)

    def hook(gradient):
        if trainer.state.global_step + 1 in steps:
            gradient = gradient.clone()
            gradient.view(-1)[0] = value
        return gradient

    parameter.register_hook(hook)


@pytest.mark.parametrize(("loss", "gradient"), [(BAD, math.inf), pytest.param(math.inf, BAD, marks=pytest.mark.slow)])
def test_a_bad_step_changes_nothing(bench, tmp_path, capsys, loss, gradient):
    """A bad loss in the second step, a bad gradient in the fourth."""
    recorder = Recorder()
    trainer = bench.trainer(tmp_path, *FIVE, callbacks=(recorder,))
    into_loss(trainer, {2}, loss)
    into_gradient(trainer, {4}, gradient)
    trainer.train()
    first, second, third, fourth, fifth = recorder.states
    assert same(second, first)
    assert same(fourth, third)
    assert not same(third, second)
    assert not same(fifth, fourth)
    assert all(torch.isfinite(p).all() for p in learnt(trainer).values())
    assert trainer.guard.skipped == [2, 4]
    out = capsys.readouterr().out
    for step in (2, 4):
        rows = ", ".join(map(str, sorted(trainer.rows_of(step))))
        assert f"step {step}: loss or gradient is not finite, update skipped; train rows {rows}" in out
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = {event["step"]: event for event in events if "grad_norm" in event}
    assert logged[2]["loss"] is logged[4]["grad_norm"] is None  # null, not 0.0
    assert all(math.isfinite(logged[step]["loss"]) for step in (1, 3, 4, 5))


def test_stock_trl_is_guarded_too_and_its_rows_are_named(bench, tmp_path, capsys):
    recorder = Recorder()
    trainer = bench.trainer(tmp_path, *FIVE, "trainer.engine=stock", callbacks=(recorder,))
    seen = []
    collate = trainer.data_collator

    def collating(examples):
        seen.extend((e["prompt"], e["chosen"]) for e in examples)
        return collate(examples)

    trainer.data_collator = collating
    into_loss(trainer, {2}, BAD)
    trainer.train()
    assert same(recorder.states[1], recorder.states[0])
    assert trainer.guard.skipped == [2]
    rows = [bench.preferences.train[row] for row in trainer.rows_of(2)]
    assert [(row["prompt"], row["chosen"]) for row in rows] == seen[4:8]


def test_an_input_that_is_not_finite_is_named_by_its_row(bench, tmp_path, capsys):
    """One picture's features are spoilt, as a failing disk would: the step that has it is left out, and only that."""
    trainer = bench.trainer(tmp_path, *FIVE)
    rows = trainer.rows
    features = torch.cat([rows.features[i : i + 1] for i in range(rows.tile_offsets[-1])])
    (picture,) = rows.images[5]
    features[rows.tile_offsets[picture]] = BAD
    rows.features = features
    trainer.train()
    (step,) = {step for step in range(1, 6) if 5 in trainer.rows_of(step)} & set(range(1, 5))
    assert trainer.guard.skipped[0] == step
    assert 5 in trainer.rows_of(step)
    assert all(torch.isfinite(p).all() for p in learnt(trainer).values())


def test_several_in_a_row_end_the_run_and_the_last_finite_checkpoint_stays(bench, tmp_path):
    recorder = Recorder()
    run = tmp_path / "run"
    run.mkdir()
    saving = ("trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.not_finite_limit=2")
    trainer = bench.trainer(run, *FIVE, *saving, callbacks=(recorder,))
    into_loss(trainer, {3, 4}, BAD)
    with pytest.raises(RunError, match=r"2 steps in a row \(3 to 4\)[\s\S]*train rows \d+[\s\S]*those after step 2"):
        trainer.train()
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2"]
    assert damage(newest_intact(run)) == ""
    assert same((learnt(trainer), recorder.states[-1][1]), recorder.states[1])


class Flipped(TrainerCallback):
    """A bit of a weight flips in memory after the second step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = BAD


def test_weights_that_are_not_finite_take_no_good_ones_place(bench, tmp_path, capsys):
    saving = ("trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.save_total_limit=1")
    with pytest.raises(RunError, match=r"3 steps in a row \(3 to 5\)"):
        bench.run(tmp_path, *FIVE, *saving, callbacks=(Flipped(),))
    assert "step 2: weights are not finite, so no checkpoint is saved" in capsys.readouterr().out
    assert newest_intact(tmp_path).name == "checkpoint-1"
    assert bench.run(tmp_path, *FIVE, *saving).state.global_step == 5


def test_single_bad_steps_apart_do_not_end_it():
    guard = NanGuard(2, lambda step: [step])
    model, good, bad = torch.nn.Linear(1, 1), torch.tensor(True), torch.tensor(False)
    optimizer = torch.optim.AdamW(model.parameters())
    for step, finite in enumerate([bad, good, bad, good], start=1):
        guard.mask_update(step, finite, model, optimizer)
    assert guard.skipped == [1, 3]
    with pytest.raises(RunError, match=r"in a row \(5 to 6\)"):
        [guard.mask_update(step, bad, model, optimizer) for step in (5, 6)]


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "adamw_torch_fused"])
def test_whichever_the_optimizer(optim, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = torch.nn.Linear(4, 2)
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True, report_to="none")
    optimizer = Trainer(model, arguments).create_optimizer()
    guard = NanGuard(3, lambda step: [])
    states = []
    for step, finite in enumerate([True, False, True], start=1):
        model(torch.ones(1, 4) * (1.0 if finite else math.inf)).sum().backward()
        guard.mask_update(step, torch.tensor(finite), model, optimizer)
        optimizer.step()
        model.zero_grad()
        states.append(
            ({n: p.detach().clone() for n, p in model.named_parameters()}, copy.deepcopy(optimizer.state_dict()))
        )
    assert same(states[1], states[0])
    assert not same(states[2], states[1])


@pytest.mark.gpu
def test_on_a_gpu_a_bad_step_is_left_out_without_waiting():
    model = torch.nn.Linear(4, 2, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    guard = NanGuard(3, lambda step: [])
    states = []
    for step, value in enumerate([1.0, math.nan, 1.0], start=1):
        model(torch.full((1, 4), value, device="cuda")).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            guard.mask_update(step, torch.isfinite(norm), model, optimizer)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        model.zero_grad()
        states.append(
            ({n: p.detach().clone() for n, p in model.named_parameters()}, copy.deepcopy(optimizer.state_dict()))
        )
    guard.poll(wait=True)
    assert guard.skipped == [2]
    assert same(states[1], states[0])
    assert not same(states[2], states[1])


def test_a_spike_is_told_when_it_is_seen():
    usual = [0.69, 0.66, 0.68, 0.64, 0.65, 0.66, 0.62, 0.63]
    assert loss_spike([*usual, 0.7]) is None
    assert loss_spike([*usual, 3.1]) == pytest.approx(0.655)
    assert loss_spike([*usual[:3], 3.1]) is None  # too early to say what is usual


class Poison(TrainerCallback):
    """The gradient of the third step is infinite in one number."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def hook(gradient):
            return gradient * math.inf if state.global_step == 2 else gradient

        next(p for p in model.parameters() if p.requires_grad).register_hook(hook)


@pytest.mark.usefixtures("unseen")
def test_a_poisoned_gradient_does_not_spoil_the_end(quick, tmp_path, capsys):
    summary = train(quick(*FIVE), tmp_path, watchers=[Poison()])
    assert (summary["status"], summary["train"]["not_finite"]) == ("done", [3])
    assert "NaN or infinite loss or gradient at step 3" in capsys.readouterr().out
    assert "step 3: those steps were skipped" in (tmp_path / "report.html").read_text()
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text(json.dumps(asdict(quick(*FIVE))))
    doctor(compose("task=doctor", f"run={tmp_path}"), tmp_path)
    assert "gradient at step 3" in capsys.readouterr().out


@pytest.mark.usefixtures("unseen")
def test_a_run_that_diverges_says_so_in_its_report_too(quick, tmp_path):
    with pytest.raises(RunError, match="not finite in 3 steps in a row"):
        train(quick(*FIVE, *DIVERGES), tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["reason"].startswith("RunError: stopped: loss or grad")
    page = (tmp_path / "report.html").read_text()
    assert "not finite in 3 steps in a row" in page
    assert "trainer.learning_rate=2.5e+29" in page


def broken(*args, **kwargs):
    raise TypeError("broken")


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("poisoned", [False, True])
def test_what_a_run_writes_at_its_end_fails_alone(quick, tmp_path, monkeypatch, capsys, poisoned):
    """Answers, report, advice, tracker and table are all broken: status, message and summary.json are as without."""
    monkeypatch.setattr("smolvlm_exp.tasks.result.answer_changes", broken)
    monkeypatch.setattr("smolvlm_exp.tasks.result.write_report", broken)
    monkeypatch.setattr("smolvlm_exp.tasks.result.print_results", broken)
    monkeypatch.setattr("smolvlm_exp.reporting.advice.on_policy_signs", broken)
    monkeypatch.setattr("smolvlm_exp.reporting.trackers.tracker.Tracker.finish", broken)
    with pytest.raises(RunError, match="not finite") if poisoned else contextlib.nullcontext():
        train(quick(*FIVE, *(DIVERGES if poisoned else ())), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == ("failed" if poisoned else "done")
    assert any("NaN or infinite loss" in text for text in summary["advice"]) == poisoned
    out = capsys.readouterr().out
    for part in (
        "report.html",
        "advice (on_policy)",
        "the tracker",
        *([] if poisoned else ["the table", "answers.jsonl"]),
    ):
        assert f"{part} failed (TypeError: broken); the rest is as it would be" in out

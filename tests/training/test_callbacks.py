"""Sample answers during training: they change nothing, and a resumed run continues them."""

import json
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from smolvlm_exp.runs.event_log import append_event, read_events
from smolvlm_exp.tasks.train import train
from smolvlm_exp.training import callbacks
from smolvlm_exp.training.callbacks import MetricsCallback, SamplesCallback

LONG = ("trainer.max_steps=4", "trainer.learning_rate=5e-3", "trainer.save_strategy=steps", "trainer.save_steps=2")
NOISY = ("adapter.lora_dropout=0.1", "trainer.disable_dropout=false")  # so that a random number out of place shows


def numbers(folder):
    keys = ("step", "loss", "grad_norm", "rewards/margins", "logps/chosen", "mean_token_accuracy")
    return [{key: event.get(key) for key in keys} for event in read_events(folder / "metrics.jsonl")]


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("engine", ["shared", pytest.param("stock", marks=pytest.mark.slow)])
def test_samples_change_no_number_and_a_resumed_run_continues_them(quick, tmp_path, engine):
    settings = (*LONG, *NOISY, f"trainer.engine={engine}")
    plain, sampled = tmp_path / "plain", tmp_path / "sampled"
    for folder in (plain, sampled):
        folder.mkdir()
        train(quick(*settings, f"trainer.sample_steps={int(folder == sampled)}"), folder)
    assert numbers(sampled) == numbers(plain)
    samples = read_events(sampled / "samples.jsonl")
    assert [event["step"] for event in samples] == [0, 1, 2, 3, 4]
    assert {len(event["answers"]) for event in samples} == {4}
    assert samples[0]["answers"] != samples[-1]["answers"]
    assert (sampled / "report.html").read_text().count("<dt>Step 3</dt>") == 4
    assert "<dt>Step" not in (plain / "report.html").read_text()

    lines = (sampled / "samples.jsonl").read_text().splitlines()
    (sampled / "samples.jsonl").write_text("\n".join(lines)[:-20])  # killed while step 4 was written
    (sampled / "checkpoints" / "checkpoint-4").rename(tmp_path / "gone")
    train(quick(*settings, "trainer.sample_steps=1", f"resume={sampled}"), sampled)
    assert (sampled / "samples.jsonl").read_text().splitlines() == lines  # step 3 was sampled twice and is there once
    assert (sampled / "report.html").read_text().count("<dt>Step 3</dt>") == 4


def test_sample_steps_as_a_fraction(tmp_path):
    """0.25 of 10 steps: every third; as transformers rounds eval_steps."""
    held_out = MagicMock(**{"__len__.return_value": 1})
    callback = SamplesCallback(0.25, held_out, list, MetricsCallback(tmp_path, None))
    sampled_at = []
    callback.record = lambda state, answers: sampled_at.append(state.global_step)
    model = torch.nn.Linear(1, 1)
    for step in range(11):
        state = SimpleNamespace(global_step=step, max_steps=10)
        (callback.on_step_end if step else callback.on_train_begin)(None, state, None, model=model)
    assert sampled_at == [0, 3, 6, 9]


def test_an_incomplete_line_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "events.jsonl"
    append_event(path, {"step": 1})
    path.write_text(path.read_text() + '{"step": 2, "lo')
    append_event(path, {"step": 3})
    append_event(path, {"step": 4, "answers": ["ü"]})
    assert [event["step"] for event in read_events(path)] == [1, 3, 4]
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 4, "answers": ["ü"]}


def test_a_line_says_how_it_goes_and_how_long_it_takes(tmp_path, monkeypatch, capsys):
    """A resumed run's time left is judged by its own steps."""
    clock = iter([100.0, 130.0])
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    callback = MetricsCallback(tmp_path, None)
    callback.on_train_begin(None, SimpleNamespace(global_step=10, max_steps=60), None)
    assert capsys.readouterr().out == "resuming at step 11 of 60\n"
    event = {"loss": 1.93256, "grad_norm": 2.5, "learning_rate": 7.5e-4, "pairs_per_second": 64.72, "entropy": 1.0}
    assert callback.line(SimpleNamespace(global_step=15, max_steps=60), event) == (
        "step 15/60  loss 1.933  grad_norm 2.5  learning_rate 0.00075  64.7 pairs/s  4 min 30 s left"
    )


def test_the_peak_is_that_of_the_steps(tmp_path, monkeypatch):
    """Sampling answers takes what memory is free, and training is not to be blamed for it."""
    peaks = iter([2.0, 3.0, 1.0, 9.0])
    stats = {"memory_allocated_gib": 1.0}
    monkeypatch.setattr(callbacks, "memory_stats", lambda: {**stats, "memory_peak_gib": next(peaks)})
    callback = MetricsCallback(tmp_path, None)
    for _ in range(3):
        callback.on_step_end()
    assert callback.memory() == {**stats, "memory_peak_gib": 3.0}

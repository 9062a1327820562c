"""Answers of a run under way: the same rows, other answers, and not a bit of the training changed by looking."""

import json

import pytest
import torch

from smolvlm_exp.runs.event_log import append_event, read_events
from smolvlm_exp.tasks.train import train
from smolvlm_exp.training.callbacks import MetricsCallback, SamplesCallback

LONG = ("trainer.max_steps=4", "trainer.learning_rate=5e-3", "trainer.save_strategy=steps", "trainer.save_steps=2")
NOISY = ("adapter.lora_dropout=0.1", "trainer.disable_dropout=false")  # so that a random number out of place shows


def numbers(folder):
    keys = ("step", "loss", "grad_norm", "rewards/margins", "logps/chosen", "mean_token_accuracy")
    return [{key: event.get(key) for key in keys} for event in read_events(folder / "metrics.jsonl")]


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("engine", ["shared", pytest.param("stock", marks=pytest.mark.slow)])
def test_looking_changes_no_bit_and_a_resumed_run_goes_on(quick, tmp_path, engine):
    asked = (*LONG, *NOISY, f"trainer.engine={engine}")
    for name in ("plain", "shown"):
        (tmp_path / name).mkdir()
    train(quick(*asked), tmp_path / "plain")
    shown = tmp_path / "shown"
    train(quick(*asked, "trainer.sample_steps=1"), shown)
    assert numbers(shown) == numbers(tmp_path / "plain")
    whole = read_events(shown / "samples.jsonl")
    assert [event["step"] for event in whole] == [0, 1, 2, 3, 4]
    assert {len(event["answers"]) for event in whole} == {4}
    assert whole[0]["answers"] != whole[-1]["answers"]
    page = (shown / "report.html").read_text()
    assert page.count("<dt>Step 3</dt>") == 4
    assert "<dt>Step" not in (tmp_path / "plain" / "report.html").read_text()

    text = (shown / "samples.jsonl").read_text().splitlines()
    (shown / "samples.jsonl").write_text("\n".join(text)[:-20])  # killed while step 4 was written
    (shown / "checkpoints" / "checkpoint-4").rename(tmp_path / "gone")
    train(quick(*asked, "trainer.sample_steps=1", f"resume={shown}"), shown)
    assert (shown / "samples.jsonl").read_text().splitlines() == text  # step 3, looked at twice, is there once
    assert (shown / "report.html").read_text().count("<dt>Step 3</dt>") == 4


def test_a_share_of_the_steps(tmp_path):
    """0.25 of 10 steps: every third; as transformers rounds eval_steps."""
    from types import SimpleNamespace

    callback = SamplesCallback(0.25, None, SimpleNamespace(test=[{}]), [], MetricsCallback(tmp_path, None))
    looked = []
    callback.record = lambda state, answers: looked.append(state.global_step)
    model = torch.nn.Linear(1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smolvlm_exp.training.callbacks.generate_answers", lambda *args: [""])
        for step in range(11):
            state = SimpleNamespace(global_step=step, max_steps=10)
            (callback.on_step_end if step else callback.on_train_begin)(None, state, None, model=model)
    assert looked == [0, 3, 6, 9]


def test_half_a_line_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "events.jsonl"
    append_event(path, {"step": 1})
    path.write_text(path.read_text() + '{"step": 2, "lo')
    append_event(path, {"step": 3})
    append_event(path, {"step": 4, "answers": ["ü"]})
    assert [event["step"] for event in read_events(path)] == [1, 3, 4]
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 4, "answers": ["ü"]}

"""Signs are said while the run goes on, each once, and not where the advice says them next."""

from transformers import TrainerState

from smolvlm_exp.reporting.sampled_answers import COMPLETIONS
from smolvlm_exp.runs.event_log import append_event, read_events
from smolvlm_exp.training.on_policy_callback import OnPolicyCallback
from tests.conftest import compose

NORMAL = "a loss of about 0 is normal"


def run(folder, capsys, steps, first=True, **changes):
    """What is printed at each of so many steps whose answers earn this."""
    callback = OnPolicyCallback(compose("trainer=grpo").trainer, folder)
    state, told = TrainerState(max_steps=steps, is_world_process_zero=first), []
    callback.on_train_begin(None, state, None)
    begun = capsys.readouterr().out
    for step in range(1, steps + 1):
        logs = {name: value(step) if callable(value) else value for name, value in {"reward": 0.5, **changes}.items()}
        state.global_step = step
        state.log_history.append({**logs, "step": step})
        callback.on_log(None, state, None, logs=logs)
        told.append(capsys.readouterr().out)
    return begun, told


def test_a_loss_of_zero_is_explained_once(tmp_path, capsys):
    begun, told = run(tmp_path, capsys, 6, loss=0.0)
    assert begun.count(NORMAL) == 1
    assert "".join(told) == ""


def test_a_sign_is_said_once_as_soon_as_it_shows(tmp_path, capsys):
    _, told = run(tmp_path, capsys, 8, frac_reward_zero_std=1.0, kl=lambda step: None if step > 4 else 0.1)
    assert [bool(text) for text in told] == [step in (3, 5) for step in range(1, 9)]
    assert told[2].startswith("step 3: little to learn from: in 100% of the groups")
    assert told[4].startswith("step 5: the KL divergence from the reference was not finite at step 5")


def test_what_shows_at_the_last_step_is_left_to_the_advice(tmp_path, capsys):
    _, told = run(tmp_path, capsys, 3, frac_reward_zero_std=1.0)
    assert told == ["", "", ""]


def test_one_process_speaks(tmp_path, capsys):
    begun, told = run(tmp_path, capsys, 5, first=False, frac_reward_zero_std=1.0)
    assert begun + "".join(told) == ""


def test_answers_from_after_the_checkpoint_are_removed(tmp_path):
    for step in (1, 2, 3):
        append_event(tmp_path / COMPLETIONS, {"step": step})
    callback = OnPolicyCallback(compose("trainer=grpo").trainer, tmp_path)
    callback.on_train_begin(None, TrainerState(global_step=2, is_world_process_zero=True), None)
    assert [event["step"] for event in read_events(tmp_path / COMPLETIONS)] == [1, 2]

"""P1: kill -9 at any moment, then the same again: every logged number and the adapter are those of a run left alone."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from smolvlm_exp.reporting.sampled_answers import COMPLETIONS
from smolvlm_exp.runs.checkpoint import checkpoints, newest_intact, step_of
from tests.reliability.conftest import forked, kill, logged

FILES = ("adapter_model.safetensors", "optimizer.safetensors", "scheduler.safetensors")


def go_on(trainer, folder):
    trainer.train(resume_from_checkpoint=str(newest_intact(folder)) if checkpoints(folder) else None)


def killed_until_done(bench, trainer, folder, kills, rng, span):
    """A run that is killed `kills` times, at random times within `span` seconds, and then left alone.

    Returns:
        how many kills came while it ran.
    """
    survived = 0
    while True:
        child = forked(lambda: go_on(bench.moved(trainer, folder), folder), folder.with_suffix(".log"))
        if survived < kills:
            time.sleep(rng.uniform(0, span))
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                kill(child)
                os.waitpid(child, 0)
                survived += 1
                continue
        else:
            _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, folder.with_suffix(".log").read_text()[-3000:]
        return survived


@pytest.mark.parametrize(
    ("engine", "kills"),
    [
        ("shared", 2),
        pytest.param("shared", 100, marks=pytest.mark.slow),
        pytest.param("stock", 50, marks=pytest.mark.slow),
    ],
)
def test_kill_9_at_any_moment(bench, tmp_path, engine, kills):
    """DoRA with dropout, a data worker, two epochs, checkpointing; logs of two steps that a kill may halve."""
    often = ("trainer.save_steps=1", "trainer.dataloader_num_workers=1")
    trainer = bench.trainer(tmp_path / "built", f"trainer.engine={engine}", *often)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    assert killed_until_done(bench, trainer, whole, 0, None, 0) == 0
    span = time.monotonic() - began
    rng, survived, runs = random.Random(kills), 0, 0
    while survived < kills:  # a run that gets to its end gives way to another
        folder = killed.with_name(f"killed-{runs}")
        survived += killed_until_done(bench, trainer, folder, kills - survived, rng, 0.6 * span)
        runs += 1
        assert logged(folder) == logged(whole)
        for name in FILES:
            mine, theirs = (load_file(newest_intact(each) / name) for each in (folder, whole))
            assert mine.keys() == theirs.keys()
            assert all(mine[key].equal(theirs[key]) for key in theirs)
    assert {event["num_tokens"] for event in logged(whole) if "num_tokens" in event}
    print(f"{engine}: {survived} kills survived in {runs} runs")


def test_kill_9_while_answers_are_sampled_or_learned_from(bench, tmp_path):
    """GRPO: answers to come are those that would have come, and those that were drawn are still learned from."""
    settings = (
        "trainer=grpo", "adapter=lora", "quant=none", "adapter.lora_dropout=0", "trainer.disable_dropout=true",
        "trainer.eval_strategy=no", "trainer.num_generations=4", "trainer.per_device_train_batch_size=4",
        "trainer.steps_per_generation=4", "trainer.num_iterations=2", "trainer.max_completion_length=6",
        "trainer.mask_truncated_completions=false", "trainer.save_steps=1",
    )  # fmt: skip
    trainer = bench.trainer(tmp_path / "built", *settings)
    whole, rng, survived, runs = tmp_path / "whole", random.Random(5), 0, 0
    began = time.monotonic()
    killed_until_done(bench, trainer, whole, 0, None, 0)
    span = time.monotonic() - began
    while survived < 2:
        folder = tmp_path / f"killed-{runs}"
        survived += killed_until_done(bench, trainer, folder, 2 - survived, rng, 0.6 * span)
        runs += 1
        assert logged(folder) == logged(whole)
        assert (folder / COMPLETIONS).read_text() == (whole / COMPLETIONS).read_text()
        mine, theirs = (load_file(newest_intact(each) / FILES[0]) for each in (folder, whole))
        assert all(mine[key].equal(theirs[key]) for key in theirs)
    assert len({event["reward"] for event in logged(whole) if "reward" in event}) > 1


def test_what_was_logged_before_the_first_checkpoint_is_logged_once(bench, tmp_path):
    """A kill between the first line of metrics.jsonl and the first checkpoint; it starts again in the same folder."""
    brief = ("trainer.max_steps=2", "trainer.eval_strategy=no", "trainer.save_strategy=no", "trainer.logging_steps=1")
    bench.run(tmp_path / "whole", *brief)
    (tmp_path / "run").mkdir()
    first = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0]
    (tmp_path / "run" / "metrics.jsonl").write_text(f"{first}\n{first[:40]}")
    bench.run(tmp_path / "run", *brief)
    assert [event["step"] for event in logged(tmp_path / "run")] == [1, 2]
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def command_killed(folder, settings, kills, rng, span, cwd):
    """The command people type, killed with all it started, then the same with resume, until it is done.

    Returns:
        the steps that its checkpoints had reached at each kill.
    """
    reached, resume = [], []
    while True:
        command = [sys.executable, "-m", "smolvlm_exp", *settings, *(resume or [f"hydra.run.dir={folder}"])]
        since = time.time_ns()
        running = subprocess.Popen(command, cwd=cwd, stderr=subprocess.PIPE, text=True, start_new_session=True)
        while len(reached) < kills and running.poll() is None and not began(folder, reached, since):
            time.sleep(0.05)
        if len(reached) < kills:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(rng.uniform(0, span))
        if len(reached) == kills or running.poll() is not None:
            _, told = running.communicate(timeout=600)
            assert running.returncode == 0, told[-3000:]
            return reached
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
        reached.append(max((step_of(path) for path in checkpoints(folder)), default=0))
        resume = [f"resume={folder}"] if checkpoints(folder) else []
        if not resume:
            shutil.rmtree(folder)  # killed before there was anything to go on from: it starts again


def began(folder, reached, since):
    """Whether a process that began at `since` has taken a step; what one before it logged is no sign of that."""
    path = folder / "metrics.jsonl"
    if not path.exists() or path.stat().st_mtime_ns < since:
        return False
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()[:-1]] if path.exists() else []
    return max(steps, default=0) > (reached[-1] if reached else 0)


def numbers(folder):
    events = [{k: v for k, v in event.items() if k != "epoch"} for event in logged(folder)]
    return [event for event in events if "loss" in event or "eval_loss" in event]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["shared", "stock"])
def test_the_command_is_killed_until_it_is_done(tmp_path, engine):
    settings = [
        "tracker=none", "data.train_rows=64", "data.test_rows=8", "trainer.max_steps=80", "trainer.logging_steps=1",
        "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2", "trainer.save_steps=1",
        "trainer.eval_strategy=steps", "trainer.eval_steps=5", "trainer.dataloader_num_workers=1",
        "trainer.disable_dropout=false", "adapter.lora_dropout=0.1", f"trainer.engine={engine}",
        f"trainer.cache={tmp_path / 'cache'}",
    ]  # fmt: skip
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(7)
    assert command_killed(whole, settings, 0, rng, 0, tmp_path) == []
    reached = command_killed(killed, settings, 20, rng, 1.0, tmp_path)
    assert len(reached) == 20
    assert len(set(reached)) >= 10  # it was killed on its way, and not while it started
    assert numbers(killed) == numbers(whole)
    mine, theirs = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (killed, whole))
    assert all(mine[name].equal(theirs[name]) for name in theirs)
    print(f"{engine}: {len(reached)} kills of the command, at steps {reached}")

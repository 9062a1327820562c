"""P1: kill -9 at any moment, then the same again: every logged number and the adapter are those of a run left alone."""

import os
import random
import time

import pytest
from safetensors.torch import load_file

from smolvlm_exp.checkpoint import checkpoints, newest
from tests.reliability.conftest import forked, kill, logged

FILES = ("adapter_model.safetensors", "optimizer.safetensors", "scheduler.safetensors")


def go_on(trainer, folder):
    trainer.train(resume_from_checkpoint=str(newest(folder)) if checkpoints(folder) else None)


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
        ("shared", 5),
        ("stock", 2),
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
            mine, theirs = (load_file(each / "checkpoints" / "checkpoint-8" / name) for each in (folder, whole))
            assert mine.keys() == theirs.keys()
            assert all(mine[key].equal(theirs[key]) for key in theirs)
    assert {event["num_tokens"] for event in logged(whole) if "num_tokens" in event}
    print(f"{engine}: {survived} kills survived in {runs} runs")

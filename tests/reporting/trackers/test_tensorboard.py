"""Curves and result in TensorBoard's own files; by the real writer where it is installed, else by a stand-in."""

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest

from smolvlm_exp.reporting.trackers.base import TrackedRun
from smolvlm_exp.reporting.trackers.config import TrackerConfig
from smolvlm_exp.reporting.trackers.tracker import Tracker

SUMMARY = {
    "status": "done", "before": {"recall": 0.25}, "after": {"recall": 0.5}, "train": {"steps": 3},
    "intervals": {"after": {"recall": (0.4, 0.6)}}, "changes": {"recall": {"difference": 0.25, "p": 0.01}},
    "checks": [{"id": "policy_changed", "verdict": "ok"}], "checks_passed": True,
}  # fmt: skip
RESULT = {"before/recall": 0.25, "after/recall": 0.5, "change/recall": 0.25, "train/steps": 3, "checks/passed": 1}


class Writer:
    """As far as it is used."""

    def __init__(self, purge_step):
        self.purge_step, self.scalars, self.hparams = purge_step, [], None

    def add_scalar(self, key, value, step):
        self.scalars.append((key, value, step))

    def flush(self):
        """At every log, so that it can be watched."""

    def add_hparams(self, settings, numbers, run_name):
        self.hparams = settings, numbers

    def close(self):
        """At the end."""


def two_runs(folder):
    """Three steps, and a resumed run from the second on, with its result."""
    config, settings = TrackerConfig(tensorboard=True), {"adapter": "dora", "adapter/r": 8, "trainer/loss_type": ["a"]}
    first = Tracker(config, TrackedRun(folder, settings=settings))
    for step in (1, 2, 3):
        first.log({"loss": 4.0 / step, "eval_loss": 1.0, "train_runtime": 9.0}, step)
    first.runs[0].close()
    resumed = Tracker(config, TrackedRun(folder, settings=settings, resumed=True))
    for step in (2, 3):
        resumed.log({"loss": 1.0}, step)
    resumed.finish(SUMMARY)


def test_curves_and_hparams(monkeypatch, tmp_path):
    module = ModuleType("torch.utils.tensorboard")
    made = []
    module.SummaryWriter = lambda folder, purge_step: made.append(Writer(purge_step)) or made[-1]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    two_runs(tmp_path)
    first, resumed = made
    assert first.scalars[:3] == [("train/loss", 4.0, 1), ("eval/loss", 1.0, 1), ("train/loss", 2.0, 2)]
    assert resumed.purge_step == 2  # what the first run logged there on does not count
    assert resumed.hparams == ({"adapter": "dora", "adapter/r": 8, "trainer/loss_type": "['a']"}, RESULT)


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_its_own_reader_finds_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    two_runs(tmp_path)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(1, 4), (2, 1), (3, 1)]
    assert {key: read.Scalars(key)[-1].value for key in RESULT} == pytest.approx(RESULT)
    assert "_hparams_/session_start_info" in read.PluginTagToContent("hparams")

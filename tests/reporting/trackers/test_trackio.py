"""Curves and result in Trackio; by the real one where it is installed, else by a stand-in."""

import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest

from smolvlm_exp.reporting.trackers.base import TrackedRun
from smolvlm_exp.reporting.trackers.config import TrackerConfig
from smolvlm_exp.reporting.trackers.tracker import Tracker

SUMMARY = {"status": "done", "before": {}, "after": {"recall": 0.5}, "train": {}, "checks": []}


def two_runs(folder):
    """Two steps, and a resumed run's second step, with its result."""
    config = TrackerConfig(trackio=True, project="mine")
    for resumed, steps in ((False, (1, 2)), (True, (2,))):
        run = TrackedRun(folder, "r=8 day/time", group="r=8", settings={"adapter/r": 8}, resumed=resumed)
        tracker = Tracker(config, run)
        for step in steps:
            tracker.log({"loss": 1.0 / step}, step)
        tracker.finish(SUMMARY if resumed else {"status": "stopped"})


def test_a_run_is_resumed_under_its_name(monkeypatch, tmp_path):
    asked, logged = [], []

    def init(**options):
        asked.append(options)
        return SimpleNamespace(log=lambda values, step=None: logged.append((values, step)), finish=lambda: None)

    module = ModuleType("trackio")
    module.init = init
    monkeypatch.setitem(sys.modules, "trackio", module)
    two_runs(tmp_path)
    first, resumed = asked
    assert (first["project"], first["name"], first["group"]) == ("mine", "r=8 day/time", "r=8")
    assert first["config"] == {"adapter/r": 8}
    assert (first["resume"], resumed["resume"]) == ("never", "allow")  # another run of this name stays another run
    assert logged[:2] == [({"train/loss": 1.0}, 1), ({"train/loss": 0.5}, 2)]
    assert logged[-1] == ({"status": "done", "after/recall": 0.5}, None)


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_its_own_reader_finds_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    import trackio

    two_runs(tmp_path)
    (run,) = trackio.Api().runs("mine")
    assert (run.name, run.config["adapter/r"]) == ("r=8 day/time", 8)

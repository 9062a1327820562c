"""Which trackers are chosen, and what is refused before anything starts."""

from importlib.util import find_spec

import pytest

import smolvlm_exp
from smolvlm_exp.reporting.trackers import config as trackers
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose


def test_one_none_or_several_are_chosen(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    assert compose().tracker.chosen == ["wandb"]
    assert compose("tracker=none").tracker.chosen == []
    assert compose("tracker=tensorboard").tracker.chosen == ["tensorboard"]
    both = compose("tracker=[wandb,tensorboard]", "tracker.project=mine").tracker
    assert (both.chosen, both.project_name) == (["wandb", "tensorboard"], "mine")
    assert compose("tracker=[trackio,wandb]", "adapter.r=2,4", multirun=True).tracker.chosen == ["wandb", "trackio"]
    with pytest.raises(RequestError, match=r"tracker=tensorbord: no such option. Did you mean tensorboard"):
        compose("tracker=[wandb,tensorbord]")
    with pytest.raises(RequestError, match=r"tracker.type is now tracker.wandb"):
        compose("tracker.type=none")


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_in_one_line(monkeypatch, name):
    monkeypatch.setattr(trackers, "find_spec", lambda asked: None if asked == name else find_spec(asked))
    with pytest.raises(RequestError) as refused:
        smolvlm_exp.compose([f"tracker=[wandb,{name}]"])
    smolvlm_exp.compose([f"tracker=[wandb,{name}]", "task=plan"])
    assert str(refused.value) == f"tracker={name} needs a package that is not installed: pip install {name}"

"""Seconds belong to one phase at a time, and together they are all the time there was."""

import pytest

from smolvlm_exp.utils import phases
from smolvlm_exp.utils.phases import PhaseClock, phase, seconds_by_phase


@pytest.fixture
def time(monkeypatch):
    """A clock that moves when it is told to, and a recorder of its own that began at 0."""
    now = [0.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(phases, "clock", PhaseClock())
    phases.clock.restart()

    def passes(seconds):
        now[0] += seconds

    return passes


@phase("data")
def load(time):
    time(2)


@phase("saving")
def save(time):
    time(4)
    raise ValueError("out of memory")


def test_what_is_within_is_not_counted_twice(time):
    time(5)
    load(time)
    time(1)
    with phase("training"):
        time(10)
        with phase("evaluation_during"):
            time(3)
            load(time)
        with pytest.raises(ValueError, match="out of memory"):
            save(time)
        time(20)
    seconds = seconds_by_phase()
    assert seconds == {
        "startup": 5, "data": 4, "training": 30, "evaluation_during": 3, "saving": 4, "other": 1,
    }  # fmt: skip
    assert list(seconds) == [name for name in phases.PHASES if name in seconds]
    with phase("training"):
        time(1)
        assert seconds_by_phase()["training"] == 31  # also of a phase that goes on
    phases.clock.restart()
    time(7)
    assert seconds_by_phase() == {"startup": 7}

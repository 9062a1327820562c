"""Where the time of a run goes: seconds by phase, those of an inner phase not counted in the outer one.

    with phase("data"): ...            @phase("data")
                                       def load(...): ...

By the clock on the wall: what a GPU has been given to do counts where somebody waits for it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from smolvlm_exp import IMPORTED

PHASES = {
    "startup": "imports and composition",
    "data": "data",
    "model": "model and processor",
    "image_features": "image features",
    "reference": "reference log-probs",
    "memory_plan": "memory plan",
    "evaluation_before": "evaluation before",
    "sampling": "sampling answers to train on",
    "training": "training steps",
    "evaluation_during": "evaluation during training",
    "samples": "sample answers",
    "evaluation_after": "evaluation after",
    "saving": "checkpoints, adapter, report",
    "other": "other",
}  # with their labels, in the order of the table


class PhaseClock:
    """Of one thread: the one that does the work."""

    def __init__(self) -> None:
        self.restart(IMPORTED)

    def restart(self, now: float | None = None) -> None:
        """From nothing, as at the start of a command; `now` by time.perf_counter."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.phase, self.since = "startup", time.perf_counter() if now is None else now

    def enter(self, phase: str) -> str:
        """From now on seconds belong to `phase`; returns the one that they belonged to."""
        now, left = time.perf_counter(), self.phase
        self.seconds[left] += now - self.since
        self.phase, self.since = phase, now
        return left


clock = PhaseClock()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Within, seconds belong to the phase `name`. Before a run's first phase they are `startup`'s, then `other`'s."""
    outer = clock.enter(name)
    try:
        yield
    finally:
        clock.enter("other" if outer == "startup" else outer)


def seconds_by_phase() -> dict[str, float]:
    """So far, since the command began or the clock was restarted: of every phase that took any time."""
    clock.enter(clock.phase)
    return {name: seconds for name, seconds in clock.seconds.items() if seconds}

"""Ctrl-C, SIGTERM and a terminal that is closed, for a run, a sweep and a chat alike."""

import os
import signal
import sys
import time
from typing import Any, Self

STOPPED = 75  # exit code: stopped after saving, `resume` continues
INTERRUPTED = 130  # exit code: stopped, and nothing was saved


def ending_signals() -> list[signal.Signals]:
    """Those that end a program from outside: SIGTERM, and SIGHUP where there is one and `nohup` does not ignore it."""
    if sys.platform == "win32" or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return [signal.SIGTERM]
    return [signal.SIGTERM, signal.SIGHUP]


def end_as_interrupt() -> None:
    """From now on they raise KeyboardInterrupt, as Ctrl-C does; processes forked from this one ignore them."""
    owner = os.getpid()

    def interrupt(number: int, frame: Any) -> None:
        if os.getpid() == owner:
            raise KeyboardInterrupt

    for number in ending_signals():
        signal.signal(number, interrupt)


class StopRequest:
    """Within, a first signal sets `requested` and calls `on_request`; a second one quits at once."""

    def __init__(self) -> None:
        self.requested, self.first = False, 0.0
        self.owner = os.getpid()
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, *ending_signals()):
            self.previous[number] = signal.signal(number, self.on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def on_signal(self, number: int, frame: Any) -> None:
        if os.getpid() != self.owner:
            return  # a data worker: Ctrl-C reaches all processes, and the trainer still needs its batches
        now = time.monotonic()
        if self.requested and now - self.first < 1:
            return  # one request often arrives twice: for the process, and for its group
        if self.requested:
            self.leave(128 + number)
        self.requested, self.first = True, now
        self.on_request()

    def leave(self, code: int) -> None:
        """At a second signal."""
        sys.exit(code)

    def on_request(self) -> None:
        """At the first signal, in its handler."""
        raise NotImplementedError

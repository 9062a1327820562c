"""A person's or a system's wish to stop, heard once: Ctrl-C and SIGTERM, for a run and for a sweep alike."""

import os
import signal
import sys
import time
from typing import Any, Self


class StopRequest:
    """Within, a first signal calls `heard`, and a second leaves at once.

    Attributes:
        asked: whether there was a first one.
    """

    def __init__(self) -> None:
        self.asked, self.first = False, 0.0
        self.owner = os.getpid()
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: Any) -> None:
        if os.getpid() != self.owner:
            return  # a data worker: Ctrl-C reaches the whole group, and the trainer still wants its batches
        now = time.monotonic()
        if self.asked and now - self.first < 1:
            return  # one request often comes twice: to the process, and to its group
        if self.asked:
            self.leave(128 + number)
        self.asked, self.first = True, now
        self.heard()

    def leave(self, code: int) -> None:
        """What a second signal does."""
        sys.exit(code)

    def heard(self) -> None:
        """What is to be done at once; called in the signal's handler."""
        raise NotImplementedError

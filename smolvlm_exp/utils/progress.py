"""A bar with the time that is left, for waits of more than two seconds; only where somebody watches a terminal."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

DELAY = 2.0  # seconds before a bar is shown

Advance = Callable[[int], None]  # by so many of the total

shown: dict[str, Advance] = {}  # the outermost bar by its label


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """Within, calls of what it yields move the bar, which is gone at the end.

    Nothing is shown where stderr is no terminal, by ranks other than 0, and within another bar, tqdm's included. A bar
    within one of the same label moves that one: who has parts done elsewhere says how much all of them are.
    """
    if shown or not somebody_watches():
        yield shown.get(label, lambda count: None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    # Not redirected: what is printed meanwhile goes where it would go without a bar.
    bar = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False)
    task = bar.add_task(label, total=total)
    delayed = threading.Timer(DELAY, bar.start)
    delayed.daemon = True
    delayed.start()
    shown[label] = lambda count: bar.advance(task, count)
    try:
        yield shown[label]
    finally:
        delayed.cancel()
        delayed.join()
        bar.stop()
        shown.clear()


def track(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """The items, with a bar that moves by one for each."""
    with progress(label, total) as advance:
        for item in items:
            yield item
            advance(1)


def somebody_watches() -> bool:
    """Whether stderr is a terminal and ours to write to: rank 0's, without a bar of tqdm's as the trainer has it."""
    tqdm = sys.modules.get("tqdm.std")
    bars = getattr(tqdm.tqdm, "_instances", ()) if tqdm else ()
    return sys.stderr.isatty() and os.environ.get("RANK", "0") == "0" and all(bar.disable for bar in bars)

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

shown = threading.Lock()  # held by the outermost bar: the ones within it are not shown


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """Within, calls of what it yields move the bar, which is gone at the end.

    Nothing is shown where stderr is no terminal, by ranks other than 0, and within another bar, tqdm's included.
    """
    if (
        not sys.stderr.isatty()
        or os.environ.get("RANK", "0") != "0"
        or tqdm_shown()
        or not shown.acquire(blocking=False)
    ):
        yield lambda count: None
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
    try:
        yield lambda count: bar.advance(task, count)
    finally:
        delayed.cancel()
        delayed.join()
        bar.stop()
        shown.release()


def track(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """The items, with a bar that moves by one for each."""
    with progress(label, total) as advance:
        for item in items:
            yield item
            advance(1)


def tqdm_shown() -> bool:
    """Whether a bar of tqdm, as the trainer's, is there already."""
    tqdm = sys.modules.get("tqdm.std")
    return tqdm is not None and any(not bar.disable for bar in getattr(tqdm.tqdm, "_instances", ()))

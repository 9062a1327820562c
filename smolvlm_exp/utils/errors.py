"""The errors that people are meant to read."""

import contextlib
import difflib
import errno
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

log = logging.getLogger(__name__)


class RequestError(ValueError):
    """The request cannot work; the message names the setting, file or row, and the fix.

    `main` prints it without a traceback and exits with code 2; nothing was started.
    """


class RunError(RuntimeError):
    """A run that had started cannot continue; the message says why, what is saved, and how to resume.

    `main` prints it without a traceback and exits with code 1.
    """


class Pruned(Exception):
    """A search ended this run early."""


def first_line(error: BaseException) -> str:
    """An error's message without the retries and traces that may follow."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def isolated(part: str) -> Iterator[None]:
    """What only describes a run may fail without taking its other results, its message or its exit code along."""
    try:
        yield
    except Exception as error:
        log.warning(f"{part} failed ({type(error).__name__}: {first_line(error)}); the rest is as it would be")


@contextlib.contextmanager
def unusable_path_as_request_error() -> Iterator[None]:
    """A path that no file can have, wherever it is first looked at."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise RequestError(f"{str(error.filename)[:80]} ...: {error.strerror}.") from error


def exit_with_error(error: RequestError | RunError) -> NoReturn:
    if isinstance(error, RequestError) and os.environ.get("RANK", "0") != "0":
        time.sleep(10)  # all ranks raise it: rank 0 prints, and the launcher ends the others
    print(f"smolvlm_exp: {error}", file=sys.stderr)
    sys.exit(2 if isinstance(error, RequestError) else 1)


def suggestion(wrong: str, known: list[str]) -> str:
    """`Did you mean X?` where something is close (a whole name, or its last part), else the list where it is short."""
    last = wrong.rsplit(".", 1)[-1]
    tails = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.75) or [
        tails[tail] for tail in difflib.get_close_matches(last, list(tails), n=1, cutoff=0.8)
    ]
    guess = f"Did you mean {near[0]}? " if near else ""
    return guess + (f"Known: {', '.join(known)}." if len(known) <= 20 else "")

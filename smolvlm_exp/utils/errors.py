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

from smolvlm_exp.utils.formatting import printable

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
    print(printable(f"smolvlm_exp: {error}"), file=sys.stderr)
    sys.exit(2 if isinstance(error, RequestError) else 1)


def suggestion(wrong: str, known: list[str]) -> str:
    """`Did you mean X?` where something is close, else the list where it is short.

    Close is the same last part, a similar name or a longer one; of a name without a group also a similar last part.
    """
    group, _, last = wrong.rpartition(".")
    tails: dict[str, list[str]] = {}
    for name in known:
        tails.setdefault(name.rpartition(".")[2], []).append(name)
    same = tails.get(last, [])
    near = [last] if group and last in known else difflib.get_close_matches(wrong, known, n=3, cutoff=0.75)
    near = [name for name in near if difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio() >= 0.6][:1]
    if not near and not group:
        same = same or [
            name for tail in difflib.get_close_matches(last, tails, n=1, cutoff=0.8) for name in tails[tail]
        ]
    near = near or (same if len(same) == 1 or not group else [])
    near = near or [name for name in known if len(wrong) >= 3 and name.startswith(wrong)]
    guess = f"Did you mean {' or '.join(near[:3])}? " if near else ""
    return guess + (f"Known: {', '.join(known)}." if len(known) <= 20 else "")

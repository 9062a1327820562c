"""The errors that people are meant to read."""

import os
import sys
import time
from typing import NoReturn


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


def exit_with_error(error: RequestError | RunError) -> NoReturn:
    if isinstance(error, RequestError) and os.environ.get("RANK", "0") != "0":
        time.sleep(10)  # all ranks raise it: rank 0 prints, and the launcher ends the others
    print(f"smolvlm_exp: {error}", file=sys.stderr)
    sys.exit(2 if isinstance(error, RequestError) else 1)

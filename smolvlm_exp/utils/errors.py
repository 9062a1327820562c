"""The errors that people are meant to read, and the one end of a run that is none."""

import os
import sys
import time
from typing import NoReturn


class RequestError(ValueError):
    """What was asked for cannot be done. The message names the knob, file or row, and the fix.

    `main` prints it without a traceback and exits with code 2; nothing was started.
    """


class RunError(RuntimeError):
    """A run that had begun cannot go on. The message says why, what is kept, and how to go on.

    `main` prints it without a traceback and exits with code 1.
    """


class Pruned(Exception):
    """A search ended this run early, in favour of better ones."""


def exit_with_error(error: RequestError | RunError) -> NoReturn:
    if isinstance(error, RequestError) and os.environ.get("RANK", "0") != "0":
        time.sleep(10)  # of several processes all refuse alike: the first one speaks, and the launcher ends the others
    print(f"smolvlm_exp: {error}", file=sys.stderr)
    sys.exit(2 if isinstance(error, RequestError) else 1)

"""The one error that people are meant to read."""

import sys
from typing import NoReturn


class RequestError(ValueError):
    """What was asked for cannot be done. The message names the knob, file or row, and the fix.

    `main` prints it without a traceback and exits with code 2; nothing was started.
    """


def refuse(error: RequestError) -> NoReturn:
    print(f"smolvlm_exp: {error}", file=sys.stderr)
    sys.exit(2)

"""Torch, transformers and TRL, imported faster."""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's cycle collector, which would look again and again at what is imported here and stays.

    It is left out of later collections too, and of the last one when the process ends: in all 2 s of a command. Where
    all is imported already, a job before this one may have left what is to be collected, so nothing is changed.
    """
    if "trl" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

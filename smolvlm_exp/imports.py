"""Torch, transformers and TRL, imported faster."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's cycle collector, which would look again and again at what is imported here and stays.

    It is left out of later collections too, and of the last one when the process ends: in all 2 s of a command.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

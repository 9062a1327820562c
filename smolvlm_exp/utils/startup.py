"""Torch, transformers and TRL, imported faster."""

import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def fast_imports() -> Iterator[None]:
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


def silence_upstream() -> None:
    """Silence upstream's notes to its own developers; errors and our own lines stay."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # we change no layer's output in place
    for name in ("bitsandbytes.backends.cpu.ops", "torchao", "torch.utils._pytree"):  # both of torchao's import
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()

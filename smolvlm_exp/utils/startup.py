"""Torch, transformers and TRL, imported faster."""

import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def fast_imports() -> Iterator[None]:
    """Without Python's garbage collector, which would repeatedly scan modules that stay: saves 2 s per command.

    What was imported is left out of later collections too. Where all is imported already nothing is changed, so that
    what an earlier job left is collected.
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
    """Hide upstream's warnings to its own developers and, where there is no terminal, progress bars."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # we change no layer's output in place
    for name in ("bitsandbytes.backends.cpu.ops", "torchao", "torch.utils._pytree"):  # both of torchao's import
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()

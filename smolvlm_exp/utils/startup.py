"""What a process sets up before it works: the package's messages, imports that are faster, upstream that is quieter."""

import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any


class ConsoleHandler(logging.Handler):
    """To whatever `sys.stdout` is when the message comes: a job's log, a test's capture; silence on all ranks but 0."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stdout, flush=True)


class LastingOutput:
    """A stream that a run outlives: once nobody reads it (`| head`, a lost terminal, a full disk), nothing is printed.

    Its file descriptor then leads nowhere, so that other processes' and libraries' output does not fail either.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self.give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.give_up()

    def give_up(self) -> None:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def keep_printing() -> None:
    """From now on a failing stdout or stderr ends nothing."""
    sys.stdout, sys.stderr = LastingOutput(sys.stdout), LastingOutput(sys.stderr)


def configure_logging() -> None:
    """Show the package's messages from INFO upwards, unless somebody has given its logger a handler of their own.

    logging.getLogger("smolvlm_exp").setLevel("WARNING")      # in a notebook; in a terminal SMOLVLM_EXP_LOG=WARNING
    """
    logger = logging.getLogger("smolvlm_exp")
    if not logger.handlers:
        logger.addHandler(ConsoleHandler())
        logger.setLevel(os.environ.get("SMOLVLM_EXP_LOG", "INFO").upper())
        logger.propagate = False


@contextlib.contextmanager
def fast_imports() -> Iterator[None]:
    """Without Python's garbage collector, which would repeatedly scan modules that stay: saves 2 s per command.

    What was imported is left out of later collections too. Where all is imported already nothing is changed, so that
    what an earlier job left is collected. Nor does bitsandbytes get what torch.compile makes for devices that it has no
    kernels for: that would import torch._inductor, another second.
    """
    if "trl" in sys.modules:
        yield
        return
    gc.disable()
    compiling = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        if compiling is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = compiling
        gc.freeze()
        gc.enable()


def silence_upstream() -> None:
    """Hide upstream's warnings to its own developers and, where there is no terminal, progress bars."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # we change no layer's output in place
    warnings.filterwarnings("ignore", message="Could not find a config file in")  # PEFT's, of weights that are random
    for name in ("bitsandbytes.backends.cpu.ops", "torchao", "torch.utils._pytree"):  # both of torchao's import
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()

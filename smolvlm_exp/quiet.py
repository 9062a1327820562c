"""Upstream's notes to its own developers, silenced; errors and our own lines stay."""

import logging
import sys
import warnings


def hush() -> None:
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

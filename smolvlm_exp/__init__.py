"""Hydra-composed experiments that fine-tune SmolVLM with QLoRA, DoRA and DPO on the GPU you own."""

import sys
import time
from typing import Any

IMPORTED = time.perf_counter()  # a command has just begun

__version__ = "0.1.0"

# Where `kernels` is installed, importing bitsandbytes on some CPUs fetches code from the Hub and runs it, and
# transformers may. With None here it counts as not installed.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

HOMES = {"train": "main", "evaluate": "main", "compose": "main", "SmolVLMSession": "deploy.session.session"}


def __getattr__(name: str) -> Any:
    """`from smolvlm_exp import train`: imported on first use, so that a command stays fast."""
    if name not in HOMES:
        raise AttributeError(f"module 'smolvlm_exp' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"smolvlm_exp.{HOMES[name]}"), name)

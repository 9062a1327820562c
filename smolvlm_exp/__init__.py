"""Hydra-composed experiments that fine-tune SmolVLM with QLoRA, DoRA and DPO on the GPU you own."""

import sys

__version__ = "0.1.0"

# Where `kernels` is installed, importing bitsandbytes on some CPUs fetches code from the Hub and runs it, and
# transformers may. With None here it counts as not installed.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

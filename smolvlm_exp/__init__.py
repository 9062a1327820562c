"""Hydra-composed experiments that fine-tune SmolVLM with QLoRA, DoRA and DPO on the GPU you own."""

__version__ = "0.1.0"

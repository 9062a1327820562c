"""The parts of a SmolVLM, whatever is wrapped around it."""

from typing import Any

from peft import PeftModel
from torch import nn


def base_of(model: Any) -> Any:
    """The model under the adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def core_of(model: Any) -> Any:
    """The module that holds `vision_model`, `connector` and `text_model`, whatever is wrapped around it."""
    return base_of(model).base_model


def is_trainable(*modules: nn.Module) -> bool:
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())

"""What exporting, talking and serving share."""

import pytest
import torch
from peft import get_peft_model

from smolvlm_exp.models.adapter import lora_config
from smolvlm_exp.models.model import load_model
from tests.conftest import compose


@pytest.fixture(scope="session")
def adapted():
    """The embedded model with an adapter that moves its answers."""
    config = compose("quant=none")
    tuned = get_peft_model(load_model(config.model), lora_config(config.adapter, quantised=False)).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return tuned

"""4 and 8 bits: the recipe's settings, what is refused, and weights that stay as they are stored."""

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.functional import dequantize_4bit

from smolvlm_exp.models.model import load_model
from smolvlm_exp.models.quant import QuantConfig, quantization_config
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose


def test_nf4_has_the_recipes_settings_and_none_has_no_configuration():
    config = quantization_config(compose("quant=nf4").quant, torch.bfloat16)
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantization_config(compose("quant=none").quant, torch.float32) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QuantConfig(load_in_4bit=True, load_in_8bit=True), "choose one"),
        (QuantConfig(load_in_8bit=True, bnb_4bit_quant_type="nf4"), "bnb_4bit_quant_type has no effect"),
        (QuantConfig(bnb_4bit_use_double_quant=False), "bnb_4bit_use_double_quant has no effect"),
        (QuantConfig(load_in_4bit=True, llm_int8_threshold=5.0), "llm_int8_threshold has no effect"),
    ],
)
def test_an_option_without_effect_is_refused(config, message):
    with pytest.raises(RequestError, match=message):
        quantization_config(config, torch.float32)


def test_a_broken_bitsandbytes_is_reported(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(functional, "quantize_4bit", broken)
    with pytest.raises(RequestError, match=r"no kernel image[\s\S]*quant=none"):
        quantization_config(compose("quant=nf4").quant, torch.float32)


@pytest.mark.parametrize(("option", "layer"), [("nf4", "Linear4bit"), ("fp4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_quantised_layers_stay_as_they_are_stored(option, layer):
    """On a CPU with AVX512-BF16 the first forward pass without gradients repacks 4-bit weights by default."""
    config = compose(f"quant={option}")
    model = load_model(config.model, quantization_config(config.quant, torch.float32))
    assert {type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")} == {layer}
    if option == "int8":
        return
    projection = model.model.text_model.layers[0].mlp.up_proj
    weight = projection.weight
    assert weight.quant_state.quant_type == option
    before = dequantize_4bit(weight.data, weight.quant_state).clone()
    with torch.no_grad():
        projection(torch.randn(2, 5, 128))
    assert torch.equal(dequantize_4bit(projection.weight.data, projection.weight.quant_state), before)

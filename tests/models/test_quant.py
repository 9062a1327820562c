"""4 and 8 bits: the recipe's settings, what is refused, and weights that stay as they are stored."""

import pytest
import torch

from smolvlm_exp.models.model import load_model
from smolvlm_exp.models.quant import QuantConfig, quantization_config
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose


def test_nf4_is_the_recipes():
    config = quantization_config(compose("quant=nf4").quant, torch.bfloat16)
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


def test_none_is_none():
    assert quantization_config(compose("quant=none").quant, torch.float32) is None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (QuantConfig(load_in_4bit=True, load_in_8bit=True), "choose one"),
        (QuantConfig(load_in_8bit=True, bnb_4bit_quant_type="nf4"), "bnb_4bit_quant_type has no effect"),
        (QuantConfig(bnb_4bit_use_double_quant=False), "bnb_4bit_use_double_quant has no effect"),
        (QuantConfig(load_in_4bit=True, llm_int8_threshold=5.0), "llm_int8_threshold has no effect"),
    ],
)
def test_an_option_without_effect_is_refused(config, said):
    with pytest.raises(RequestError, match=said):
        quantization_config(config, torch.float32)


def test_a_bitsandbytes_that_does_not_work_is_told(monkeypatch):
    from bitsandbytes import functional

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(functional, "quantize_4bit", broken)
    with pytest.raises(RequestError, match=r"no kernel image[\s\S]*quant=none"):
        quantization_config(compose("quant=nf4").quant, torch.float32)


@pytest.mark.parametrize(("option", "layer"), [("nf4", "Linear4bit"), ("fp4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_the_model_is_really_quantised(option, layer):
    config = compose(f"quant={option}")
    model = load_model(config.model, quantization_config(config.quant, torch.float32))
    kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")}
    assert kinds == {layer}
    if option != "int8":
        quant_type = model.model.text_model.layers[0].mlp.up_proj.weight.quant_state.quant_type
        assert quant_type == option


def test_a_forward_pass_leaves_stored_4_bit_weights_alone():
    """Facts: on a CPU with AVX512-BF16 the first forward without gradients repacks them unless it is told not to."""
    from bitsandbytes.functional import dequantize_4bit

    config = compose("quant=nf4")
    model = load_model(config.model, quantization_config(config.quant, torch.float32))
    layer = model.model.text_model.layers[0].mlp.up_proj
    before = dequantize_4bit(layer.weight.data, layer.weight.quant_state).clone()
    with torch.no_grad():
        layer(torch.randn(2, 5, 128))
    assert torch.equal(dequantize_4bit(layer.weight.data, layer.weight.quant_state), before)

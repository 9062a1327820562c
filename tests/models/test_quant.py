"""4 and 8 bits: the recipe's settings, what is refused, and weights that stay as they are stored."""

import math

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from smolvlm_exp.models.model import load_model
from smolvlm_exp.models.quant import QuantConfig, describe_weights, quantization_config
from smolvlm_exp.models.shape import shape_of
from smolvlm_exp.training.memory_spec import linear_sizes
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
        (QuantConfig(skip=["vision_model"]), "quant.skip has no effect without quant=nf4"),
        (QuantConfig(load_in_4bit=True, skip=["text_model", "connector", "vision_model"]), "that is quant=none"),
    ],
)
def test_an_option_without_effect_is_refused(config, message):
    with pytest.raises(RequestError, match=message):
        quantization_config(config, torch.float32)


def test_an_unknown_part_is_refused_with_those_there_are():
    with pytest.raises(RequestError, match=r"quant\.skip=lm_head: Known: text_model, vision_model, connector"):
        compose("quant.skip=[lm_head]")


def test_a_broken_bitsandbytes_is_reported(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(functional, "quantize_4bit", broken)
    with pytest.raises(RequestError, match=r"no kernel image[\s\S]*quant=none"):
        quantization_config(compose("quant=nf4").quant, torch.float32)


@pytest.mark.parametrize(("option", "layer", "bits"), [("nf4", Linear4bit, 4), ("int8", Linear8bitLt, 8)])
def test_parts_that_are_skipped_are_not_quantised_and_what_is_is_told(option, layer, bits, caplog):
    config = compose(f"quant={option}", "quant.skip=[vision_model,connector]")
    with caplog.at_level("INFO"):
        model = load_model(config.model, quantization_config(config.quant, torch.float32))
    quantised = {name for name, module in model.named_modules() if isinstance(module, layer)}
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert quantised == {name for name in linears if ".text_model." in name}
    weights = sum(math.prod(size) for name, size in linear_sizes(shape_of("tiny")).items() if ".text_model." in name)
    assert f"model: in {bits} bits: text model {weights / 1e6:.1f}M of 2.1M weights" in caplog.text
    every = quantization_config(compose(f"quant={option}").quant, torch.float32)
    assert describe_weights(load_model(config.model, every)).startswith("vision tower 0.7M, connector 0.1M, text model")


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

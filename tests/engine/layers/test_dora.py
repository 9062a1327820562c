"""DoRA's norm by its formula, against the matrix that PEFT would form."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from smolvlm_exp.engine.layers.dora import exact_dora, squared_norm, use_exact_dora
from smolvlm_exp.models.model import load_model
from smolvlm_exp.models.quant import quantization_config
from tests.conftest import compose


def test_the_norm_is_that_of_the_merged_rows():
    # W + 2 B A = [[3, 0], [0, 1]] + 2 [[1], [2]] [[0, 1]] = [[3, 2], [0, 5]]: squared norms 13 and 25.
    weight, a, b = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0], [2.0]])
    assert squared_norm(weight.square().sum(1), weight @ a.T, a, 2 * b).tolist() == [13.0, 25.0]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.with_bias, self.without = nn.Linear(12, 8), nn.Linear(8, 6, bias=False)

    def forward(self, x):
        return self.without(torch.tanh(self.with_bias(x)))


@pytest.fixture
def tuned():
    """With a DoRA adapter that has moved in every tensor."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, use_dora=True, target_modules=["with_bias", "without"])
    model = get_peft_model(Two(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def test_layers_compute_what_pefts_do(tuned):
    x = torch.randn(5, 12)

    def run():
        tuned.zero_grad()
        result = tuned(x)
        result.square().sum().backward()
        return [result.detach(), *(p.grad.clone() for p in tuned.parameters() if p.requires_grad)]

    expected = run()
    use_exact_dora(tuned)
    torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_adds_nothing_in_any_precision(quant, dtype):
    config = compose(f"quant={quant}", f"model.dtype={str(dtype).removeprefix('torch.')}")
    model = load_model(config.model, quantization_config(config.quant, dtype))
    adapter = LoraConfig(r=4, use_dora=True, target_modules=["down_proj", "fc1"])
    layers = get_peft_model(model, adapter).base_model.model.model
    use_exact_dora(layers)
    for layer in (layers.text_model.layers[0].mlp.down_proj, layers.vision_model.encoder.layers[0].mlp.fc1):
        gain = layer.lora_magnitude_vector["default"].weight / exact_dora(layer, "default").norm()
        assert torch.equal(gain, torch.ones_like(gain))
        if quant == "none":
            x = torch.randn(3, layer.in_features, dtype=dtype)
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is torch.bfloat16):
                assert torch.equal(layer(x), layer.get_base_layer()(x))


def test_the_norm_is_computed_again_only_when_the_adapter_changes(tuned):
    layer = tuned.base_model.model.without
    dora = exact_dora(layer, "default")
    first = dora.norm()
    assert dora.norm() is first
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(0.1)
    assert not torch.equal(dora.norm(), first)


def test_the_norm_is_the_same_under_autocast(tuned):
    layer = tuned.base_model.model.with_bias
    expected = exact_dora(layer, "default").norm()
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = exact_dora(layer, "default").norm()
    assert found is not expected
    assert torch.equal(found, expected)


def test_it_is_saved_and_loaded_as_pefts_own(tuned, tmp_path):
    use_exact_dora(tuned)
    tuned.save_pretrained(tmp_path)
    x = torch.randn(5, 12)
    expected = tuned(x)
    loaded = PeftModel.from_pretrained(tuned.unload(), tmp_path)
    torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-6)

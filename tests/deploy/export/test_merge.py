"""An adapter merged into the weights it was trained on is the tuned model; into others, or in 4 bits, it is not."""

import pytest
import torch
from peft import get_peft_model

from smolvlm_exp.deploy.export.merge import load_merged, save_merged
from smolvlm_exp.deploy.session.backends import load_folder
from smolvlm_exp.engine.layers.quantized_weights import frozen_weight, is_4bit
from smolvlm_exp.evaluation.checks import mean_logp_change
from smolvlm_exp.evaluation.preference import answer_logps
from smolvlm_exp.models.adapter import lora_config
from smolvlm_exp.models.model import load_finetuned_model, load_model, resolve_dtype
from smolvlm_exp.models.quant import quantization_config
from tests.conftest import compose


@pytest.fixture(params=["dora", "lora"])
def tuned(request, tmp_path):
    """A configuration whose model.adapter moved answers about as far as a run does."""
    plain = compose(f"adapter={request.param}")
    base = load_merged(plain.model, plain.quant, plain.adapter, plain.seed, "dequantized")
    model = get_peft_model(base, lora_config(plain.adapter, quantised=False))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1 if request.param == "lora" else 0.03)
    model.save_pretrained(tmp_path / "adapter")
    return compose(f"adapter={request.param}", f"model.adapter={tmp_path}")


def logps(model, processor, rows):
    return answer_logps(model, processor, rows.test.select(range(6)), 6, None)


def test_only_a_merge_into_the_trained_weights_is_the_tuned_model(tuned, processor, rows):
    """PEFT's own merge rounds the sum of weight and adapter to 4 bits again, so it is not offered."""
    arguments = tuned.model, tuned.quant, tuned.adapter, tuned.seed
    model = load_finetuned_model(*arguments)
    expected = logps(model, processor, rows)
    with model.disable_adapter():
        effect = mean_logp_change(logps(model, processor, rows), expected)
    assert effect > 0.02
    merged = {onto: load_merged(*arguments, onto) for onto in ("dequantized", "original")}
    merged["peft"] = model.merge_and_unload()
    errors = {name: mean_logp_change(expected, logps(m, processor, rows)) / effect for name, m in merged.items()}
    assert errors["dequantized"] < 1e-3  # what is left is the order of float32's sums
    assert errors["original"] > 0.1
    assert errors["peft"] > 0.2


def test_dequantised_weights_are_the_4_bit_ones(processor, rows):
    """Before a forward pass in evaluation mode and after it, on processors for which bitsandbytes repacks too."""
    config = compose()
    model = load_model(config.model, quantization_config(config.quant, resolve_dtype("float32")))
    before = {name: frozen_weight(m, torch.float32).clone() for name, m in model.named_modules() if is_4bit(m)}
    answer_logps(model, processor, rows.test.select(range(4)), 4, None)
    after = dict(model.dequantize(dtype=torch.float32).named_parameters())
    assert before
    for name, weight in before.items():
        assert torch.equal(weight, after[f"{name}.weight"]), name


@pytest.mark.parametrize(
    ("precision", "least", "most", "size"),
    [("fp32", 0, 1e-6, 4), ("bf16", 0, 0.05, 2), ("int8", 1e-5, 0.1, None)],
)
def test_saved_weights_score_as_the_model_does(small, processor, rows, tmp_path, precision, least, most, size):
    """`size`: bytes per parameter; int8 leaves out the head, a large part of so small a model."""
    if precision == "int8":
        pytest.importorskip("torchao")
    model = load_folder(small, None)[0].model
    expected = logps(model, processor, rows)
    save_merged(model, processor, tmp_path, precision)
    assert torch.equal(logps(model, processor, rows).chosen, expected.chosen)  # the model in memory is unchanged
    error = mean_logp_change(expected, logps(load_folder(tmp_path, None)[0].model, processor, rows))
    assert least <= error <= most
    saved = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    if size:
        assert saved == pytest.approx(model.num_parameters() * size, rel=0.02)
    else:
        assert saved < 0.75 * model.num_parameters() * 2

"""An adapter merged into the weights it was trained on is the tuned model; into others, or in 4 bits, it is not."""

import pytest
import torch
from peft import get_peft_model

from smolvlm_exp.deploy.export.merge import load_merged, save_merged
from smolvlm_exp.deploy.session.backends import load_folder
from smolvlm_exp.evaluation.checks import mean_logp_change
from smolvlm_exp.evaluation.preference import answer_logps
from smolvlm_exp.models.adapter import lora_config
from smolvlm_exp.models.model import load_finetuned_model
from tests.conftest import compose


@pytest.fixture(scope="module", params=["dora", "lora"])
def tuned(request, tmp_path_factory):
    """A configuration whose model.adapter moved answers about as far as a run does."""
    plain = compose(f"adapter={request.param}")
    base = load_merged(plain.model, plain.quant, plain.adapter, plain.seed, "dequantized")
    model = get_peft_model(base, lora_config(plain.adapter, quantised=False))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1 if request.param == "lora" else 0.03)
    folder = tmp_path_factory.mktemp("tuned")
    model.save_pretrained(folder / "adapter")
    return compose(f"adapter={request.param}", f"model.adapter={folder}")


@pytest.fixture(scope="module")
def scored(tuned, processor, rows):
    """The tuned model (after forward passes in evaluation mode, which once repacked its 4 bits) and its base."""
    model = load_finetuned_model(tuned.model, tuned.quant, tuned.adapter, tuned.seed)
    found = answer_logps(model, processor, rows.test, 16, None)
    with model.disable_adapter():
        base = answer_logps(model, processor, rows.test, 16, None)
    return model, found, mean_logp_change(base, found)


def test_merged_into_what_it_was_trained_on(tuned, scored, processor, rows):
    _, wanted, effect = scored
    assert effect > 0.02
    shares = {}
    for onto in ("dequantized", "original"):
        found = answer_logps(
            load_merged(tuned.model, tuned.quant, tuned.adapter, tuned.seed, onto), processor, rows.test, 16, None
        )
        shares[onto] = mean_logp_change(wanted, found) / effect
    assert shares["dequantized"] < 1e-3  # what is left is the order of float32's sums
    assert shares["original"] > 0.1


def test_merged_by_peft_in_4_bits_loses_much(tuned, scored, processor, rows):
    """Why it is not done: the sum of weight and adapter is rounded to 4 bits again."""
    model, wanted, effect = scored
    found = answer_logps(model.merge_and_unload(), processor, rows.test, 16, None)
    assert mean_logp_change(wanted, found) / effect > 0.2


def test_dequantised_weights_are_the_4_bit_ones(processor, rows):
    """Before a forward pass in evaluation mode and after it, on processors for which bitsandbytes repacks too."""
    from smolvlm_exp.engine.layers.quantized_weights import frozen_weight, is_4bit
    from smolvlm_exp.models.model import load_model, resolve_dtype
    from smolvlm_exp.models.quant import quantization_config

    config = compose()
    model = load_model(config.model, quantization_config(config.quant, resolve_dtype("float32")))
    before = {name: frozen_weight(m, torch.float32).clone() for name, m in model.named_modules() if is_4bit(m)}
    answer_logps(model, processor, rows.test.select(range(4)), 4, None)
    after = dict(model.dequantize(dtype=torch.float32).named_parameters())
    assert before
    for name, weight in before.items():
        assert torch.equal(weight, after[f"{name}.weight"]), name


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-6), ("bf16", 0.05)])
def test_saved_and_loaded(small, processor, rows, tmp_path, precision, most):
    model = load_folder(small, None)[0].model
    wanted = answer_logps(model, processor, rows.test, 16, None)
    save_merged(model, processor, tmp_path / precision, precision)
    assert torch.equal(answer_logps(model, processor, rows.test, 16, None).chosen, wanted.chosen)  # still what it was
    found = answer_logps(load_folder(tmp_path / precision, None)[0].model, processor, rows.test, 16, None)
    assert mean_logp_change(wanted, found) <= most
    size = sum(file.stat().st_size for file in (tmp_path / precision).glob("*.safetensors"))
    assert size == pytest.approx(model.num_parameters() * {"fp32": 4, "bf16": 2}[precision], rel=0.02)


def test_torchao_in_8_bits(small, processor, rows, tmp_path):
    pytest.importorskip("torchao")
    model = load_folder(small, None)[0].model
    save_merged(model, processor, tmp_path / "whole", "bf16")
    save_merged(model, processor, tmp_path / "int8", "int8")
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors")) for n in ("whole", "int8")]
    assert sizes[1] < 0.75 * sizes[0]
    wanted = answer_logps(model, processor, rows.test, 16, None)
    found = answer_logps(load_folder(tmp_path / "int8", None)[0].model, processor, rows.test, 16, None)
    assert 1e-5 < mean_logp_change(wanted, found) < 0.1

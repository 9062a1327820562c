"""A MemorySpec from settings alone, against transformers and PEFT."""

import pytest
import torch
from torch import nn

from smolvlm_exp.engine.layers import linear
from smolvlm_exp.engine.memory import footprint
from smolvlm_exp.engine.memory.footprint import peak, resident
from smolvlm_exp.models.adapter import AdapterConfig, lora_config, match_target, matched_modules
from smolvlm_exp.models.quant import QuantConfig
from smolvlm_exp.models.shape import model_config, shape_from, shape_of
from smolvlm_exp.training.memory_spec import ALIGNED, AdapterSpec, linear_sizes, memory_spec
from tests.engine.memory.test_planner import LONG, facts


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("smolvlm", 2_246_272_880), ("smolvlm_500m", 507_482_304), ("smolvlm_256m", 256_484_928),
        ("smolvlm2_2b", 2_246_784_880),
    ],
)  # fmt: skip
def test_every_weight_is_counted(model, weights):
    spec = facts(model=model)
    assert spec.matrix_weights + spec.other_weights == weights


def test_a_part_that_is_not_quantised_takes_what_it_has_in_the_models_dtype():
    names = match_target(list(linear_sizes(shape_of("smolvlm"))), "text")
    adapted = AdapterSpec(names, 8, dora=True, dropout=False)
    all_in_4_bits, but_the_tower = (
        memory_spec(shape_of("smolvlm"), "4bit double", adapted, True, 2, gpu=True, whole=whole)
        for whole in ((), ("vision_model",))
    )
    tower = 27 * (4 * 1152**2 + 2 * 1152 * 4304)
    assert all_in_4_bits.matrix_weights - but_the_tower.matrix_weights == tower
    stored = footprint.STORED["4bit double"]
    assert resident(but_the_tower) - resident(all_in_4_bits) == pytest.approx(tower * (2 - stored), abs=2)
    assert (but_the_tower.text.quantised, but_the_tower.vision.quantised) == (True, False)


def test_the_recipe_trains_the_published_number_of_weights():
    assert facts("recipe").trained_weights == 11_269_248
    assert facts("text").trained_weights == 9_682_944


@pytest.mark.parametrize("model", ["smolvlm", "smolvlm2_256m"])
def test_linear_layers_are_named_and_sized_as_in_transformers(model):
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        built = AutoModelForImageTextToText.from_config(model_config(shape_of(model)))
    sizes = {n: tuple(m.weight.shape) for n, m in built.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert linear_sizes(shape_of(model)) == sizes
    assert sorted(matched_modules(built, "all")) == sorted(linear_sizes(shape_of(model)))


@pytest.mark.parametrize("model", ["smolvlm_500m", "smolvlm2_2b", "tiny"])
def test_a_loaded_models_dimensions_are_its_shapes(model):
    found, shape = shape_from(model_config(shape_of(model))), shape_of(model)
    assert linear_sizes(found) == linear_sizes(shape)
    assert (found.image_seq_len, found.vocab_size) == (shape.image_seq_len, shape.vocab_size)


def test_only_layers_above_the_lowest_adapter_keep_something():
    part = facts(adapter=AdapterConfig(target=r".*text_model\.layers\.(2[0-3])\.self_attn\.q_proj"))
    assert (part.text.trained, part.vision.trained, part.features) == (4, 0, True)
    assert part.text.tails == (8, 0, 0, 0)
    assert peak(part, LONG.longest(4), "none", "full") < peak(facts(), LONG.longest(4), "none", "full")
    vision = facts(adapter=AdapterConfig(target=r".*vision_model.*\.layers\.(2[56])\..*fc1"))
    assert (vision.text.trained, vision.vision.trained, vision.features) == (24, 2, False)


def test_a_full_fine_tune_holds_every_weight_four_times():
    full = facts(quant=QuantConfig(), adapter=AdapterConfig(type="none"))
    assert resident(full) == pytest.approx(4 * 2 * 2_246_272_880 + footprint.CUBLAS, rel=1e-6)


def test_tails_are_aligned_as_linear_aligns_them():
    assert ALIGNED == linear.ALIGNED


def test_adapters_count_as_peft_makes_them(model):
    from peft import get_peft_model

    for config in (AdapterConfig(r=3, use_dora=True, target="recipe"), AdapterConfig(r=5, target="all")):
        peft = get_peft_model(model, lora_config(config, quantised=False))
        wanted = sum(p.numel() for p in peft.parameters() if p.requires_grad)
        assert facts(model="tiny", quant=QuantConfig(), adapter=config).trained_weights == wanted
        peft.unload()

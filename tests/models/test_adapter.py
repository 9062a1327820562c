"""Where adapters go, and what is refused."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForImageTextToText

from smolvlm_exp.models.adapter import (
    AdapterConfig,
    check_adapter_target,
    describe_target,
    lora_config,
    match_target,
    matched_modules,
)
from smolvlm_exp.models.shape import model_config, shape_of
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose


def test_the_recipe_trains_the_published_number_of_parameters():
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(model_config(shape_of("smolvlm")))
    config = compose("experiment=cookbook").adapter
    tuned = get_peft_model(model, lora_config(config, quantised=False), low_cpu_mem_usage=True)
    assert tuned.get_nb_trainable_parameters() == (11_269_248, 2_257_542_128)


@pytest.mark.parametrize("target", ["text", "recipe", "all", r".*connector.*"])
def test_adapters_are_on_the_matched_layers(model, target):
    names = matched_modules(model, target)
    config = lora_config(AdapterConfig(target=target), quantised=False)
    check_adapter_target(config, model, target)
    tuned = get_peft_model(model, config)
    adapted = {
        name.removeprefix("base_model.model.").split(".lora_A")[0]
        for name, _ in tuned.named_modules()
        if name.endswith(".lora_A")
    }
    assert adapted == set(names)


def test_layers_are_listed_by_part_without_the_head(model):
    text = describe_target(matched_modules(model, "recipe"))
    assert text.startswith("54 layers: ")
    assert "12 in the vision tower (4 k_proj, 4 q_proj, 4 v_proj)" in text
    assert "42 in the text model" in text
    assert "vision" not in describe_target(matched_modules(model, "text"))
    assert not any("lm_head" in name for name in matched_modules(model, "all"))


@pytest.mark.parametrize("target", ["nothing", "(", ""])
def test_a_target_without_layers_is_refused(model, target):
    with pytest.raises(RequestError, match=r"adapter\.target"):
        matched_modules(model, target)


def test_a_model_without_the_named_layers_is_refused_too():
    for target in ("text", "recipe", "all"):
        with pytest.raises(RequestError, match=rf"adapter\.target={target} matches no linear layer"):
            match_target([], target)
    assert describe_target(["model.connector.proj"]).startswith("1 layer: ")


def test_pefts_own_error_is_shown():
    with pytest.raises(RequestError, match="no_such"):
        lora_config(AdapterConfig(extra={"no_such": 1}), quantised=False)

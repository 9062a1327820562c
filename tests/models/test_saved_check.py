"""Weights that are not all of the model's, or not only its own, are refused by name and number."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from smolvlm_exp.deploy.export.merge import load_merged
from smolvlm_exp.models.adapter import AdapterConfig, load_adapter, lora_config
from smolvlm_exp.models.model import ModelConfig, load_finetuned_model, load_model, load_processor
from smolvlm_exp.models.quant import QuantConfig, quantization_config
from smolvlm_exp.models.shape import EMBEDDED
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import read_json
from tests.conftest import compose

QUERY = "model.text_model.layers.0.self_attn.q_proj.weight"
CHANGES = {
    "no vision tower": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "vision_model" not in name},
        r"lack 69 of the model's tensors, e\.g\. model\.vision_model\.embeddings\.patch_embedding\.bias",
    ),
    "no tensor at all": (lambda tensors: {"a": torch.ones(1)}, r"lack 127 of the model's .* and have 1 tensors that"),
    "one more": (
        lambda tensors: {**tensors, "model.more": torch.ones(1)},
        r"have 1 tensors that the model has not, e\.g\. model\.more\.",
    ),
    "another shape": (
        lambda tensors: {**tensors, QUERY: torch.ones(2, 3)},
        rf"have 1 tensors of another shape, e\.g\. {QUERY} \(\[2, 3\] in place of \[128, 128\]\)",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_is_whole(change, tmp_path):
    altered, said = CHANGES[change]
    shutil.copytree(EMBEDDED, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file(altered(load_file(file)), file, metadata={"format": "pt"})
    for option in ("none", "nf4", "int8") if change == "another shape" else ("none", "nf4"):
        config = compose(f"model.id={tmp_path}/model", f"quant={option}")
        with pytest.raises(RequestError, match=rf"model\.id=.*/model: its weights {said}"):
            load_model(config.model, quantization_config(config.quant, torch.float32))


def described(key, value):
    """config.json with another value."""
    config = read_json(EMBEDDED / "config.json")
    return json.dumps({**config, key: {**config[key], **value} if isinstance(value, dict) else value}).encode()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b""), ("model.safetensors", (EMBEDDED / "model.safetensors").read_bytes()[:-9]),
        ("model.safetensors.index.json", b'{"weight_map": 5}'), ("generation_config.json", b"[]"),
        ("config.json", b"[" * 100_000), ("config.json", b'{"model_type": "idefics3", "text_config": 5}'),
        ("config.json", b'{"model_type": "idefics3", "text_config": null}'),
        ("config.json", described("scale_factor", 0)),
        ("config.json", described("text_config", {"num_hidden_layers": 10**6})),
        ("config.json", described("vision_config", {"patch_size": 0})),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_base_is_one_error(file, content, tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "model")
    if file == "model.safetensors.index.json":
        (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / file).write_bytes(content)
    config = compose(f"model.id={tmp_path}/model").model
    with pytest.raises(RequestError, match=r"damaged|only idefics3 and smolvlm|describes"):  # noqa: PT012 - a command does both
        load_processor(config)
        load_model(config)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    from peft import get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    tuned = get_peft_model(load_model(compose().model), lora_config(SMALL, quantised=False))
    tuned.save_pretrained(folder)
    return folder


SMALL = AdapterConfig(r=2, target=r".*text_model\.layers\.0\.self_attn\.q_proj")
LORA_A = "base_model.model.model.text_model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({LORA_A: None}, rf"its file lacks 1 tensors, e\.g\. {LORA_A}"),
        ({"base_model.model.more": torch.ones(1)}, r"its file has 1 other tensors, e\.g\. base_model\.model\.more"),
        ({LORA_A: torch.ones(2, 3)}, r"does not fit this model: .*size mismatch"),
    ],
)
def test_an_adapter_is_whole_also_where_it_is_merged(adapter, changes, said, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in {**load_file(file), **changes}.items() if tensor is not None}
    save_file(tensors, file, metadata={"format": "pt"})
    model = replace(compose().model, adapter=str(folder))
    with pytest.raises(RequestError, match=said):
        load_finetuned_model(model, QuantConfig(), SMALL, 0)
    with pytest.raises(RequestError, match=said):
        load_merged(model, QuantConfig(), SMALL, 0, "original")


UNREAD = {"digests": [1]}, {"lora_dropout": 5}


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("adapter_config.json", {"task_type": "x"}), ("adapter_config.json", {"target_modules": 5}),
        ("adapter_config.json", {"alpha_pattern": {".*": "x"}}), ("adapter_config.json", {"lora_dropout": 5}),
        ("adapter_config.json", {"rank_pattern": {"(": 1}}), ("adapter_config.json", {"modules_to_save": ["lm_head"]}),
        ("adapter_config.json", {"trainable_token_indices": [10**9]}), ("adapter_model.safetensors", {}),
        ("adapter_config.json", {"rank_pattern": {f"layer{i}": 8 for i in range(10**6)}}),
        ("base.json", {"digests": [1]}), ("base.json", {"digests": {"linear": 5}}),
    ],
)  # fmt: skip
def test_whatever_an_adapter_says_it_is_no_traceback(adapter, file, fields, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / file).write_text(json.dumps({**read_json(folder / file), **fields}))
    model = replace(compose().model, adapter=str(folder))
    said = r"model\.adapter=.* was|fit|1,000 at most"
    with nullcontext() if fields in UNREAD else pytest.raises(RequestError, match=said):
        load_finetuned_model(model, QuantConfig(), SMALL, 0)


def test_what_is_whole_loads(adapter):
    """With the dropout that is typed, as everything else of a run's settings is."""
    own = replace(SMALL, lora_dropout=0.25)
    tuned = load_adapter(load_model(ModelConfig("embedded", dtype="float32")), adapter, own)
    assert {drop.p for layer in tuned.modules() for drop in getattr(layer, "lora_dropout", {}).values()} == {0.25}
    assert tuned.targeted_module_names == ["model.text_model.layers.0.self_attn.q_proj"]

"""model.adapter: training that continues from a saved adapter, as preferences after supervised fine-tuning."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model

from smolvlm_exp.engine.fingerprint import base_digests
from smolvlm_exp.models.adapter import lora_config
from smolvlm_exp.models.model import load_finetuned_model, load_model
from smolvlm_exp.runs.checkpoint import damage
from smolvlm_exp.tasks.train import train
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import read_json
from smolvlm_exp.utils.paths import PACKAGE
from tests.conftest import QUICK, SIGMOID, compose

METRICS = ("preference_accuracy", "recall", "yes_no_accuracy", "wrong_image_drop")


@pytest.fixture
def quick(quick):
    """On the embedded model: the saved adapters are its own."""
    return partial(quick, "model.id=embedded")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder and the summary of a run of supervised fine-tuning."""
    folder = tmp_path_factory.mktemp("sft")
    cache = f"trainer.cache={folder}/cache"
    saved = ("trainer.save_strategy=steps", "trainer.save_steps=3")
    sizes = ("adapter.r=4", "adapter.lora_alpha=4")
    sft = compose(*QUICK, cache, "trainer=sft", "trainer.learning_rate=5e-3", *sizes, *saved)
    return folder, train(sft, folder)


@pytest.mark.parametrize("engine", ["shared", pytest.param("stock", marks=pytest.mark.slow)])
def test_preferences_after_supervised_fine_tuning(quick, tuned, tmp_path, engine):
    folder, first = tuned
    sizes = ("adapter.r=4", "adapter.lora_alpha=4")
    config = quick(*SIGMOID, *sizes, f"trainer.engine={engine}", f"model.adapter={folder}")
    summary = train(config, tmp_path)
    verdicts = {check["id"]: check["verdict"] for check in summary["checks"]}
    assert summary["train"]["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert verdicts["reference_at_start"] == "ok"
    assert verdicts["parameters_moved"] == "ok"
    assert verdicts["adapter_reload"] == "ok"
    for name in METRICS:  # it begins where the other ended
        assert summary["before"][name] == pytest.approx(first["after"][name], abs=1e-4)
    assert summary["train"]["trainable_parameters"] == first["train"]["trainable_parameters"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.r=8"], r"model\.adapter=.* was trained with r=4, but adapter\.r is 8: set adapter\.r=4\."),
        (["adapter=lora"], r"use_dora=True, but adapter\.use_dora is False: set adapter\.use_dora=true\."),
        (["adapter.target=recipe"], r"adapts 42 layers, but adapter\.target=recipe matches \d+"),
        (["adapter=none", "quant=none"], r"adapter=none exclude each other"),
    ],
)
def test_settings_that_differ_from_the_saved_adapters_are_refused(quick, tuned, tmp_path, overrides, message):
    folder, _ = tuned
    with pytest.raises(RequestError, match=message):
        train(quick("adapter.r=4", "adapter.lora_alpha=4", f"model.adapter={folder}", *overrides), tmp_path)


def test_adapter_and_checkpoints_carry_the_run_s_card(tuned):
    folder, summary = tuned
    for place in (folder / "adapter", folder / "checkpoints" / "checkpoint-3"):
        card = ModelCard.load(place / "README.md")
        assert (card.data.library_name, card.data.license) == ("peft", "apache-2.0")
        assert "More Information Needed" not in card.content
        assert str(PACKAGE) not in card.content
        assert "# tiny tuned on shapes" in card.content
        assert "DoRA, r = 4 on a 4-bit base" in card.content
        assert "`shapes`, split `train`, 16 rows" in card.content
        assert "trainer.learning_rate: 0.005" in card.content
    result = ModelCard.load(folder / "adapter" / "README.md").content
    (row,) = (line for line in result.splitlines() if line.startswith("| preference_accuracy |"))
    for part in ("before", "after"):
        assert f"{summary[part]['preference_accuracy']:.3f} (" in row
    assert "4 held-out rows, 95 % intervals" in result
    assert damage(folder / "checkpoints" / "checkpoint-3") == ""


def test_an_adapter_of_another_base_is_refused_by_name_and_by_weights(quick, tuned, monkeypatch):
    folder, _ = tuned
    recorded = read_json(folder / "adapter" / "base.json")
    assert (recorded["id"], recorded["commit"]) == ("embedded", None)
    sizes = ("adapter.r=4", "adapter.lora_alpha=4", f"model.adapter={folder}")
    for quant in ("nf4", "none"):  # of linear layers in 4 bits nothing is known: the others tell
        config = quick(*sizes, f"quant={quant}")
        assert load_finetuned_model(config.model, config.quant, config.adapter, 0)
    own = base_digests(load_model(quick().model))
    assert own.keys() == {"linear", "rest"}
    assert recorded["digests"] == {"rest": own["rest"]}
    config = quick(*sizes, "model.weights=random", "quant=none")
    with pytest.raises(RequestError, match=r"was trained on other weights than this base has: on embedded\.\n"):
        load_finetuned_model(config.model, config.quant, config.adapter, 0)
    monkeypatch.setattr("smolvlm_exp.models.model.load_model", lambda *args: pytest.fail("the base was loaded"))
    with pytest.raises(RequestError, match=r"was trained on embedded, and model.id is some/other"):
        load_finetuned_model(replace(config.model, id="some/other"), config.quant, config.adapter, 0)


def test_a_base_is_the_same_in_another_precision_and_under_an_adapter(quick):
    model = load_model(quick().model)
    digests = base_digests(model)
    assert base_digests(copy.deepcopy(model).bfloat16()) == digests
    assert base_digests(copy.deepcopy(model).half()) == {}
    adapted = get_peft_model(copy.deepcopy(model), lora_config(quick().adapter, quantised=False))
    assert base_digests(adapted) == digests
    with torch.no_grad():
        model.model.text_model.layers[3].mlp.up_proj.weight[5, 7] += 0.1  # as a merged adapter leaves it
    changed = base_digests(model)
    assert changed["rest"] == digests["rest"]
    assert changed["linear"] != digests["linear"]


def test_a_folder_without_an_adapter_is_refused(quick, tmp_path):
    with pytest.raises(RequestError, match=r"there is no adapter_config\.json in it or in its adapter/"):
        train(quick(f"model.adapter={tmp_path}"), tmp_path)

"""model.adapter: training that continues from a saved adapter, as preferences after supervised fine-tuning."""

import math

import pytest

from smolvlm_exp.tasks.train import train
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import QUICK, SIGMOID, compose

METRICS = ("preference_accuracy", "recall", "yes_no_accuracy", "wrong_image_drop")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder and the summary of a run of supervised fine-tuning."""
    folder = tmp_path_factory.mktemp("sft")
    cache = f"trainer.cache={folder}/cache"
    sft = compose(*QUICK, cache, "trainer=sft", "trainer.learning_rate=5e-3", "adapter.r=4", "adapter.lora_alpha=4")
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


def test_a_folder_without_an_adapter_is_refused(quick, tmp_path):
    with pytest.raises(RequestError, match=r"there is no adapter_config\.json in it or in its adapter/"):
        train(quick(f"model.adapter={tmp_path}"), tmp_path)

"""Other projects' names of settings lead to ours."""

import re

import pytest

from smolvlm_exp.config.aliases import MEANT, NAMES, setting_meant
from smolvlm_exp.config.schema import every_key
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose


def test_what_is_meant_exists():
    groups = {"trainer", "adapter", "quant", "data", "tracker", "resume", "name"}
    for meant in NAMES:
        for key in re.findall(r"[a-z_]+\.[a-z_]+(?=\W|$)", meant):
            assert key in every_key() or key == "hydra.run", (meant, key)
        assert "." in meant.split(",")[0] or meant.split(",")[0] in groups | {"CUDA_VISIBLE_DEVICES in the environment"}


def test_other_names_are_no_settings_of_ours():
    ours = {key.rpartition(".")[2] for key in every_key()}
    elsewhere = {"r", "algorithm", "project", "precision", "load_in_4bit"}  # right behind their group's name
    assert MEANT.keys() & ours == elsewhere
    assert len(MEANT) >= 70


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("lr=1e-4", "lr: no such setting. Here it is trainer.learning_rate."),
        ("trainer.epochs=2", "trainer.epochs: no such setting. Here it is trainer.num_train_epochs."),
        ("lora_r=8", "lora_r: no such setting. Here it is adapter.r."),
        ("wandb=true", "wandb: no such setting. Did you mean tracker.wandb?"),
        ("zzz=8", "zzz: no such setting."),
    ],
)
def test_an_other_name_is_answered_with_ours(typed, said):
    with pytest.raises(RequestError) as error:
        compose(typed)
    assert str(error.value) == said


def test_nothing_is_guessed_where_nothing_is_near():
    assert setting_meant("frobnicate", every_key()) == ""
    assert setting_meant("trainer.learning_rat", every_key()) == "Did you mean trainer.learning_rate? "

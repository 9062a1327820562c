"""A trainer is complete when it is built."""

import json
from importlib import import_module

import pytest
from transformers import TrainerCallback

from smolvlm_exp.evaluation.held_out import HeldOut
from smolvlm_exp.models.adapter import lora_config
from smolvlm_exp.models.model import load_model
from smolvlm_exp.training.arguments import TrainerInputs
from smolvlm_exp.utils.errors import RequestError

STEP = ("adapter.r=2", "quant=none", "trainer.max_steps=1", "trainer.save_strategy=steps", "trainer.save_steps=1")


class Counter(TrainerCallback):
    steps = 0

    def on_step_end(self, *args, **kwargs):
        self.steps += 1


@pytest.mark.parametrize("name", ["dpo", "sft"])
@pytest.mark.parametrize("engine", ["shared", "stock"])
def test_a_built_trainer_trains_without_the_pipeline(quick, rows, processor, tmp_path, name, engine):
    config = quick(*STEP, f"trainer={name}", f"trainer.engine={engine}", "trainer.not_finite_limit=7")
    algorithm, counter = import_module(f"smolvlm_exp.training.{name}"), Counter()
    arguments = algorithm.build_arguments(config.trainer, tmp_path, "auto", None, 0)
    peft_config, identity = lora_config(config.adapter, quantised=False), {"run": "this one"}
    inputs = TrainerInputs(
        load_model(config.model),
        peft_config,
        HeldOut(rows, processor, 8, None),
        [counter],
        tmp_path,
        identity,
    )
    trainer = algorithm.build_trainer(config.trainer, arguments, inputs)
    assert type(trainer).__name__ == ("Engine" if engine == "shared" else "Stock") + name.upper() + "Trainer"
    assert trainer.guard.limit == 7
    assert not {"PrinterCallback", "ProgressCallback"} & {type(c).__name__ for c in trainer.callback_handler.callbacks}
    trainer.train()
    assert counter.steps == 1
    saved = tmp_path / "checkpoints" / "checkpoint-1"
    assert json.loads((saved / "run.json").read_text()) == identity
    assert (saved / "manifest.json").is_file()


def test_the_reward_scale_is_beta_where_there_is_one(quick):
    assert quick("trainer.beta=0.3").trainer.reward_scale == 0.3
    assert quick("trainer=sft").trainer.reward_scale == 1


def test_a_single_step_has_a_rate_and_no_step_is_refused(quick, tmp_path):
    def arguments(*overrides):
        config = quick("trainer.warmup_steps=0.05", "trainer.learning_rate=1e-3", *overrides).trainer
        return import_module("smolvlm_exp.training.dpo").build_arguments(config, tmp_path, "float32", None, 0)

    assert arguments("trainer.max_steps=1").get_warmup_steps(1) == 0
    assert arguments("trainer.max_steps=1", "trainer.warmup_steps=1").get_warmup_steps(1) == 1  # as it was asked for
    assert arguments("trainer.max_steps=40").get_warmup_steps(40) == 2
    with pytest.raises(RequestError, match=r"trainer.max_steps=0 trains nothing: task=evaluate shows"):
        arguments("trainer.max_steps=0")

"""Direct preference optimisation (arXiv 2305.18290) and its kin: TRL's DPOTrainer with every loss it offers."""

import contextlib
import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smolvlm_exp.models.adapter import plain_initialisation
from smolvlm_exp.training.arguments import (
    RunContext,
    TrainerConfig,
    TrainerInputs,
    attach_adapter,
    build_trl_config,
    finalise_trainer,
    training_arguments,
)
from smolvlm_exp.training.engine_setup import build_engine_trainer, disk_cache
from smolvlm_exp.training.memory_budget import plan_memory
from smolvlm_exp.utils.fields import above, at_least, one_of, some_of

if TYPE_CHECKING:
    from trl import DPOConfig, DPOTrainer


LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip


@dataclass
class Config(TrainerConfig):
    """Names and meanings are trl.DPOConfig's own."""

    loss_type: list[str] = some_of(*LOSSES)
    loss_weights: list[float] | None = None  # one for each loss_type; null: 1 each
    beta: float = above(0, 0.1)  # how dear it is to leave the reference
    label_smoothing: float = at_least(0, 0.0)
    f_divergence_type: str = one_of("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    ld_alpha: float | None = None  # LD-DPO: weight of the tokens past the shorter answer's length
    use_weighting: bool = False  # WPO
    disable_dropout: bool = True  # TRL's default; adapter.lora_dropout then has no effect


OWN = tuple(name for name in Config.__dataclass_fields__ if name not in TrainerConfig.__dataclass_fields__)


def build_arguments(config: Config, run: RunContext) -> "DPOConfig":
    """TRL's configuration, before anything else is built, so that what it refuses is refused early."""
    from trl import DPOConfig

    return build_trl_config(DPOConfig, training_arguments(config, run, OWN))


def build_trainer(config: Config, arguments: "DPOConfig", parts: TrainerInputs) -> "DPOTrainer":
    """TRL's trainer, on the engine or as it is."""
    return (build_shared if config.engine == "shared" else build_stock)(config, arguments, parts)


def build_shared(config: Config, arguments: "DPOConfig", parts: TrainerInputs) -> "DPOTrainer":
    """On the engine. The reference is the policy before its first step, once for all rows."""
    from smolvlm_exp.engine.inputs.dataset import PackedDataset
    from smolvlm_exp.engine.trainers import SharedPrefixDPOTrainer

    trainer = build_engine_trainer(SharedPrefixDPOTrainer, PackedDataset, config, arguments, parts)
    trainer.score_references(disk_cache(config), arguments.per_device_eval_batch_size)
    plan_memory(config, trainer)
    return finalise_trainer(trainer, config)


def build_stock(config: Config, arguments: "DPOConfig", parts: TrainerInputs) -> "DPOTrainer":
    """As it is. The reference is the same model with its adapter off, or a copy where there is no adapter."""
    from peft import PeftModel
    from trl import DPOTrainer

    from smolvlm_exp.training.checkpointing import reliable

    model, peft_config = attach_adapter(parts, arguments.seed)
    adapted = isinstance(model, PeftModel)
    # Where the adapter is on already, TRL keeps a second, frozen copy of it as the reference.
    with plain_initialisation(model) if adapted else contextlib.nullcontext():
        trainer = reliable(DPOTrainer)(
            model=model,
            ref_model=None if adapted or peft_config else copy.deepcopy(model),
            args=arguments,
            train_dataset=parts.preferences.train,
            eval_dataset=parts.preferences.test if config.eval_strategy != "no" else None,
            processing_class=parts.processor,
            peft_config=peft_config,
            callbacks=parts.callbacks,
        )
    return finalise_trainer(trainer, config)

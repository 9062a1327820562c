"""Supervised fine-tuning on the chosen answers: TRL's SFTTrainer, the loss on the answer's tokens alone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smolvlm_exp.training.arguments import (
    RunContext,
    TrainerConfig,
    TrainerInputs,
    attach_adapter,
    build_trl_config,
    finalise_trainer,
    training_arguments,
)
from smolvlm_exp.training.engine_setup import build_engine_trainer
from smolvlm_exp.training.memory_budget import plan_memory

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer


@dataclass
class Config(TrainerConfig):
    """Names and meanings are trl.SFTConfig's own."""


def build_arguments(config: Config, run: RunContext) -> "SFTConfig":
    """TRL's configuration, before anything else is built, so that what it refuses is refused early."""
    from trl import SFTConfig

    return build_trl_config(SFTConfig, {"completion_only_loss": True, **training_arguments(config, run, own=())})


def build_trainer(config: Config, arguments: "SFTConfig", parts: TrainerInputs) -> "SFTTrainer":
    """TRL's trainer on prompt and chosen answer, on the engine or as it is."""
    return (build_shared if config.engine == "shared" else build_stock)(config, arguments, parts)


def build_shared(config: Config, arguments: "SFTConfig", parts: TrainerInputs) -> "SFTTrainer":
    """On the engine."""
    from smolvlm_exp.engine.trainers import ChosenDataset, SharedPrefixSFTTrainer

    trainer = build_engine_trainer(SharedPrefixSFTTrainer, ChosenDataset, config, arguments, parts)
    plan_memory(config, trainer, pairs=False)
    return finalise_trainer(trainer, config)


def build_stock(config: Config, arguments: "SFTConfig", parts: TrainerInputs) -> "SFTTrainer":
    """As it is."""
    from trl import SFTTrainer

    from smolvlm_exp.training.checkpointing import reliable

    model, peft_config = attach_adapter(parts, arguments.seed)
    return finalise_trainer(
        reliable(SFTTrainer)(
            model=model,
            args=arguments,
            train_dataset=completions(parts.preferences.train),
            eval_dataset=completions(parts.preferences.test) if config.eval_strategy != "no" else None,
            processing_class=parts.processor,
            peft_config=peft_config,
            callbacks=parts.callbacks,
        ),
        config,
    )


def completions(rows: "Dataset") -> "Dataset":
    return rows.rename_column("chosen", "completion").select_columns(["images", "prompt", "completion"])

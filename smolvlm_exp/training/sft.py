"""Supervised fine-tuning on the chosen answers: TRL's SFTTrainer, the loss on the answer's tokens alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smolvlm_exp.training.arguments import (
    TrainerConfig,
    TrainerInputs,
    attach_pissa_adapter,
    build_trl_config,
    training_arguments,
)
from smolvlm_exp.training.engine_setup import attach_adapter, packed_collators, precompute_images
from smolvlm_exp.training.memory_budget import plan_memory

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer


@dataclass
class Config(TrainerConfig):
    """Names and meanings are trl.SFTConfig's own."""


def build_arguments(config: Config, folder: Path, dtype: str, max_length: int | None, seed: int) -> "SFTConfig":
    """TRL's configuration, before anything else is built, so that what it refuses is refused early."""
    from trl import SFTConfig

    return build_trl_config(
        SFTConfig, {"completion_only_loss": True, **training_arguments(config, folder, dtype, max_length, seed)}
    )


def build_trainer(config: Config, arguments: "SFTConfig", inputs: TrainerInputs) -> "SFTTrainer":
    """TRL's trainer on prompt and chosen answer, ready to train; on the engine, or as it is."""
    from smolvlm_exp.training.trainers import EngineSFTTrainer, StockSFTTrainer

    common = inputs.common(config, arguments)
    if config.engine == "stock":
        model, peft_config = attach_pissa_adapter(inputs, arguments.seed)
        rows = inputs.preferences
        return StockSFTTrainer(
            model,
            train_dataset=completions(rows.train),
            eval_dataset=completions(rows.test) if config.eval_strategy != "no" else None,
            peft_config=peft_config,
            **common,
        )
    from smolvlm_exp.engine.inputs.tiles import pixels
    from smolvlm_exp.engine.trainers import ChosenDataset

    model = attach_adapter(inputs, arguments)
    collator, eval_collator = packed_collators(config, inputs, ChosenDataset)
    precompute_images(config, model, inputs.processor, (collator, eval_collator))
    trainer = EngineSFTTrainer(
        model, collator=collator, eval_collator=eval_collator, normalise=pixels(inputs.processor), **common
    )
    plan_memory(config, trainer, pairs=False)
    return trainer


def completions(rows: "Dataset") -> "Dataset":
    return rows.rename_column("chosen", "completion").select_columns(["images", "prompt", "completion"])

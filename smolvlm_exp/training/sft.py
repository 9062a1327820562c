"""Supervised fine-tuning on the chosen answers: TRL's SFTTrainer, the loss on the answer's tokens alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smolvlm_exp.training.arguments import TrainerConfig, TrainerInputs, attach_pissa_adapter, build_trl_config

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer


@dataclass
class Config(TrainerConfig):
    """Names and meanings are trl.SFTConfig's own."""

    @property
    def needs_rejected(self) -> bool:
        return False


def build_arguments(config: Config, folder: Path, dtype: str, max_length: int | None, seed: int) -> "SFTConfig":
    """TRL's configuration, before anything else is built, so that what it refuses is refused early."""
    from trl import SFTConfig

    return build_trl_config(SFTConfig, config, folder, dtype, max_length, seed, completion_only_loss=True)


def build_trainer(config: Config, arguments: "SFTConfig", inputs: TrainerInputs) -> "SFTTrainer":
    """TRL's trainer on prompt and chosen answer, ready to train; on the engine, or as it is."""
    from smolvlm_exp.training.engine_setup import engine_inputs, prepare_rows
    from smolvlm_exp.training.memory_budget import plan_memory
    from smolvlm_exp.training.trainers import EngineSFTTrainer, StockSFTTrainer

    if config.engine == "shared":
        trainer = EngineSFTTrainer(**engine_inputs(config, arguments, inputs, pairs=False))
        prepare_rows(trainer, config)
        plan_memory(config, trainer, pairs=False)
        return trainer
    model, peft_config = attach_pissa_adapter(inputs, arguments.seed)
    train, *test = map(completions, inputs.splits(config))
    return StockSFTTrainer(
        model,
        train_dataset=train,
        eval_dataset=test[0] if test else None,
        peft_config=peft_config,
        **inputs.common(config, arguments),
    )


def completions(rows: "Dataset") -> "Dataset":
    return rows.rename_column("chosen", "completion").select_columns(["images", "prompt", "completion"])

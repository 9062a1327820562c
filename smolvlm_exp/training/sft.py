"""Supervised fine-tuning on the chosen answers: TRL's SFTTrainer, the loss on the answer's tokens alone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smolvlm_exp.adapter import attach_pissa, is_pissa
from smolvlm_exp.training.common import Parts, Run, TrainerConfig, settle, training_arguments, upstream

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer


@dataclass
class Config(TrainerConfig):
    """Names and meanings are trl.SFTConfig's own."""


def build_arguments(config: Config, run: Run) -> "SFTConfig":
    """TRL's configuration, before anything else is built, so that what it refuses is refused early."""
    from trl import SFTConfig

    return upstream(SFTConfig, {"completion_only_loss": True, **training_arguments(config, run, own=())})


def build_trainer(config: Config, arguments: "SFTConfig", parts: Parts) -> "SFTTrainer":
    """TRL's trainer on prompt and chosen answer."""
    from trl import SFTTrainer

    model: Any = parts.model
    peft_config = parts.peft_config
    if peft_config is not None and is_pissa(peft_config):
        model, peft_config = attach_pissa(model, peft_config, parts.folder, arguments.seed), None
    return settle(
        SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=completions(parts.preferences.train),
            eval_dataset=completions(parts.preferences.test) if config.eval_strategy != "no" else None,
            processing_class=parts.processor,
            peft_config=peft_config,
            callbacks=parts.callbacks,
        )
    )


def completions(rows: "Dataset") -> "Dataset":
    return rows.rename_column("chosen", "completion").select_columns(["images", "prompt", "completion"])

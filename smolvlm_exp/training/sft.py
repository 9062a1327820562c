"""Supervised fine-tuning on the chosen answers: TRL's SFTTrainer, the loss on the answer's tokens alone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smolvlm_exp.training.arguments import Parts, Run, TrainerConfig, settle, training_arguments, upstream, with_pissa
from smolvlm_exp.training.engine_setup import build
from smolvlm_exp.training.memory_budget import fit

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
    """TRL's trainer on prompt and chosen answer, on the engine or as it is."""
    return (build_shared if config.engine == "shared" else build_stock)(config, arguments, parts)


def build_shared(config: Config, arguments: "SFTConfig", parts: Parts) -> "SFTTrainer":
    """On the engine."""
    from smolvlm_exp.engine.trainers import ChosenRows, SharedPrefixSFTTrainer

    trainer = build(SharedPrefixSFTTrainer, ChosenRows, config, arguments, parts)
    fit(config, trainer, pairs=False)
    return settle(trainer, config)


def build_stock(config: Config, arguments: "SFTConfig", parts: Parts) -> "SFTTrainer":
    """As it is."""
    from trl import SFTTrainer

    from smolvlm_exp.training.checkpointing import reliable

    model, peft_config = with_pissa(parts, arguments.seed)
    return settle(
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

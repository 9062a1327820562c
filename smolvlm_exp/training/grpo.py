"""Group relative policy optimisation (arXiv 2402.03300) and its kin: TRL's GRPOTrainer with every loss it offers.

Answers are sampled from the model itself and scored by rewards (group `reward`), so rows need something true about
their images, and no pair of answers.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.models.adapter import plain_initialisation
from smolvlm_exp.training.arguments import (
    TrainerConfig,
    TrainerInputs,
    attach_pissa_adapter,
    build_trl_config,
    refuse_stock_only,
)
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.fields import above, at_least, one_of

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

STOCK_ONLY = (
    "cast_lm_head_to_fp32", "chat_template_kwargs", "generation_kwargs", "min_p", "off_policy_mask_threshold",
    "use_adaptive_entropy", "use_transformers_continuous_batching", "use_vllm",
)  # fmt: skip


@dataclass
class Config(TrainerConfig):
    """Names and meanings are trl.GRPOConfig's own."""

    loss_type: str = one_of("dr_grpo", "dapo", "grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
    num_generations: int = at_least(2, 8)  # answers to a prompt: a group
    max_completion_length: int = at_least(1, 192, most=65536)  # tokens of an answer
    temperature: float = above(0, 1.0)
    top_p: float = above(0, 1.0, most=1)
    top_k: int = at_least(0, 0)  # 0: all
    beta: float = at_least(0, 0.0)  # KL strength; 0: no reference
    num_iterations: int = at_least(1, 1)  # steps on the same answers
    steps_per_generation: int | None = at_least(1, None)  # null: gradient_accumulation_steps
    epsilon: float = above(0, 0.2)  # ratios are clipped to 1 - epsilon ... 1 + epsilon_high
    epsilon_high: float | None = above(0, None)  # null: epsilon
    scale_rewards: str = one_of("group", "batch", "none")  # deviation that advantages are divided by
    importance_sampling_level: str = one_of("token", "sequence")
    mask_truncated_completions: bool = True  # answers cut at max_completion_length teach nothing
    disable_dropout: bool = True

    @property
    def group_size(self) -> int:
        return self.num_generations

    @property
    def held_out_metrics(self) -> tuple[str, ...]:
        return ("reward", "loss")

    @property
    def samples_answers(self) -> bool:
        return True


def build_arguments(config: Config, folder: Path, dtype: str, max_length: int | None, seed: int) -> "GRPOConfig":
    """TRL's configuration, before anything else is built, so that what it refuses is refused early."""
    from trl import GRPOConfig

    arguments: GRPOConfig = build_trl_config(GRPOConfig, config, folder, dtype, max_length, seed)
    check_arguments(config, arguments)
    return arguments


def check_arguments(config: Config, arguments: "GRPOConfig") -> None:
    """Raises:
    RequestError: the engine cannot sample like this, or a process would get a part of a group.
    """
    if config.engine == "stock":
        return
    if shards_weights(arguments):
        raise RequestError(
            "trainer=grpo samples answers from whole weights, and FSDP or DeepSpeed shards them.\n"
            "Start it without them: accelerate launch --multi_gpu (DDP), or one process and quant=nf4."
        )
    refuse_stock_only(config, STOCK_ONLY)
    if config.extra.get("repetition_penalty", 1.0) != 1.0:
        raise RequestError("trainer.extra.repetition_penalty needs trainer.engine=stock.")
    steps = arguments.steps_per_generation or 1
    own = config.per_device_train_batch_size * steps
    if own % config.num_generations:
        raise RequestError(
            f"A process samples {own} answers (trainer.per_device_train_batch_size x {steps}), which are "
            f"no whole groups of trainer.num_generations={config.num_generations}."
        )


def shards_weights(arguments: "GRPOConfig") -> bool:
    """Whether the launcher or the arguments ask for FSDP or DeepSpeed."""
    asked = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    return asked or bool(arguments.fsdp or arguments.deepspeed)


def build_trainer(config: Config, arguments: "GRPOConfig", inputs: TrainerInputs) -> "GRPOTrainer":
    """TRL's trainer, ready to train; on the engine, or as it is."""
    from peft import PeftModel

    from smolvlm_exp.engine.grpo_trainer import Examples
    from smolvlm_exp.rewards.build import ASK_THE_MODEL
    from smolvlm_exp.training.engine_setup import engine_inputs, prepare_rows
    from smolvlm_exp.training.grpo_trainers import COLUMNS, EngineGRPOTrainer, StockGRPOTrainer
    from smolvlm_exp.training.memory_budget import plan_memory
    from smolvlm_exp.training.on_policy_callback import OnPolicyCallback

    rewards = inputs.rewards
    assert rewards is not None
    arguments.reward_weights = list(rewards.weights.values())
    arguments.multi_objective_aggregation = rewards.aggregation
    inputs.callbacks.append(OnPolicyCallback(config, inputs.folder))
    train, *test = inputs.splits(config)
    check_rows(config, arguments, len(train))
    if config.engine == "stock" and set(ASK_THE_MODEL) & set(rewards.functions):
        raise RequestError("reward.weights.image_dependence needs trainer.engine=shared.")
    functions: dict[str, Any] = {"reward_funcs": list(rewards.functions.values())}
    if config.engine == "shared":
        own = engine_inputs(config, arguments, inputs)
        check_reference(config, own["model"])
        examples = Examples(train.select_columns(COLUMNS), test[0].select_columns(COLUMNS) if test else None)
        trainer = EngineGRPOTrainer(**own, **functions, examples=examples)
        prepare_rows(trainer, config)
        plan_memory(config, trainer)
        return trainer
    model, peft_config = attach_pissa_adapter(inputs, arguments.seed)
    columns = ["images", *COLUMNS]
    arguments.remove_unused_columns = False  # reward functions are given all of them
    with plain_initialisation(model) if isinstance(model, PeftModel) else contextlib.nullcontext():
        return StockGRPOTrainer(
            model,
            train_dataset=numbered(train, columns),
            eval_dataset=numbered(test[0], columns) if test else None,
            peft_config=peft_config,
            **functions,
            **inputs.common(config, arguments),
        )


def check_rows(config: Config, arguments: "GRPOConfig", rows: int) -> None:
    """Raises:
    RequestError: there are fewer training rows than answers are sampled to at a time; TRL's loader would be empty.
    """
    sampled = (arguments.generation_batch_size or 0) // config.num_generations
    if rows < sampled:
        raise RequestError(
            f"data.train has {rows} rows, and answers to {sampled} are sampled at a time "
            f"({arguments.generation_batch_size} answers, trainer.num_generations={config.num_generations} a row): "
            "lower trainer.gradient_accumulation_steps or trainer.per_device_train_batch_size."
        )


def numbered(rows: "Dataset", columns: list[str]) -> "Dataset":
    """These columns, and `row`, the rows' numbers."""
    return rows.select_columns(columns).add_column("row", list(range(len(rows))))


def check_reference(config: Config, model: Any) -> None:
    """Raises:
    RequestError: the reference of the KL term is not the model with its adapter off.
    """
    from peft import PeftModel

    from smolvlm_exp.engine.trainers import adds_nothing

    if config.beta and not (isinstance(model, PeftModel) and adds_nothing(model)):
        raise RequestError(
            f"trainer.beta={config.beta:g}: the reference is the model without its adapter, so it needs a fresh "
            "adapter that begins as nothing (adapter=lora or dora, no model.adapter). Leave beta at 0, or use "
            "trainer.engine=stock."
        )

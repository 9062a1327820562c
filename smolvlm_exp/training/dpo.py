"""Direct preference optimisation (arXiv 2305.18290) and its kin: TRL's DPOTrainer with every loss it offers."""

import contextlib
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smolvlm_exp.models.adapter import plain_initialisation
from smolvlm_exp.training.arguments import TrainerConfig, TrainerInputs, attach_pissa_adapter, build_trl_config
from smolvlm_exp.training.loss_parts import log_loss_parts
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
    loss_weights: list[float] | None = None  # one per loss_type; null: 1 each
    beta: float = above(0, 0.1)  # KL strength; higher stays closer to the reference
    label_smoothing: float = at_least(0, 0.0, most=1)
    f_divergence_type: str = one_of("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    ld_alpha: float | None = at_least(0, None, most=1)  # LD-DPO: weight of the tokens past the shorter answer's length
    use_weighting: bool = False  # WPO
    disable_dropout: bool = True  # TRL's default; adapter.lora_dropout then has no effect

    @property
    def held_out_metrics(self) -> tuple[str, ...]:
        return (*super().held_out_metrics, "rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen")

    @property
    def reward_scale(self) -> float:
        return self.beta


def build_arguments(config: Config, folder: Path, dtype: str, max_length: int | None, seed: int) -> "DPOConfig":
    """TRL's configuration, before anything else is built, so that what it refuses is refused early."""
    from trl import DPOConfig

    return build_trl_config(DPOConfig, config, folder, dtype, max_length, seed)


def build_trainer(config: Config, arguments: "DPOConfig", inputs: TrainerInputs) -> "DPOTrainer":
    """TRL's trainer, ready to train; on the engine, or as it is."""
    from peft import PeftModel

    from smolvlm_exp.training.engine_setup import disk_cache, engine_inputs, prepare_rows
    from smolvlm_exp.training.memory_budget import plan_memory
    from smolvlm_exp.training.trainers import EngineDPOTrainer, StockDPOTrainer

    if config.engine == "shared":
        trainer = EngineDPOTrainer(**engine_inputs(config, arguments, inputs))
        log_loss_parts(trainer, deferred=True)
        live = trainer.can_be_live()
        precomputed = prepare_rows(trainer, config, twice=not live)
        trainer.score_references(disk_cache(config), live=live and not precomputed)
        plan_memory(config, trainer)
        return trainer
    model, peft_config = attach_pissa_adapter(inputs, arguments.seed)
    train, *test = inputs.splits(config)
    adapted = isinstance(model, PeftModel)
    # The reference is the model with its adapter off, or a copy where there is no adapter. Where the adapter is on
    # already, TRL keeps a second, frozen copy of it as the reference.
    with plain_initialisation(model) if adapted else contextlib.nullcontext():
        stock = StockDPOTrainer(
            model,
            ref_model=None if adapted or peft_config else copy.deepcopy(model),
            train_dataset=train,
            eval_dataset=test[0] if test else None,
            peft_config=peft_config,
            **inputs.common(config, arguments),
        )
    log_loss_parts(stock, deferred=False)
    return stock

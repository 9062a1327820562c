"""Adapter, optimizer, schedule and loss, built and stepped on a model of one layer, in a tenth of a second.

What upstream refuses there it would refuse of the real model too, but only after that is loaded.
"""

import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from PIL import Image
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import AutoModelForImageTextToText, Trainer

from smolvlm_exp.data.messages import assistant, user
from smolvlm_exp.models.adapter import AdapterConfig, lora_config
from smolvlm_exp.models.model import ModelConfig, checkpoint_processor
from smolvlm_exp.models.shape import Shape, model_config
from smolvlm_exp.training.arguments import TrainerConfig
from smolvlm_exp.training.trainers import EngineDPOTrainer, EngineSFTTrainer, StockDPOTrainer, StockSFTTrainer
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.fields import upstream_refuses

SHAPE = Shape(
    "idefics3",
    hidden_size=16,
    num_hidden_layers=1,
    intermediate_size=16,
    num_attention_heads=1,
    num_key_value_heads=1,
    vocab_size=16,
    rope_theta=1e4,
    max_position_embeddings=16,
    vision_hidden_size=16,
    vision_num_hidden_layers=1,
    vision_intermediate_size=16,
    vision_num_attention_heads=1,
    image_size=8,
    patch_size=4,
    scale_factor=2,
    image_token_id=3,
    fake_image_token_id=4,
    end_of_utterance_id=5,
)
RANK = 4  # at most: its layers have 16 columns
# Arguments of PEFT's that name layers of the real model.
REAL_LAYERS = (
    "alpha_pattern", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save", "rank_pattern",
    "target_parameters", "trainable_token_indices",
)  # fmt: skip
STEPS = 1000  # of the schedule, where epochs decide
TRAINERS: dict[tuple[str, str], Any] = {
    ("dpo", "shared"): EngineDPOTrainer, ("sft", "shared"): EngineSFTTrainer,
    ("dpo", "stock"): StockDPOTrainer, ("sft", "stock"): StockSFTTrainer,
}  # fmt: skip


class NoRows:
    """Stands for the rows, none of which is read."""

    def __len__(self) -> int:
        return 1

    def batch(self, rows: Any) -> Any:
        raise NotImplementedError


def check_upstream(trainer: TrainerConfig, adapter: AdapterConfig, dtype: str) -> None:
    """
    Raises:
        RequestError: upstream refuses the adapter, the optimizer, the schedule or the loss; it names the setting.
    """
    attempts: list[tuple[str, Any, Callable[[Any], object]]] = [
        ("adapter", adapter, small_model),
        ("trainer", trainer, lambda config: take_step(config, small_model(adapter), dtype)),
    ]
    logging.disable(logging.WARNING)  # what upstream says besides, it says again of the real model
    environment = dict(os.environ)  # where its arguments leave traces, as ACCELERATE_USE_FSDP
    try:
        with warnings.catch_warnings(action="ignore"):
            for group, config, attempt in attempts:
                try:
                    attempt(config)
                except RequestError:
                    raise
                except Exception as error:
                    raise upstream_refuses(group, config, attempt, error) from error
    finally:
        os.environ.clear()
        os.environ.update(environment)
        logging.disable(logging.NOTSET)


def small_model(config: AdapterConfig) -> Any:
    """A model of one layer, with its adapter."""
    model = AutoModelForImageTextToText.from_config(model_config(SHAPE))
    extra = {key: value for key, value in config.extra.items() if key not in REAL_LAYERS}
    peft_config = lora_config(replace(config, r=min(config.r, RANK), target="text", extra=extra), quantised=False)
    if peft_config is None:
        return model
    model = get_peft_model(model, peft_config)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("nothing would be trained")
    return model


def take_step(config: TrainerConfig, model: Any, dtype: str) -> None:
    """Optimizer and schedule take a step on gradients of 1; of DPO, the loss is computed too."""
    algorithm = import_module(f"smolvlm_exp.training.{config.algorithm}")
    with tempfile.TemporaryDirectory() as folder:
        arguments = algorithm.build_arguments(config, Path(folder), dtype, None, 0)
        trainer: Any = Trainer(model, arguments, eval_dataset=[{}])
        if cls := TRAINERS.get((config.algorithm, config.engine)):
            rows: dict[str, Any] = {"rows": NoRows(), "eval_rows": NoRows()}
            if config.engine == "stock":
                row = row_of(config.algorithm)
                rows = {"train_dataset": row, "eval_dataset": row}
            if cls is StockDPOTrainer and not isinstance(model, PeftModel):
                rows["ref_model"] = copy.deepcopy(model)
            processor = checkpoint_processor(ModelConfig(id="embedded"))
            own = {"args": arguments, "processing_class": processor, "identity": {}, "not_finite_limit": 1}
            trainer = cls(model, **rows, **own)
        trainer.create_optimizer_and_scheduler(arguments.max_steps if arguments.max_steps > 0 else STEPS)
    if isinstance(trainer, EngineDPOTrainer) and not dpo_loss(trainer).isfinite():
        raise ValueError("the loss is not finite, whatever the rows")
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    if callable(getattr(trainer.optimizer, "train", None)):
        trainer.optimizer.train()
    trainer.optimizer.step()
    if not isinstance(trainer.lr_scheduler, ReduceLROnPlateau):
        trainer.lr_scheduler.step()


def row_of(algorithm: str) -> Dataset:
    """A row as stock TRL is given it."""
    answer = [assistant("a")]
    answers = {"completion": answer} if algorithm == "sft" else {"chosen": answer, "rejected": answer}
    return Dataset.from_list([{"images": [Image.new("RGB", (8, 8))], "prompt": [user("a")], **answers}])


def dpo_loss(trainer: EngineDPOTrainer) -> torch.Tensor:
    """TRL's loss of a pair whose answers have two tokens each."""
    device = trainer.args.device
    ids, scores = torch.ones(2, 3, dtype=torch.long, device=device), torch.full((2, 2), -1.0, device=device)
    outputs = SimpleNamespace(
        log_probs=scores, entropy=-scores, mean_logits=scores, is_top1=scores > 0, log_sum_sq_probs=scores
    )
    reference = {f"ref_{side}_logps": scores[0, :1] for side in ("chosen", "rejected")}
    fields = {"input_ids": ids, "attention_mask": ids, "completion_mask": ids, **reference}
    return trainer.loss_of(outputs, fields, None)

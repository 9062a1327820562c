"""Settings that every trainer has, and how they reach transformers' training arguments."""

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.fields import above, at_least, one_of

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback

    from smolvlm_exp.data.preferences import Preferences

log = logging.getLogger(__name__)


@dataclass
class TrainerConfig:
    """Names and meanings are transformers.TrainingArguments' own, save for `sample_steps` to `cache_disk`."""

    algorithm: str = MISSING  # the module in smolvlm_exp/training
    learning_rate: float = above(0, 5.0e-5)
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = at_least(0, 0.05)  # below 1: a share of all steps
    num_train_epochs: float = above(0, 1.0)
    max_steps: int = -1  # optimiser steps; -1: num_train_epochs decides
    per_device_train_batch_size: int = at_least(1, 1)
    gradient_accumulation_steps: int = at_least(1, 16)
    per_device_eval_batch_size: int = at_least(1, 1)
    max_grad_norm: float = at_least(0, 1.0)
    weight_decay: float = at_least(0, 0.0)
    optim: str = "adamw_torch"
    gradient_checkpointing: bool = True  # of the engine's layers too, but where memory_budget decides
    logging_steps: int = at_least(1, 10)
    eval_strategy: str = one_of("steps", "epoch", "no")
    eval_steps: float | None = None  # null: as logging_steps
    save_strategy: str = one_of("steps", "epoch", "no")
    save_steps: float = above(0, 100)
    save_total_limit: int | None = 2
    dataloader_num_workers: int = at_least(0, 0)
    sample_steps: float = at_least(0, 0.25)  # between looks at what it answers; below 1: a share of all; 0: none
    memory_budget: str = "auto"  # of a GPU: auto (what is free), 8GiB, none (micro-batches as set above)
    not_finite_limit: int = at_least(1, 3)  # steps in a row whose loss or gradient is no number: then the run stops
    engine: str = one_of("shared", "stock")  # shared: each picture and prompt once a pair; stock: plain TRL
    keep_features: bool | None = None  # image features computed once; null: wherever nothing that makes them learns
    cache: str = "outputs/cache"  # where tiles, features and reference values are kept, by content, for all runs
    cache_ram: str = "4GiB"  # for tiles and features in memory
    cache_disk: str = "50GiB"  # for everything in `cache`
    extra: dict[str, Any] = field(default_factory=dict)  # further arguments of TRL's configuration

    @property
    def reward_scale(self) -> float:
        """Of the implicit reward: it is reward_scale * log(policy / reference)."""
        return 1.0


OWN_KEYS = (
    "algorithm", "sample_steps", "memory_budget", "not_finite_limit", "engine", "keep_features", "cache", "cache_ram",
    "cache_disk",
    "extra",
)  # fmt: skip


@dataclass
class TrainerInputs:
    """What a trainer is built from."""

    model: "PreTrainedModel"
    processor: "ProcessorMixin"
    peft_config: "LoraConfig | None"  # None: the adapter is on, or every weight is trained
    preferences: "Preferences"
    callbacks: "list[TrainerCallback]"
    folder: Path
    identity: dict[str, Any] = field(default_factory=dict)  # what checkpoints say of the run; see resume_check.py

    def common(self, config: TrainerConfig, arguments: Any) -> dict[str, Any]:
        """What every trainer's constructor takes."""
        return {
            "args": arguments,
            "processing_class": self.processor,
            "callbacks": self.callbacks,
            "identity": self.identity,
            "not_finite_limit": config.not_finite_limit,
        }


def training_arguments(
    config: TrainerConfig, folder: Path, dtype: str, max_length: int | None, seed: int
) -> dict[str, Any]:
    """Keyword arguments for TRL's configuration class. All processes call it together.

    Raises:
        RequestError: a length by which rows would be cut after they were checked.
    """
    import torch

    from smolvlm_exp.models.model import resolve_dtype
    from smolvlm_exp.utils.distributed import broadcast_from_rank0

    if "max_length" in config.extra:
        raise RequestError("trainer.extra.max_length: give data.max_length, by which rows are checked before.")
    on_gpu = torch.cuda.is_available()
    return {
        **{field.name: getattr(config, field.name) for field in fields(config) if field.name not in OWN_KEYS},
        "output_dir": str(broadcast_from_rank0(lambda: folder) / "checkpoints"),
        "max_length": max_length,
        # The same in one kernel, which can leave out a step without anyone waiting; see nan_guard.py.
        "optim": "adamw_torch_fused" if on_gpu and config.optim == "adamw_torch" else config.optim,
        "seed": seed,
        "bf16": resolve_dtype(dtype) is torch.bfloat16,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "report_to": "none",  # callbacks.py writes metrics.jsonl and feeds the tracker
        "logging_first_step": True,
        "remove_unused_columns": True,
        **config.extra,
    }


def build_trl_config(cls: type, arguments: dict[str, Any]) -> Any:
    """Upstream's configuration object, for one GPU a process; its own complaint is kept.

    Raises:
        RequestError: an unknown argument, or a value that upstream refuses.
    """
    try:
        found: Any = cls(**arguments)
    except (TypeError, ValueError) as error:
        raise RequestError(f"trainer: {error}") from error
    if found.n_gpu > 1:
        # Upstream would wrap the model in nn.DataParallel, which TRL refuses and the engine does not know.
        log.info(
            f"gpu: one of {found.n_gpu} is used; accelerate launch --num_processes {found.n_gpu} -m smolvlm_exp: all"
        )
        found._n_gpu = 1
    return found


def attach_pissa_adapter(inputs: TrainerInputs, seed: int) -> "tuple[Any, LoraConfig | None]":
    """Model and adapter for a trainer: a PiSSA adapter is put on here, any other by the trainer or the engine."""
    from smolvlm_exp.models.adapter import attach_pissa, is_pissa

    if inputs.peft_config is None or not is_pissa(inputs.peft_config):
        return inputs.model, inputs.peft_config
    return attach_pissa(inputs.model, inputs.peft_config, inputs.folder, seed), None

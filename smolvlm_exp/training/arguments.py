"""Settings that every trainer has, and how they become TRL's training arguments."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from smolvlm_exp.models.adapter import attach_pissa, is_pissa
from smolvlm_exp.models.model import resolve_dtype
from smolvlm_exp.utils.cores import usable_cores
from smolvlm_exp.utils.errors import RequestError, suggestion
from smolvlm_exp.utils.fields import above, at_least, one_of, upstream_refuses
from smolvlm_exp.utils.units import size_of

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback

    from smolvlm_exp.data.preferences import Preferences
    from smolvlm_exp.evaluation.held_out import HeldOut
    from smolvlm_exp.rewards.build import Rewards

log = logging.getLogger(__name__)

MOST_WORKERS = 8  # that prepare batches, if the machine's cores decide

TRAINER_ELSEWHERE = {  # arguments of TRL's that other settings are
    "max_length": "data.max_length", "output_dir": "hydra.run.dir", "seed": "seed", "run_name": "name",
    **dict.fromkeys(("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"), "model.dtype"),
    "use_cpu": "CUDA_VISIBLE_DEVICES= in the environment", "resume_from_checkpoint": "resume",
    "report_to": "tracker", "project": "tracker.project",
    "activation_checkpointing": "trainer.gradient_checkpointing", "model_init_kwargs": "model.extra",
    "logging_nan_inf_filter": "trainer.not_finite_limit", "reward_weights": "reward.weights",
    "multi_objective_aggregation": "reward.multi_objective_aggregation",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "log_completions_hub_repo"), "export.push_to_hub"),
}  # fmt: skip

UNRESUMABLE = ("save_only_model", "ignore_data_skip", "enable_jit_checkpoint")  # upstream's


@dataclass
class TrainerConfig:
    """Names and meanings are transformers' own, except `sample_steps` to `cache_disk`."""

    algorithm: str = MISSING  # the module in smolvlm_exp/training
    learning_rate: float = above(0, 5.0e-5)
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = at_least(0, 0.05)  # below 1: a fraction of all steps
    num_train_epochs: float = above(0, 1.0)
    max_steps: int = at_least(-1, -1)  # optimizer steps; -1: num_train_epochs decides
    per_device_train_batch_size: int = at_least(1, 1)
    gradient_accumulation_steps: int = at_least(1, 16)
    per_device_eval_batch_size: int = at_least(1, 1)
    max_grad_norm: float = at_least(0, 1.0)
    weight_decay: float = at_least(0, 0.0)
    optim: str = "adamw_torch"
    gradient_checkpointing: bool = True  # unless memory_budget decides
    logging_steps: int = at_least(1, 10)
    eval_strategy: str = one_of("steps", "epoch", "no")
    eval_steps: float | None = above(0, None)  # null: as logging_steps
    save_strategy: str = one_of("steps", "epoch", "no")
    save_steps: float = above(0, 100)
    save_total_limit: int | None = at_least(1, 2)
    load_best_model_at_end: bool = False  # the result is the checkpoint of the best evaluation, which is always saved
    metric_for_best_model: str | None = None  # of held-out rows, without eval_; null: loss, with trainer=grpo reward
    early_stopping_patience: int | None = at_least(1, None)  # stop after so many evaluations without a new best one
    dataloader_num_workers: int | None = at_least(
        0, None, most=256
    )  # null: with a GPU, one per core, at most 8; else 0
    sample_steps: float = at_least(0, 0.25)  # between sample answers; below 1: a fraction of all steps; 0: none
    memory_budget: str = "auto"  # of the GPU: auto (what is free), 8GiB, none (micro-batches as set above)
    not_finite_limit: int = at_least(1, 3)  # stop after so many steps in a row whose loss or gradient is not finite
    engine: str = one_of("shared", "stock")  # shared: each image and prompt once per pair; stock: plain TRL
    keep_features: bool | None = None  # image features computed once; null: where vision and connector are frozen
    cache: str = "outputs/cache"  # tiles, features and reference log-probabilities, by content, for all runs
    cache_ram: str = "4GiB"  # for tiles and features in memory
    cache_disk: str = "50GiB"  # for everything in `cache`
    extra: dict[str, Any] = field(default_factory=dict)  # further arguments of TRL's configuration

    @property
    def pairs_per_step(self) -> int:
        """Of one process; answers, where it samples them."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def group_size(self) -> int:
        """Of how many of these one prompt has."""
        return 1

    @property
    def samples_answers(self) -> bool:
        """It trains on answers that it samples and scores, so rows need no pairs."""
        return False

    @property
    def needs_rejected(self) -> bool:
        """It trains on pairs of answers, not on the chosen one alone."""
        return True

    @property
    def held_out_metrics(self) -> tuple[str, ...]:
        """What evaluation during training measures; by the first, the best checkpoint is chosen."""
        return ("loss", "mean_token_accuracy")

    @property
    def picks_best(self) -> bool:
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    @property
    def reward_scale(self) -> float:
        """Of the implicit reward: it is reward_scale * log(policy / reference)."""
        return 1.0


OWN_KEYS = (
    "algorithm", "sample_steps", "memory_budget", "not_finite_limit", "engine", "keep_features",
    "cache", "cache_ram", "cache_disk", "extra", "load_best_model_at_end", "early_stopping_patience",
)  # fmt: skip


def budget_of(text: str) -> int | str:
    """`8GiB` -> 8589934592; `auto` and `none` stay as they are.

    Raises:
        RequestError: it is none of these.
    """
    if text in ("auto", "none"):
        return text
    size = size_of(text)
    if not size:
        raise RequestError(f"trainer.memory_budget={text} is not a size; write auto, none, 8GiB or 512MiB.")
    return size


@dataclass
class TrainerInputs:
    """What a trainer is built from."""

    model: "PreTrainedModel"
    peft_config: "LoraConfig | None"  # None: the adapter is on, or every weight is trained
    held_out: "HeldOut"
    callbacks: "list[TrainerCallback]"
    folder: Path
    identity: dict[str, Any] = field(default_factory=dict)  # what checkpoints say of the run; see resume_check.py
    rewards: "Rewards | None" = None  # of trainers that sample answers
    card: str = ""  # README.md of checkpoints

    @property
    def preferences(self) -> "Preferences":
        return self.held_out.preferences

    @property
    def processor(self) -> "ProcessorMixin":
        return self.held_out.processor

    def splits(self, config: TrainerConfig) -> "list[Dataset]":
        """The training rows, and the held-out rows where they are evaluated during training."""
        return [self.preferences.train, *([self.preferences.test] if config.eval_strategy != "no" else [])]

    def common(self, config: TrainerConfig, arguments: Any) -> dict[str, Any]:
        """What every trainer's constructor takes."""
        from smolvlm_exp.training.best_checkpoint import BestCheckpoint

        best = [BestCheckpoint(config.early_stopping_patience)] if config.picks_best else []
        return {
            "args": arguments,
            "processing_class": self.processor,
            "callbacks": [*self.callbacks, *best],
            "identity": self.identity,
            "card": self.card,
            "not_finite_limit": config.not_finite_limit,
        }


def build_trl_config(
    cls: type, config: TrainerConfig, folder: Path, dtype: str, max_length: int | None, seed: int, **defaults: Any
) -> Any:
    """TRL's configuration object, for one GPU per process. All processes call it together.

    Raises:
        RequestError: an unknown argument, or a value that upstream refuses.
    """
    import torch

    from smolvlm_exp.utils.distributed import broadcast_from_rank0

    if config.max_steps == 0:
        raise RequestError(
            "trainer.max_steps=0 trains nothing: task=evaluate shows what the model can do as it is. 1 is the least; "
            "-1: trainer.num_train_epochs decides."
        )
    if name := next((name for name in UNRESUMABLE if config.extra.get(name)), None):
        raise RequestError(
            f"trainer.extra.{name}: a run could not be resumed exactly, since checkpoints would lack a part of its "
            "state, or it would not be read: leave it out."
        )
    if config.optim.endswith("_layerwise") or config.optim in ("lomo", "adalomo"):
        raise RequestError(
            f"trainer.optim={config.optim} changes weights within the backward pass, before anybody knows whether the "
            "gradient is finite, and no checkpoint holds its state: use adamw_torch, adamw_8bit or adafactor."
        )
    on_gpu = torch.cuda.is_available()
    if not on_gpu and resolve_dtype(dtype) is torch.float16:
        raise RequestError("model.dtype=float16 trains on a GPU alone: its loss is scaled there. Use auto.")
    names = {field.name for field in fields(cls)}
    constants = {
        **defaults,
        "output_dir": str(broadcast_from_rank0(lambda: folder) / "checkpoints"),
        **({"max_length": max_length} if "max_length" in names else {}),
        "seed": seed,
        "bf16": resolve_dtype(dtype) is torch.bfloat16,
        "fp16": resolve_dtype(dtype) is torch.float16,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "report_to": "none",  # callbacks.py writes metrics.jsonl and feeds the tracker
        "logging_first_step": True,
        "remove_unused_columns": True,
        "metric_for_best_model": best_metric(config),
    }

    def build(config: TrainerConfig) -> Any:
        own = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in OWN_KEYS}
        if on_gpu and config.optim == "adamw_torch":
            # The same in one kernel, which can skip a step without waiting for the GPU; see nan_guard.py.
            own["optim"] = "adamw_torch_fused"
        if config.max_steps == 1 and config.warmup_steps < 1:
            own["warmup_steps"] = 0  # a share of one step is rounded up: the only one would have a rate of 0
        if config.dataloader_num_workers is None:
            own["dataloader_num_workers"] = min(usable_cores(), MOST_WORKERS) if on_gpu else 0  # a GPU waits for tiles
        return cls(**{**own, **constants, **config.extra})

    try:
        built: Any = build(config)
    except Exception as error:
        raise upstream_refuses("trainer", config, build, error) from error
    if built.mixed_precision != ("bf16" if built.bf16 else "fp16" if built.fp16 else "no"):
        raise RequestError(
            f"ACCELERATE_MIXED_PRECISION={built.mixed_precision} (accelerate launch --mixed_precision): the precision "
            f"is model.dtype's, here {resolve_dtype(dtype)}. Use model.dtype=bfloat16, or --mixed_precision no."
        )
    if not built.accelerator_config.use_seedable_sampler:
        raise RequestError(
            "trainer.extra.accelerator_config: without use_seedable_sampler no run could be resumed exactly."
        )
    built.load_best_model_at_end = config.load_best_model_at_end  # upstream's rule for save_steps: ours saves the best
    count = built.n_gpu
    if count > 1:  # upstream would wrap the model in nn.DataParallel, which TRL refuses
        log.info(f"Using 1 of {count} GPUs. For all: accelerate launch --num_processes {count} -m smolvlm_exp")
        built._n_gpu = 1
    return built


def best_metric(config: TrainerConfig) -> str | None:
    """The name of the metric by which the best checkpoint is chosen, where one is.

    Raises:
        RequestError: it is not measured during training.
    """
    if not config.picks_best:
        return config.metric_for_best_model
    asked = "early_stopping_patience" if not config.load_best_model_at_end else "load_best_model_at_end"
    for setting in ("eval_strategy", "save_strategy"):
        if getattr(config, setting) == "no":
            raise RequestError(f"trainer.{asked} needs trainer.{setting}=steps or epoch, and it is no.")
    metric = (config.metric_for_best_model or config.held_out_metrics[0]).removeprefix("eval_")
    if metric not in config.held_out_metrics and not (config.samples_answers and metric.startswith("rewards/")):
        raise RequestError(
            f"trainer.metric_for_best_model={metric}: {suggestion(metric, list(config.held_out_metrics))}"
        )
    return metric


def refuse_stock_only(config: TrainerConfig, names: Sequence[str]) -> None:
    """Raises:
    RequestError: `extra` sets one of these arguments of TRL's, which the engine does not know.
    """
    name = next((name for name in names if config.extra.get(name)), None)
    if name:
        raise RequestError(f"trainer.extra.{name} needs trainer.engine=stock.")


def attach_pissa_adapter(inputs: TrainerInputs, seed: int) -> "tuple[Any, LoraConfig | None]":
    """Model and adapter for a trainer; a PiSSA adapter is attached here, any other by TRL or the engine."""
    if inputs.peft_config is None or not is_pissa(inputs.peft_config):
        return inputs.model, inputs.peft_config
    return attach_pissa(inputs.model, inputs.peft_config, inputs.folder, seed), None

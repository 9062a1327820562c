"""A trainer on the engine (trainer.engine=shared): what it cannot do is told first, then its rows are made ready."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.models.adapter import AdapterConfig, matched_modules
from smolvlm_exp.models.model import ModelConfig, resolve_attention
from smolvlm_exp.training.arguments import TrainerConfig, TrainerInputs, attach_adapter
from smolvlm_exp.training.memory_budget import budget_of
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.units import bytes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from smolvlm_exp.engine.disk_cache import DiskCache
    from smolvlm_exp.engine.inputs.dataset import Collator, PackedDataset

log = logging.getLogger(__name__)


STOCK_ONLY = (
    "assistant_only_loss", "auto_find_batch_size", "deepspeed", "include_for_metrics", "include_num_input_tokens_seen",
    "label_smoothing_factor", "neftune_noise_alpha", "packing", "pad_to_multiple_of", "padding_free",
    "precompute_ref_batch_size", "precompute_ref_log_probs", "sync_ref_model", "torch_compile",
    "torch_empty_cache_steps", "train_sampling_strategy", "use_liger_kernel",
)  # fmt: skip
FEATURE_TILES = 64  # tiles that go through the tower together where their features are kept


def check_request(trainer: TrainerConfig, model: ModelConfig, adapter: AdapterConfig) -> None:
    """Before anything is loaded.

    Raises:
        RequestError: the engine, or this machine, does not do what is asked for.
    """
    resolve_attention(model.attn_implementation)
    budget_of(trainer.memory_budget)
    bytes_of("trainer.cache_ram", trainer.cache_ram)
    bytes_of("trainer.cache_disk", trainer.cache_disk)
    if trainer.engine == "stock":
        if trainer.keep_features:
            raise RequestError("trainer.keep_features=true needs trainer.engine=shared.")
        return
    if model.attn_implementation == "eager":
        raise RequestError("model.attn_implementation=eager needs trainer.engine=stock; use auto or sdpa.")
    for name in STOCK_ONLY:
        if trainer.extra.get(name):
            raise RequestError(f"trainer.extra.{name} needs trainer.engine=stock.")
    if getattr(trainer, "disable_dropout", True) is False and adapter.lora_dropout:
        log.info("engine: with dropout, both answers of a pair see the same noise on their prompt")


def check_model(trainer: TrainerConfig, adapter: AdapterConfig, model: "PreTrainedModel") -> None:
    """Raises:
    RequestError: the engine is given a model in parts; image features are to be kept though what makes them learns.
    """
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1 and trainer.engine == "shared":
        raise RequestError(
            f"model.device_map parts the model over {len(devices)} devices, which needs trainer.engine=stock; with "
            "model.device_map=auto all of it is on one GPU."
        )
    if not trainer.keep_features:
        return
    if adapter.type == "none":
        raise RequestError("trainer.keep_features=true needs an adapter: adapter=none trains the vision tower too.")
    names = matched_modules(model, adapter.target)
    found = next((name for name in names if ".vision_model." in name or ".connector." in name), None)
    if found:
        raise RequestError(
            f"trainer.keep_features=true: adapter.target={adapter.target} reaches {found}, so image features "
            "change at every step.\nUse adapter.target=text, or leave trainer.keep_features out."
        )


def disk_cache(config: TrainerConfig) -> "DiskCache":
    from smolvlm_exp.engine.disk_cache import DiskCache

    return DiskCache(Path(config.cache), bytes_of("trainer.cache_disk", config.cache_disk))


def collators(
    config: TrainerConfig, parts: TrainerInputs, max_length: int | None, kind: "type[PackedDataset]"
) -> "tuple[Collator, Collator | None]":
    """Of the training rows, and of the held-out rows where they are evaluated during training."""
    from smolvlm_exp.engine.inputs.dataset import Collator

    splits = [parts.preferences.train, *([parts.preferences.test] if config.eval_strategy != "no" else [])]
    processor: Any = parts.processor
    pad, image = processor.tokenizer.pad_token_id, processor.image_token_id
    workers = config.dataloader_num_workers
    made = [Collator(kind(rows, processor, max_length, workers), pad, image) for rows in splits]
    return made[0], made[1] if len(made) > 1 else None


def build_engine_trainer(
    kind: Any, rows: "type[PackedDataset]", config: TrainerConfig, arguments: Any, parts: TrainerInputs
) -> Any:
    """A trainer of engine/trainers.py over `rows`, its pictures ready."""
    from smolvlm_exp.engine.inputs.tiles import pixels
    from smolvlm_exp.training.checkpointing import reliable

    model, peft_config = attach_adapter(parts, arguments.seed)
    collator, eval_collator = collators(config, parts, arguments.max_length, rows)
    trainer = reliable(kind)(
        model=model,
        normalise=pixels(parts.processor),
        peft_config=peft_config,
        collator=collator,
        eval_collator=eval_collator,
        args=arguments,
        processing_class=parts.processor,
        callbacks=parts.callbacks,
    )
    precompute_images(config, trainer, parts.processor)
    return trainer


def precompute_images(config: TrainerConfig, trainer: Any, processor: Any) -> None:
    """Keep image features where nothing that makes them learns, tiles elsewhere."""
    from smolvlm_exp.engine.inputs.tiles import pixels
    from smolvlm_exp.engine.model_parts import core_of, is_trainable
    from smolvlm_exp.engine.precompute.features import keep_features

    core = core_of(trainer.model)
    features = config.keep_features is not False and not is_trainable(core.vision_model, core.connector)
    ram, workers = bytes_of("trainer.cache_ram", config.cache_ram), config.dataloader_num_workers
    for collator in (trainer.collator, trainer.eval_collator):
        if collator is None:
            continue
        if features:
            keep_features(
                collator.rows, trainer.model, pixels(processor), disk_cache(config), ram, FEATURE_TILES, workers
            )
        if collator.rows.features is None:
            collator.rows.keep_tiles(disk_cache(config), ram, workers)

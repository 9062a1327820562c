"""Before a trainer is built: requests that cannot work are refused, model, rows and images are prepared."""

import logging
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel

from smolvlm_exp.engine.disk_cache import DiskCache
from smolvlm_exp.engine.forward import Pixels
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.memory.probe import free_memory
from smolvlm_exp.engine.model_parts import core_of, is_trainable
from smolvlm_exp.engine.precompute.features import keep_features
from smolvlm_exp.engine.trainers import attach_and_fuse
from smolvlm_exp.models.adapter import (
    AdapterConfig,
    check_adapter_target,
    is_pissa,
    load_adapter,
    lora_config,
    matched_modules,
    saved_adapter,
)
from smolvlm_exp.models.model import ModelConfig, load_model, resolve_attention, resolve_dtype
from smolvlm_exp.models.quant import QuantConfig, quantization_config
from smolvlm_exp.training.arguments import (
    TrainerConfig,
    TrainerInputs,
    attach_pissa_adapter,
    budget_of,
    refuse_stock_only,
)
from smolvlm_exp.utils.cores import usable_cores
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.phases import phase
from smolvlm_exp.utils.units import bytes_of, format_bytes

log = logging.getLogger(__name__)

STOCK_ONLY = (
    "assistant_only_loss", "auto_find_batch_size", "deepspeed", "include_for_metrics", "include_num_input_tokens_seen",
    "label_smoothing_factor", "neftune_noise_alpha", "packing", "pad_to_multiple_of", "padding_free",
    "precompute_ref_batch_size", "precompute_ref_log_probs", "sync_ref_model", "torch_compile",
    "torch_empty_cache_steps", "train_sampling_strategy", "use_liger_kernel",
)  # fmt: skip


def check_request(trainer: TrainerConfig, model: ModelConfig, quant: QuantConfig, adapter: AdapterConfig) -> None:
    """Before anything is loaded.

    Raises:
        RequestError: the groups do not go together, or the engine or this machine does not support them.
    """
    lora_config(adapter, quantised=quantization_config(quant, resolve_dtype(model.dtype)) is not None)
    if model.adapter and is_pissa(adapter):
        raise RequestError(
            f"adapter=pissa starts from the base's singular vectors, not from model.adapter={model.adapter}: use "
            "adapter=lora, or leave model.adapter out."
        )
    if model.adapter:
        saved_adapter(adapter, model.adapter, model.id)
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
    refuse_stock_only(trainer, STOCK_ONLY)
    if getattr(trainer, "disable_dropout", True) is False and adapter.lora_dropout:
        log.info("engine: both answers of a pair share the dropout mask on their prompt")


@phase("model")
def load_trainable_model(
    trainer: TrainerConfig, model: ModelConfig, quant: QuantConfig, adapter: AdapterConfig, seed: int
) -> tuple[Any, LoraConfig | None]:
    """The model to train with its saved adapter (`model.adapter`), or with the configuration of a fresh one.

    Raises:
        RequestError: it cannot be loaded, or not be trained with these settings.
    """
    quantization = quantization_config(quant, resolve_dtype(model.dtype))
    peft_config = lora_config(adapter, quantised=quantization is not None)
    base = load_model(model, quantization, seed)
    check_model(trainer, adapter, base)
    if model.adapter:
        return load_adapter(base, saved_adapter(adapter, model.adapter, model.id), adapter), None
    if peft_config:
        check_adapter_target(peft_config, base, adapter.target)
        check_rank(adapter, base)
    return base, peft_config


def check_rank(adapter: AdapterConfig, model: PreTrainedModel) -> None:
    """Warn of a rank that layers cannot use.

    Raises:
        RequestError: the adapter and its gradient would not fit beside the model.
    """
    layers = dict(model.named_modules())
    sizes: Any = [
        (layers[name].in_features, layers[name].out_features) for name in matched_modules(model, adapter.target)
    ]
    ranks = [min(size) for size in sizes]
    weights = adapter.r * sum(map(sum, sizes))
    needed, free = 2 * 4 * weights, free_memory(model.device)
    if needed > free:
        raise RequestError(
            f"adapter.r={adapter.r}: {weights:,} weights and their gradients in float32 take {format_bytes(needed)}, "
            f"and {format_bytes(free)} are free. The adapted layers have a rank of {max(ranks)} at most."
        )
    above = sum(rank < adapter.r for rank in ranks)
    if above and is_pissa(adapter):
        raise RequestError(f"adapter.r={adapter.r}: PiSSA takes r singular vectors, and a layer has {min(ranks)}.")
    if above:
        log.warning(
            f"adapter: r={adapter.r} is above the rank of {above} of the {len(ranks)} layers ({min(ranks)} to "
            f"{max(ranks)}): what is above adds no more than time and memory"
        )


def check_model(trainer: TrainerConfig, adapter: AdapterConfig, model: PreTrainedModel) -> None:
    """Raises:
    RequestError: the model is split over devices; or image features are to be kept although they change.
    """
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1 and trainer.engine == "shared":
        raise RequestError(
            f"model.device_map splits the model over {len(devices)} devices, which needs trainer.engine=stock; with "
            "model.device_map=auto all of it is on one GPU."
        )
    if not trainer.keep_features:
        return
    if adapter.type == "none":
        raise RequestError("trainer.keep_features=true needs an adapter: adapter=none trains the vision tower too.")
    names = matched_modules(model, adapter.target)
    vision = next((name for name in names if ".vision_model." in name or ".connector." in name), None)
    if vision:
        raise RequestError(
            f"trainer.keep_features=true: adapter.target={adapter.target} reaches {vision}, so image features "
            "change at every step.\nUse adapter.target=text, or leave trainer.keep_features out."
        )


def disk_cache(config: TrainerConfig) -> DiskCache:
    disk, ram = bytes_of("trainer.cache_disk", config.cache_disk), bytes_of("trainer.cache_ram", config.cache_ram)
    return DiskCache(Path(config.cache), disk, ram)


def engine_inputs(config: TrainerConfig, arguments: Any, inputs: TrainerInputs, pairs: bool = True) -> dict[str, Any]:
    """What an engine trainer takes: the model fused with its adapter on, the rows packed.

    The held-out rows' images are precomputed here, since they serve their evaluation too; those of the training rows
    by `prepare_rows`, when the trainer can say which of them it will read.

    Args:
        pairs: both answers of a row are trained on; else the chosen one.
    """
    if inputs.model.device.type != arguments.device.type:  # model.device_map=null leaves it on the CPU
        inputs.model.to(arguments.device)
    model, peft_config = attach_pissa_adapter(inputs, arguments.seed)
    model = attach_and_fuse(model, peft_config, arguments)
    if config.keep_features and trains_images(model):
        raise RequestError(
            "trainer.keep_features=true: part of the vision tower or the connector is trained, so image features "
            "change at every step.\nUse adapter.target=text without adapter.extra.bias, or leave it out."
        )
    train, held_out = PackedDataset(inputs.preferences.train, inputs.processor), inputs.held_out.rows
    precompute_images(held_out, model, config, disk_cache(config), inputs.held_out.pixels)
    return {
        "model": model,
        "rows": train if pairs else train.chosen_only(),
        "eval_rows": None if config.eval_strategy == "no" else held_out if pairs else held_out.chosen_only(),
        **inputs.common(config, arguments),
    }


def trains_images(model: Any) -> bool:
    """Whether anything that makes image features is trained."""
    core = core_of(model)
    return is_trainable(core.vision_model, core.connector)


def tiling_processes(model: Any, config: TrainerConfig) -> int:
    """That cut images into tiles beside this one: a GPU would wait for one; a CPU has enough to do itself."""
    return usable_cores() if model.device.type == "cuda" else config.dataloader_num_workers or 0


def precompute_images(
    rows: PackedDataset, model: Any, config: TrainerConfig, store: DiskCache, normalise: Pixels
) -> None:
    """Features where vision tower and connector are frozen, tiles elsewhere; neither where `store` has no room."""
    workers = tiling_processes(model, config)
    if config.keep_features is not False and not trains_images(model):
        keep_features(rows, model, normalise, store, workers)
    if rows.features is None:
        rows.cache_tiles(store, workers)


def prepare_rows(trainer: Any, config: TrainerConfig, twice: bool = False) -> bool:
    """Work in proportion to the steps: of the training rows, only those that will be read are prepared.

    What does not fit into memory goes to the disk where a later epoch or another run reads it again; else the steps
    work it out themselves, and the first need not wait for the last one's rows.

    Args:
        twice: the rows are read before the first step too.

    Returns:
        Whether their images are precomputed.
    """
    rows, ahead = trainer.rows, trainer.rows_ahead()
    if len(ahead) < len(rows):
        log.info(f"engine: training reads {len(ahead):,} of {len(rows):,} rows, and only these are prepared")
    rows.keep_only(ahead)
    store, (epochs, _) = disk_cache(config), trainer.epochs_and_steps()
    store.reused = twice or epochs > 1 or config.keep_features is True or not store.ram_budget
    precompute_images(rows, trainer.model, config, store, trainer.pixels)
    return rows.precomputed

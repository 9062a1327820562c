"""The whole run on one screen: data, model, adapter, before, training, after, result."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.config.schema import Config
from smolvlm_exp.data.preferences import load_preferences
from smolvlm_exp.evaluation.checks import compare_evaluations
from smolvlm_exp.evaluation.held_out import evaluate
from smolvlm_exp.models.adapter import check_adapter_target, load_adapter, lora_config, saved_adapter
from smolvlm_exp.models.model import load_model, load_processor, resolve_dtype
from smolvlm_exp.models.quant import quantization_config
from smolvlm_exp.runs.checkpoint import newest_intact
from smolvlm_exp.runs.resume_check import check_same_run
from smolvlm_exp.tasks.result import Result
from smolvlm_exp.training.arguments import RunContext, TrainerInputs
from smolvlm_exp.training.callbacks import MetricsCallback, StopCallback
from smolvlm_exp.training.engine_setup import check_model, check_request
from smolvlm_exp.training.memory_budget import memory_cap
from smolvlm_exp.training.sample_callback import SamplesCallback
from smolvlm_exp.training.sanity_checks import ParameterMonitor
from smolvlm_exp.utils.distributed import broadcast_from_rank0

if TYPE_CHECKING:
    from transformers import TrainerCallback


def train(config: Config, folder: Path, watchers: "Sequence[TrainerCallback]" = ()) -> dict[str, Any]:
    """Tune as `config` says and write everything into `folder`; returns what summary.json holds.

    Args:
        watchers: callbacks beside the run's own.

    Raises:
        RequestError: something was asked for that cannot be done here; nothing was trained.
    """
    dtype = resolve_dtype(config.model.dtype)
    quantization = quantization_config(config.quant, dtype)
    peft_config = lora_config(config.adapter, quantised=quantization is not None)
    start = saved_adapter(config.adapter, config.model.adapter) if config.model.adapter else None
    check_request(config.trainer, config.model, config.adapter)
    settings = asdict(config)
    checkpoint = newest_intact(Path(config.resume)) if config.resume else None
    check_same_run(settings, checkpoint)
    algorithm = import_module(f"smolvlm_exp.training.{config.trainer.algorithm}")
    shared = broadcast_from_rank0(lambda: folder)  # by all processes, where there are several
    arguments = algorithm.build_arguments(
        config.trainer, RunContext(shared, config.seed, dtype, config.data.max_length)
    )

    processor = load_processor(config.model)
    preferences = load_preferences(config.data, processor, folder)
    model: Any = load_model(config.model, quantization, config.seed)
    check_model(config.trainer, config.adapter, model)
    if start:
        model, peft_config = load_adapter(model, start, config.adapter.target), None
    elif peft_config:
        check_adapter_target(peft_config, model, config.adapter.target)
    identity = check_same_run(settings, checkpoint, preferences.train, model)

    budget = memory_cap(config.trainer.memory_budget)
    with budget, Result(config, folder, preferences) as result, StopCallback() as stop:
        look = partial(
            evaluate, processor=processor, preferences=preferences, max_length=config.data.max_length,
            batch_size=config.trainer.per_device_eval_batch_size, max_new_tokens=config.task.max_new_tokens,
        )  # fmt: skip
        result.before = look(model)

        metrics = MetricsCallback(folder, result.tracker)
        shown = SamplesCallback(config.trainer.sample_steps, processor, preferences, result.before.answers, metrics)
        callbacks = [metrics, shown, stop, *watchers]
        parts = TrainerInputs(model, processor, peft_config, preferences, callbacks, folder)
        trainer = algorithm.build_trainer(config.trainer, arguments, parts)
        trainer.identity = identity
        watch = ParameterMonitor(trainer.model)
        result.training = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        result.checks = watch.checks(trainer)

        stopped = stop.agreed()  # after this there is nothing left to save for later
        if not stopped:
            tuned = trainer.accelerator.unwrap_model(trainer.model)
            beta = getattr(config.trainer, "beta", 1.0)
            result.after = look(tuned, reference=result.before.logps, beta=beta)
            result.checks += compare_evaluations(
                result.before, result.after, trainer.state.log_history, preferences.report
            )
        result.save(trainer, stopped)
    return result.summary

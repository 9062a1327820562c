"""The whole run on one screen: data, model, evaluation, training, evaluation, result."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from smolvlm_exp.config.schema import Config
from smolvlm_exp.data.preferences import Preferences, load_preferences
from smolvlm_exp.data.vocabulary import words_digest
from smolvlm_exp.evaluation.held_out import HeldOut
from smolvlm_exp.models.model import load_processor
from smolvlm_exp.models.saved_check import base_record
from smolvlm_exp.rewards.build import Rewards, checked_rewards
from smolvlm_exp.runs.checkpoint import disk_error_as_run_error, newest_intact
from smolvlm_exp.runs.resume_check import CODE, WORDS, check_same_run
from smolvlm_exp.tasks.cpu_time import log_cpu_time
from smolvlm_exp.tasks.provenance import provenance
from smolvlm_exp.tasks.result import Result
from smolvlm_exp.training.arguments import TrainerInputs
from smolvlm_exp.training.callbacks import StopCallback
from smolvlm_exp.training.dry_run import check_upstream
from smolvlm_exp.training.engine_setup import check_request, load_trainable_model
from smolvlm_exp.training.memory_budget import memory_cap

log = logging.getLogger(__name__)


def train(
    config: Config, folder: Path, watchers: Sequence[TrainerCallback] = (), preferences: Preferences | None = None
) -> dict[str, Any]:
    """Fine-tune as `config` says and write everything into `folder`; returns the content of summary.json.

    Args:
        watchers: further callbacks.
        preferences: the rows, where they are not those of the group `data`.

    Raises:
        RequestError: the request cannot work here; nothing was trained.
    """
    groups = config.trainer, config.model, config.quant, config.adapter
    check_request(*groups)
    checkpoint = newest_intact(Path(config.resume)) if config.resume else None
    check_same_run(asdict(config), checkpoint)
    check_upstream(config.trainer, config.adapter, config.model.dtype)
    algorithm = import_module(f"smolvlm_exp.training.{config.trainer.algorithm}")
    arguments = algorithm.build_arguments(
        config.trainer, folder, config.model.dtype, config.data.max_length, config.seed
    )

    log.info(f"loading processor and rows: {config.model.id}, {config.data.source}")
    processor = load_processor(config.model)
    on_policy = config.trainer.samples_answers
    if preferences is None:
        rejected = config.trainer.needs_rejected
        preferences = load_preferences(config.data, processor, folder, answers=not on_policy, rejected=rejected)
    rewards = checked_rewards(config.reward, preferences) if on_policy else None
    files = reward_files(rewards, preferences) if rewards else {}
    check_same_run(asdict(config), checkpoint, rewards=files, processor=processor)
    held_out = HeldOut(
        preferences, processor, config.trainer.per_device_eval_batch_size, config.data.max_length,
        packed=config.trainer.engine == "shared",
    )  # fmt: skip
    log.info(f"loading the model: {config.model.id}")
    model, peft_config = load_trainable_model(*groups, config.seed)
    sources = provenance(config)
    identity = check_same_run(asdict(config), checkpoint, preferences, model, files, processor, sources)
    (folder / "summary.json").unlink(missing_ok=True)  # of an end that it is trained beyond: it is not done any more
    log_cpu_time(config, model, preferences, processor)

    cap = memory_cap(config.trainer.memory_budget)
    base = base_record(model, config.model.id, sources["model"].commit)
    result = Result(config, folder, held_out, sources, base, rewards)
    with cap, result, disk_error_as_run_error(folder), StopCallback() as stop:
        callbacks = [*result.callbacks(), stop, *watchers]
        inputs = TrainerInputs(model, peft_config, held_out, callbacks, folder, identity, rewards, result.card())
        trainer = algorithm.build_trainer(config.trainer, arguments, inputs)
        result.evaluate_before(trainer)
        result.training = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if not stop.agreed():  # checked once
            with stop.skippable():
                result.evaluate_after(trainer)
        if not result.after:
            trainer.save_now()
        result.save(trainer)
    return result.summary


def reward_files(rewards: Rewards, preferences: Preferences) -> dict[str, str | None]:
    """The digests by which a resumed run's rewards are those that it began with."""
    words = words_digest(preferences.words) if preferences.words else None
    return {WORDS: words} | {f"{CODE}.{name}": sha256 for name, sha256 in rewards.hashes.items()}

"""task=evaluate: a model on held-out rows and, where it is tuned, its base on the same rows; nothing is trained."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from smolvlm_exp.config.schema import Config
from smolvlm_exp.data.preferences import Preferences, load_preferences
from smolvlm_exp.evaluation.answer_changes import AnswerChange, answer_changes, count_verdicts, save_answers
from smolvlm_exp.evaluation.checks import image_reliance, leaked_rows, policy_changed
from smolvlm_exp.evaluation.comparison import load_per_row, short_fingerprints
from smolvlm_exp.evaluation.generate import generation_speed
from smolvlm_exp.evaluation.held_out import Evaluation, HeldOut
from smolvlm_exp.evaluation.held_out import evaluate as evaluate_model
from smolvlm_exp.models.adapter import load_adapter, saved_adapter
from smolvlm_exp.models.model import load_model, load_processor, resolve_attention, resolve_dtype
from smolvlm_exp.models.quant import quantization_config
from smolvlm_exp.reporting.report import write_report
from smolvlm_exp.reporting.summary import print_results, samples, save_images, summarize
from smolvlm_exp.rewards.build import checked_rewards
from smolvlm_exp.runs.find import choices
from smolvlm_exp.tasks.cpu_time import log_cpu_time
from smolvlm_exp.tasks.provenance import code_provenance, hardware, provenance
from smolvlm_exp.tasks.tracking import tracker_of
from smolvlm_exp.training.engine_setup import disk_cache, tiling_processes
from smolvlm_exp.utils.errors import RequestError, isolated
from smolvlm_exp.utils.files import write_json
from smolvlm_exp.utils.paths import relative_to_cwd
from smolvlm_exp.utils.versions import versions

log = logging.getLogger(__name__)


def evaluate(config: Config, folder: Path) -> dict[str, Any]:
    """Base and, with `model.adapter`, the tuned model; written into `folder` as a run's result is.

    Returns:
        the content of summary.json; `before` is the base.

    Raises:
        RequestError: the request cannot work here.
    """
    batch_size = config.trainer.per_device_eval_batch_size
    sizes = tuple(config.task.batch_sizes) or (1, batch_size)
    if min(sizes) < 1:
        raise RequestError(f"task.batch_sizes={list(sizes)}: 1 is the least.")
    quantization = quantization_config(config.quant, resolve_dtype(config.model.dtype))
    resolve_attention(config.model.attn_implementation)
    adapter = saved_adapter(config.adapter, config.model.adapter, config.model.id) if config.model.adapter else None
    processor = load_processor(config.model)
    rejected = config.trainer.needs_rejected
    preferences = load_preferences(config.data, processor, folder, splits=("test",), rejected=rejected)
    columns = preferences.test.column_names
    rewards = checked_rewards(config.reward, preferences) if "truth" in columns and "rejected" not in columns else None
    log.info(f"loading the model: {config.model.id}")
    model: Any = load_model(config.model, quantization, config.seed)
    log_cpu_time(config, model, preferences, processor)
    held_out = HeldOut(preferences, processor, batch_size, config.data.max_length)
    store, task = replace(disk_cache(config.trainer), reused=False), config.task

    def evaluate_held_out(model: Any, **compared: Any) -> Evaluation:
        held_out.precompute(model.requires_grad_(False), store, tiling_processes(model, config.trainer))
        sampling = {"seed": config.seed, "temperature": task.temperature, "max_new_tokens": task.max_new_tokens}
        score = rewards.score_answers if rewards else None
        return evaluate_model(model, held_out, score=score, **compared, **sampling)

    log.info(f"evaluating {len(held_out):,} held-out rows: the base")
    before = evaluate_held_out(model)
    speed = {"base": generation_speed(model, processor, held_out.prompts(model, max(sizes)), sizes)}
    after, checks = None, []
    if adapter:
        model = load_adapter(model, adapter, config.adapter).eval()
        log.info(f"evaluating {len(held_out):,} held-out rows: tuned")
        after = evaluate_held_out(model, reference=before.logps, beta=config.trainer.reward_scale)
        speed["tuned"] = generation_speed(model, processor, held_out.prompts(model, max(sizes)), sizes)
        checks = [policy_changed(before, after), *image_reliance(before.ratios, after.ratios)]
        trained = load_per_row(adapter.parent)
        if trained:
            leaked = np.isin(short_fingerprints(preferences.prints["test"]), trained.train)
            checks.append(leaked_rows(leaked.sum()))

    sources = {**provenance(config), "code": code_provenance()}
    changes = answer_changes(preferences, before, after)
    summary = {
        "status": "done",
        "seed": config.seed,
        "settings": choices(folder),
        "sources": {name: asdict(source) for name, source in sources.items()},
        "hardware": hardware(config, model),
        "data": preferences.report,
        **summarize(before, after, checks),
        "answer_changes": count_verdicts(changes),
        "speed": {name: [asdict(at) for at in measured] for name, measured in speed.items()},
        "versions": versions(),
    }
    write_evaluation(config, folder, summary, changes, preferences)
    print_results(summary, ("base", "tuned"))
    for name, measured in speed.items():
        for at in measured:
            print(f"{name}: {at}")
    print(f"report: {relative_to_cwd(folder)}/report.html")
    return summary


def write_evaluation(
    config: Config,
    folder: Path,
    summary: dict[str, Any],
    changes: Sequence[AnswerChange],
    preferences: Preferences,
) -> None:
    """What describes it, each part isolated, and summary.json last: who reads `done` there finds all the rest."""
    shown = samples(preferences, changes)
    with isolated("answers.jsonl"):
        save_answers(folder, changes)
    with isolated("report.html"):
        write_report(folder, summary, asdict(config), shown)
        save_images(folder, shown)
    with isolated("the tracker"):
        tracker_of(config, folder, "evaluate").finish(summary, shown)
    write_json(folder / "summary.json", summary)

"""The first lines of a command, before anything is imported that takes seconds: what it works on, and how long."""

import logging
from collections.abc import Mapping
from pathlib import Path

import yaml

from smolvlm_exp.config.inputs import READ_DATA, WITHOUT_MODEL
from smolvlm_exp.config.schema import Config
from smolvlm_exp.tasks.time_estimate import estimate_time
from smolvlm_exp.utils.formatting import duration
from smolvlm_exp.utils.paths import CONF, relative_to_cwd

log = logging.getLogger(__name__)

WITHOUT_FOLDER = ("doctor", "plan", "chat", "serve", "runs")  # tasks that write none
IMPORTING = "importing PyTorch, transformers and TRL ..."
ON_A_RUN = ("evaluate", "generate", "export", "chat", "serve")  # tasks that `run=` gives a tuned model


def announce(config: Config, folder: Path, choices: Mapping[str, str]) -> None:
    """Log them.

    Args:
        choices: each group's option.
    """
    task = config.task.name
    if task in WITHOUT_MODEL:
        return
    trained = ("adapter", "trainer") if task == "train" else ()
    shown = ("model", "quant", *(("data",) if task in READ_DATA else ()), *trained)
    groups = [f"{group}={choices[group]}" for group in shown if group in choices]
    where = "" if task in WITHOUT_FOLDER else f"{relative_to_cwd(folder)}: "
    log.info(f"{where}{'resuming ' if config.resume else ''}{task} {' '.join(groups)}")
    if task in ON_A_RUN:
        log.info(what_it_works_on(config))
    if task == "train":
        if tuned := tuned_settings(config, choices):
            log.info(tuned)
        log.info(expected_time(config, folder))
    log.info(IMPORTING)


def what_it_works_on(config: Config) -> str:
    task, model = config.task.name, config.model
    if config.run:
        return f"run: {relative_to_cwd(Path(config.run))}"
    if model.adapter:
        return f"model: {model.id} with the adapter {model.adapter}"
    if Path(model.id).exists():
        return f"model: {model.id}"
    return f"model: {model.id}, the untuned base; for a tuned one: task={task} run=last, or run=FOLDER"


def tuned_settings(config: Config, choices: Mapping[str, str]) -> str:
    """Which settings for this model the trainer option applied, of those that are in effect."""
    path = CONF / "tuned" / f"{choices.get('tuned@trainer')}.yaml"
    if not path.is_file():
        return ""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    active = ", ".join(f"{key} {value}" for key, value in values.items() if getattr(config.trainer, key, None) == value)
    return f"tuned/{path.stem} (for model={choices['model']}): {active or 'none of its settings'}"


def expected_time(config: Config, folder: Path) -> str:
    estimate = estimate_time(folder, [config])
    if estimate is None:
        return "expected time: unknown until a run of this model and data has finished here"
    return f"expected time: about {duration(estimate[0])}, from {estimate[1]}"

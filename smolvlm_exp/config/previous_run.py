"""resume=, run= and -m sweep=: a command completed by the settings of the run or sweep that it names."""

import os
from collections.abc import Container
from pathlib import Path
from typing import Any

from smolvlm_exp.config.renamed import rename_override
from smolvlm_exp.config.security import check_typed
from smolvlm_exp.config.tasks import misplaced
from smolvlm_exp.runs.checkpoint import checkpoint_folders
from smolvlm_exp.runs.find import (
    choices,
    find_ended_run,
    find_finished_run,
    find_run,
    overrides_of,
    saved_hydra,
    summary_of,
    task_of,
)
from smolvlm_exp.runs.folder import read_multirun
from smolvlm_exp.runs.overrides import as_override, as_settings, key_of
from smolvlm_exp.runs.sweep_record import find_sweep
from smolvlm_exp.utils.errors import RequestError

SHAPE = "model.shape."  # of random weights
OWN = ("hydra.sweep.dir", "hydra.mode", "sweep")  # of one command, not of the sweep


def complete_overrides(overrides: list[str], multirun: bool) -> list[str]:
    """A command's overrides, and what they leave open from the run that it resumes or works on, or its sweep."""
    given = as_settings(overrides)
    for key, complete in (("resume", resume_overrides), ("run", run_overrides), ("sweep", sweep_overrides)):
        if f"{key}=" in overrides:  # as of a shell's variable that is not set
            raise RequestError(f"{key}= is empty: name a folder, or `last`.")
        if given.get(key, "null") not in ("", "null"):
            given[key] = os.path.expanduser(given[key])
            completed = complete(given, multirun)
            for saved, value in as_settings(completed).items():
                check_typed(saved, value, typed=())
            overrides = [*(o for o in overrides if key_of(o) != key), *completed]
    return overrides


def resume_overrides(given: dict[str, str], multirun: bool) -> list[str]:
    """The run's own settings, writing into its folder; its `.hydra` stays as it was and replays the complete run.

    Mining goes on where its folder ends, so there it is the same command again.
    """
    if multirun:
        raise RequestError("resume=... resumes a single run: leave out -m (sweep=... resumes a sweep).")
    folder = find_run(given["resume"])
    own = [as_override("hydra.run.dir", str(folder)), "hydra.output_subdir=null"]
    if not checkpoint_folders(folder):
        if task_of(folder) == "mine":
            return [*settings_of(saved_overrides(folder), "mine", given), *own]
        raise RequestError(f"resume={folder}: this run has saved no checkpoint, so there is nothing to resume from.")
    if summary_of(folder).get("status") == "done" and not any(key.startswith("trainer.") for key in given):
        raise RequestError(
            f"resume={given['resume']}: {folder} has finished. To train it longer, add trainer.max_steps=... and "
            "'resume_allow=[trainer.max_steps]'."
        )
    return [*settings_of(saved_overrides(folder), "train", given), as_override("resume", str(folder)), *own]


def run_overrides(given: dict[str, str], multirun: bool) -> list[str]:
    """For a task other than train: the run's own settings, and the weights it fine-tuned."""
    name, task = given["run"], given.get("task", "train")
    if task == "train":
        raise RequestError(f"run={name} is for other tasks: add task=evaluate (to train it further: resume={name}).")
    if task == "doctor":
        return [as_override("run", str(find_ended_run(name)))]
    folder = find_finished_run(name)
    tuned = {"model.adapter": f"{folder}/adapter"}
    if not (folder / "adapter").is_dir():
        tuned = {"model.id": f"{folder}/model", "model.weights": "pretrained"}
    saved = settings_of(saved_overrides(folder), task, {"task", "resume", "sweep", *given, *tuned})
    if "model.weights" in tuned:
        saved = [override for override in saved if not key_of(override).startswith(SHAPE)]
    # A group chosen by the command takes none of the settings that went with the run's choice.
    settings = [override for override in saved if key_of(override).partition(".")[0] not in given]
    own = [as_override(key, value) for key, value in tuned.items() if key not in given]
    return [*settings, *own, as_override("run", str(folder))]


def sweep_overrides(given: dict[str, str], multirun: bool) -> list[str]:
    """The sweep's own overrides, writing into its folder."""
    if not multirun:
        raise RequestError("sweep=... resumes a sweep: add -m (resume=... resumes a single run).")
    folder = find_sweep(given["sweep"])

    def typed(config: dict[str, Any]) -> list[str]:
        saved = config["hydra"]["overrides"]
        return settings_of([*saved["task"], *saved["hydra"]], "train", {*given, *OWN})

    settings = read_multirun(folder, typed)
    return [*settings, as_override("hydra.sweep.dir", str(folder))]


def saved_overrides(folder: Path) -> list[str]:
    """A run's overrides.

    Of earlier releases: before `rpo` was a trainer option, `trainer=dpo` stood for it with the embedded model, and
    pretrained weights came with a shape, which did nothing.
    """
    rpo = choices(folder).get("tuned") == "tiny_dpo"
    random = saved_hydra(folder, "config").get("model", {}).get("weights") == "random"
    overrides = [override for override in overrides_of(folder) if random or not key_of(override).startswith(SHAPE)]
    return ["trainer=rpo" if rpo and override == "trainer=dpo" else override for override in overrides]


def settings_of(overrides: list[str], task: str, given: Container[str]) -> list[str]:
    """Saved overrides under today's names, without those that the command gives itself or `task` does not read."""
    renamed = map(rename_override, overrides)
    return [o for o in renamed if key_of(o) not in given and not misplaced(key_of(o), task)]

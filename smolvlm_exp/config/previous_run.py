"""resume=, run= and -m sweep=: a command completed by the settings of what it goes on with."""

from pathlib import Path
from typing import Any

import yaml

from smolvlm_exp.config.renamed import rename_override
from smolvlm_exp.config.tasks import misplaced
from smolvlm_exp.runs.checkpoint import checkpoint_folders
from smolvlm_exp.runs.find import choices, find_finished_run, find_run, overrides_of, summary_of
from smolvlm_exp.runs.overrides import given_value, key_of
from smolvlm_exp.runs.sweep_record import find_sweep
from smolvlm_exp.utils.errors import RequestError

OWN = ("hydra.sweep.dir", "hydra.mode", "sweep")  # of one command, not of the sweep


def resume_command(argv: list[str], args: Any) -> list[str]:
    """For `resume=...`: the run's own settings, those of the command over them, writing into the run's folder.

    The run's `.hydra` stays as it was, so that it still replays the whole run.
    """
    asked = given_value(args, "resume", "null")
    if asked in ("", "null"):
        return argv
    if args.multirun:
        raise RequestError("resume=... goes on with one run; it does not go with -m.")
    folder = find_run(asked)
    if not checkpoint_folders(folder):
        raise RequestError(f"resume={folder}: this run has saved no checkpoint, so there is nothing to resume from.")
    given = {key_of(override) for override in args.overrides}
    if summary_of(folder).get("status") == "done" and not any(key.startswith("trainer.") for key in given):
        raise RequestError(
            f"resume={asked}: {folder} is at its end. To train it longer, add trainer.max_steps=... and "
            "'resume_allow=[trainer.max_steps]'."
        )
    settings = settings_of(saved_overrides(folder), "train", given)
    own = [f"hydra.run.dir={folder}", "hydra.output_subdir=null"]
    return [*(a for a in argv if not a.startswith("resume=")), *settings, f"resume={folder}", *own]


def run_command(argv: list[str], args: Any) -> list[str]:
    """For `run=...` with another task than train: the run's own settings and what it tuned, the command's over them.

    Raises:
        RequestError: there is no such run, it is not at its end, or the task is to train.
    """
    asked = given_value(args, "run", "null")
    if asked in ("", "null"):
        return argv
    task = given_value(args, "task", "train")
    if task == "train":
        raise RequestError(f"run={asked} is what another task works on: add task=evaluate (to go on with it, resume=).")
    if task == "doctor":
        return argv
    folder = find_finished_run(asked)
    given = {key_of(override) for override in args.overrides} | {"task", "resume", "sweep", "run"}
    tuned = [f"model.adapter={folder}/adapter"]
    if not (folder / "adapter").is_dir():
        tuned = [f"model.id={folder}/model", "model.weights=pretrained"]
    own = [override for override in tuned if key_of(override) not in given]
    saved = settings_of(saved_overrides(folder), task, given | set(map(key_of, own)))
    # A group that the command chooses anew takes none of the settings that went with the run's choice.
    settings = [override for override in saved if key_of(override).partition(".")[0] not in given]
    return [*(a for a in argv if not a.startswith("run=")), *settings, *own, f"run={folder}"]


def sweep_command(argv: list[str], args: Any) -> list[str]:
    """For `sweep=...`: the sweep's own overrides, those of the command over them, writing into the sweep's folder."""
    asked = given_value(args, "sweep", "null")
    if asked in ("", "null"):
        return argv
    if not args.multirun:
        raise RequestError("sweep=... goes on with many runs: add -m (resume=... goes on with one).")
    folder = find_sweep(asked)
    given = {key_of(override) for override in args.overrides} | set(OWN)
    saved = yaml.safe_load((folder / "multirun.yaml").read_text(encoding="utf-8"))["hydra"]["overrides"]
    settings = settings_of([*saved["task"], *saved["hydra"]], "train", given)
    return [*(a for a in argv if not a.startswith("sweep=")), *settings, f"hydra.sweep.dir={folder}"]


def saved_overrides(folder: Path) -> list[str]:
    """A run's overrides; before `rpo` was a trainer option, `trainer=dpo` stood for it with the embedded model."""
    rpo = choices(folder).get("tuned") == "tiny_dpo"
    return ["trainer=rpo" if rpo and override == "trainer=dpo" else override for override in overrides_of(folder)]


def settings_of(overrides: list[str], task: str, given: set[str]) -> list[str]:
    """Saved overrides under today's names, without those that the command gives anew or `task` does not read."""
    renamed = map(rename_override, overrides)
    return [o for o in renamed if key_of(o) not in given and not misplaced(key_of(o), task)]

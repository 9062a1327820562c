"""Run folders: finding them, and going on with one."""

from pathlib import Path
from typing import Any

import yaml

from smolvlm_exp.runs.checkpoint import numbered
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import read_json

OUTPUTS = Path("outputs")
PLACES = ("*/*", "*")  # of runs in it: by day and time, or by a name that was given
JOBS = "sweeps/*/*/*"
# Settings that are no part of what a run does: runs that differ in these alone are repetitions.
BESIDE = ("seed", "name", "resume", "run", "runs", "sweep", "keep", "metric", "tracker", "task", "hydra")


def find_run(name: str, root: Path = OUTPUTS) -> Path:
    """The run folder that `name` (a path, or `last`) means.

    Raises:
        RequestError: there is none.
    """
    if name == "last":
        saved = newest_first(root, "checkpoints/checkpoint-*")
        if not saved:
            raise RequestError(f"resume=last: no run under {root}/ has saved a checkpoint yet.")
        return saved[0].parent.parent
    folder = Path(name)
    if not (folder / ".hydra").is_dir():
        raise RequestError(f"resume={name}: that is no run folder (there is no .hydra in it).")
    return folder


def newest_first(root: Path, *names: str, places: tuple[str, ...] = PLACES) -> list[Path]:
    """What runs have by these names, by when it was written."""
    found = [path for place in places for name in names for path in root.glob(f"{place}/{name}")]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


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
    if not numbered(folder):
        raise RequestError(f"resume={folder}: it has saved no checkpoint yet, so there is nothing to go on from.")
    given = {key_of(override) for override in args.overrides}
    if summary_of(folder).get("status") == "done" and not any(key.startswith("trainer.") for key in given):
        raise RequestError(
            f"resume={asked}: {folder} is at its end. To train it longer, add trainer.max_steps=... and "
            "'resume_allow=[trainer.max_steps]'."
        )
    kept = [override for override in overrides_of(folder) if key_of(override) not in given]
    own = [f"hydra.run.dir={folder}", "hydra.output_subdir=null"]
    return [*(a for a in argv if not a.startswith("resume=")), *kept, f"resume={folder}", *own]


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
    folder = finished_run(asked)
    given = {key_of(override) for override in args.overrides} | {"task", "resume", "sweep", "run"}
    # A group that the command chooses anew takes none of the settings that went with the run's choice.
    kept = [o for o in overrides_of(folder) if not {key_of(o), key_of(o).partition(".")[0]} & given]
    tuned = [f"model.adapter={folder}/adapter"]
    if not (folder / "adapter").is_dir():
        tuned = [f"model.id={folder}/model", "model.weights=pretrained"]
    own = [override for override in tuned if key_of(override) not in given]
    kept = [override for override in kept if key_of(override) not in map(key_of, own)]
    return [*(a for a in argv if not a.startswith("run=")), *kept, *own, f"run={folder}"]


def any_run(name: str, root: Path = OUTPUTS) -> Path:
    """The run folder that `name` (a path, or `last`) means, whatever became of the run.

    Raises:
        RequestError: there is none that has come to an end, good or bad.
    """
    if name == "last":
        ended = newest_first(root, "summary.json", places=(*PLACES, JOBS))
        if not ended:
            raise RequestError(f"run=last: no run under {root}/ has ended yet.")
        return ended[0].parent
    if not (Path(name) / "summary.json").is_file():
        raise RequestError(f"run={name}: there is no summary.json in it: no run has ended there.")
    return Path(name)


def finished_run(name: str, root: Path = OUTPUTS) -> Path:
    """The run folder that `name` (a path, or `last`) means, with what it tuned in it.

    Raises:
        RequestError: there is none.
    """
    if name == "last":
        saved = newest_first(root, "adapter", "model")
        if not saved:
            raise RequestError(f"run=last: no run under {root}/ is at its end yet.")
        return saved[0].parent
    folder = Path(name)
    if not (folder / ".hydra").is_dir():
        raise RequestError(f"run={name}: that is no run folder (there is no .hydra in it).")
    if not ((folder / "adapter").is_dir() or (folder / "model").is_dir()):
        raise RequestError(f"run={name}: it is not at its end (no adapter/ in it); go on with it by resume={name}.")
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    """What a run found; nothing where it has not come so far."""
    return read_json(folder / "summary.json")


def overrides_of(folder: Path) -> list[str]:
    """What a run's command set; for a replayed run, what the run set that it replays, and its own over that."""
    overrides = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8")) or []
    origin = replayed(folder)
    if origin is None:
        return overrides
    own = set(map(key_of, overrides))
    return [*(o for o in overrides_of(origin) if key_of(o) not in own), *overrides]


def replayed(folder: Path) -> Path | None:
    """The run whose `.hydra` a run was started from, where it was."""
    saved = folder / ".hydra" / "hydra.yaml"
    runtime = yaml.safe_load(saved.read_text(encoding="utf-8"))["hydra"]["runtime"]
    origin = next((Path(s["path"]) for s in runtime["config_sources"] if s["provider"] == "main"), folder)
    return origin.parent if origin.name == ".hydra" and origin.parent != folder else None


def given_value(args: Any, key: str, otherwise: str) -> str:
    """What a command line says of `key`."""
    return next((o.partition("=")[2] for o in args.overrides if o.startswith(f"{key}=")), otherwise)


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def as_typed(path: Path) -> Path:
    """A path as it would be typed: relative where it lies under the working folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) else path


def choices(folder: Path) -> dict[str, str]:
    """The option each group had, from a run's `.hydra`; a replayed run has those of the run it replays."""
    saved = folder / ".hydra" / "hydra.yaml"
    if not saved.is_file():
        return {}
    runtime = yaml.safe_load(saved.read_text(encoding="utf-8"))["hydra"]["runtime"]
    own = {group: option for group, option in runtime["choices"].items() if "/" not in group}
    origin = replayed(folder)
    return own or (choices(origin) if origin else {})


def run_name(folder: Path) -> str:
    """What tells a run from others: its overrides, or its groups' options where there are none."""
    saved = folder / ".hydra" / "overrides.yaml"
    overrides = (yaml.safe_load(saved.read_text(encoding="utf-8")) or []) if saved.is_file() else []
    chosen = choices(folder)
    return " ".join(overrides) or " ".join(chosen.get(g, "") for g in ("model", "quant", "adapter", "trainer"))

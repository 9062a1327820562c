"""Run folders: finding them, and going on with one."""

import re
from pathlib import Path
from typing import Any

import yaml

from smolvlm_exp.runs.overrides import key_of
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import read_json
from smolvlm_exp.utils.paths import OUTPUTS

PLACES = ("*/*", "*")  # of runs in it: by day and time, or by a name that was given
JOBS = "sweeps/*/*/*"
# Settings that are no part of what a run does: runs that differ in these alone are repetitions.
NON_IDENTITY_KEYS = (
    "seed",
    "name",
    "resume",
    "run",
    "runs",
    "sweep",
    "keep",
    "keep_checkpoints",
    "metric",
    "tracker",
    "task",
    "hydra",
)


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


def find_ended_run(name: str, root: Path = OUTPUTS) -> Path:
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


def find_finished_run(name: str, root: Path = OUTPUTS) -> Path:
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


def choices(folder: Path) -> dict[str, str]:
    """The option each group had, from a run's `.hydra`; a replayed run has those of the run it replays."""
    saved = folder / ".hydra" / "hydra.yaml"
    if not saved.is_file():
        return {}
    runtime = yaml.safe_load(saved.read_text(encoding="utf-8"))["hydra"]["runtime"]
    own = {group: option for group, option in runtime["choices"].items() if not re.search("[/@]|^local$", group)}
    origin = replayed(folder)
    return own or (choices(origin) if origin else {})


def run_name(folder: Path) -> str:
    """What tells a run from others: its overrides, or its groups' options where there are none."""
    saved = folder / ".hydra" / "overrides.yaml"
    overrides = (yaml.safe_load(saved.read_text(encoding="utf-8")) or []) if saved.is_file() else []
    chosen = choices(folder)
    return " ".join(overrides) or " ".join(chosen.get(g, "") for g in ("model", "quant", "adapter", "trainer"))

"""Run folders: finding them, and what is known of one."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from smolvlm_exp.runs.overrides import key_of
from smolvlm_exp.utils.errors import RequestError, first_line
from smolvlm_exp.utils.files import read_json
from smolvlm_exp.utils.formatting import as_finite
from smolvlm_exp.utils.paths import OUTPUTS

PLACES = ("*/*", "*")  # of runs in it: by day and time, or by a name that was given
CHECKPOINTS = "checkpoints/checkpoint-*"
SWEEPS = "sweeps/*/*"
JOBS = f"{SWEEPS}/*"
# Settings that do not change what a run does: runs that differ in these alone are repetitions.
NON_IDENTITY_KEYS = (
    "seed", "name", "resume", "run", "runs", "sweep", "keep", "keep_checkpoints", "metric", "strict_checks",
    "tracker", "task", "hydra",
)  # fmt: skip
# Parts of summary.json, by what is in them: all that read it go by these.
PARTS = {
    **dict.fromkeys(("settings", "data", "before", "after", "intervals", "changes", "train", "versions"), dict),
    **dict.fromkeys(("checks", "advice"), list),
    **dict.fromkeys(("held_out_rows", "seed"), int),
}
GROUPS = ("task", "model", "data", "trainer")  # of config.yaml, which are read there
PAIRED = ("dpo", "sft")  # algorithms that learn from given answers: the group `reward` is no part of such a run


def find_run(name: str) -> Path:
    """The run folder that `name` (a path, or `last`) means, to resume."""
    if name != "last":
        return run_folder("resume", name)
    for path in newest_first(
        PLACES, CHECKPOINTS, "answers.jsonl", f"round-*/{CHECKPOINTS}", "round-*/pairs/answers.jsonl"
    ):
        runs = [folder for folder in path.parents if OUTPUTS in folder.parents and (folder / ".hydra").is_dir()]
        if runs and (path.parent.name == "checkpoints" or task_of(runs[-1]) == "mine"):
            return runs[-1]  # of a mining's round the whole mining
    raise RequestError(f"resume=last: no run under {OUTPUTS}/ has saved anything to resume from yet.")


def find_ended_run(name: str) -> Path:
    """The run folder that `name` (a path, or `last`) means, done, stopped or failed."""
    if name == "last":
        return newest(f"run=last: no run under {OUTPUTS}/ has ended yet.", (*PLACES, JOBS), "summary.json").parent
    if not (Path(name) / "summary.json").is_file():
        raise RequestError(f"run={name}: no run has ended there (it has no summary.json).")
    return Path(name)


def find_finished_run(name: str) -> Path:
    """The run folder that `name` (a path, or `last`) means, with its fine-tuned weights."""
    if name == "last":
        return newest(f"run=last: no run under {OUTPUTS}/ has finished yet.", PLACES, "adapter", "model").parent
    folder = run_folder("run", name)
    if not ((folder / "adapter").is_dir() or (folder / "model").is_dir()):
        task = task_of(folder)
        if task not in ("train", "mine") or summary_of(folder).get("status") == "done":  # mined pairs alone
            raise RequestError(f"run={name} is of task={task}, which trains nothing: name the run that trained.")
        raise RequestError(f"run={name}: it has not finished (no adapter/ in it); resume it with resume={name}.")
    return folder


def task_of(folder: Path) -> str:
    name: str = saved_hydra(folder, "config").get("task", {}).get("name", "train")
    return name


def run_folder(key: str, name: str) -> Path:
    if not (Path(name) / ".hydra").is_dir():
        raise RequestError(f"{key}={name}: not a run folder (there is no .hydra in it).")
    return Path(name)


def newest(missing: str, places: Sequence[str], *names: str) -> Path:
    """The newest of these files or folders; where there is none, a `RequestError` with the message `missing`."""
    paths = newest_first(places, *names)
    if not paths:
        raise RequestError(missing)
    return paths[0]


def newest_first(places: Sequence[str], *names: str) -> list[Path]:
    """Files or folders of these names in runs, by when they were written."""
    paths = [path for place in places for name in names for path in OUTPUTS.glob(f"{place}/{name}")]
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def summary_of(folder: Path) -> dict[str, Any]:
    """A run's summary.json; empty where it has not ended. A part of another type than ours, as null, is left out."""
    saved = read_json(folder / "summary.json")
    summary: dict[str, Any] = {k: value for k, value in saved.items() if isinstance(value, PARTS.get(k, object))}
    if "intervals" in summary:
        summary["intervals"] = {
            part: {key: ends for key, ends in measured.items() if is_interval(ends)}
            for part, measured in summary["intervals"].items()
            if isinstance(measured, dict)
        }
    if "changes" in summary:
        changes = ((key, change) for key, change in summary["changes"].items() if isinstance(change, dict))
        summary["changes"] = {
            key: change for key, change in changes if is_interval([change.get("low"), change.get("high")])
        }
    return summary


def is_interval(ends: Any) -> bool:
    return isinstance(ends, list) and len(ends) == 2 and all(as_finite(end) is not None for end in ends)


def saved_hydra(folder: Path, name: str) -> Any:
    """A run's `.hydra/NAME.yaml` (config, hydra or overrides); empty where it is missing.

    Raises:
        RequestError: it is not what Hydra writes.
    """
    path = folder / ".hydra" / f"{name}.yaml"
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
        if saved:
            check_form(name, saved)
        return saved or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError, LookupError, TypeError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception, what: str = "run") -> RequestError:
    return RequestError(f"{path} is damaged ({first_line(error)}): start this {what} again in another folder.")


def check_form(name: str, saved: Any) -> None:
    """
    Raises:
        LookupError, TypeError: what is read of such a file is not in it.
    """
    if name == "overrides":
        parts = [(saved, list), *((each, str) for each in saved)]
    elif name == "config":
        parts = [(saved, dict), *((saved[group], dict) for group in GROUPS if group in saved)]
    else:
        runtime = saved["hydra"]["runtime"]
        sources = [source[key] for source in runtime["config_sources"] for key in ("path", "provider")]
        parts = [(runtime["choices"], dict), *((text, str) for text in sources)]
    if not all(isinstance(part, kind) for part, kind in parts):
        raise TypeError("it has another form")


def overrides_of(folder: Path) -> list[str]:
    """The overrides of a run's command, after those of the run it replays, if any.

    Raises:
        RequestError: a run that is replayed is gone, or damaged.
    """
    overrides: list[str] = []
    for run in lineage(folder):
        own = set(map(key_of, overrides))
        overrides = [*(o for o in saved_hydra(run, "overrides") if key_of(o) not in own), *overrides]
    return overrides


def lineage(folder: Path) -> Iterator[Path]:
    """A run, the run that it replays, the run that that one replays ..."""
    origin, seen = folder, set[Path]()
    while origin not in seen:
        yield origin
        seen.add(origin)
        earlier = replayed(origin)
        if earlier is None:
            return
        origin = earlier
    raise RequestError(f"{folder}/.hydra/hydra.yaml is damaged: the run replays itself.")


def replayed(folder: Path) -> Path | None:
    """The run whose `.hydra` a run was started from, if any."""
    saved = saved_hydra(folder, "hydra")
    if not saved:
        raise RequestError(f"{folder}/.hydra/hydra.yaml is missing, and with it what the run was started with.")
    sources = saved["hydra"]["runtime"]["config_sources"]
    origin = next((Path(source["path"]) for source in sources if source["provider"] == "main"), folder)
    return origin.parent if origin.name == ".hydra" and origin.parent != folder else None


def choices(folder: Path) -> dict[str, str]:
    """The option each group had, from a run's `.hydra`; a replayed run has those of the run it replays."""
    for run in lineage(folder):
        saved, config = saved_hydra(run, "hydra"), saved_hydra(run, "config")
        chosen = saved["hydra"]["runtime"]["choices"] if saved else {}
        learns_from_pairs = config.get("trainer", {}).get("algorithm") in PAIRED
        scores = config.get("task", {}).get("name") == "mine"
        unread = "[/@]|^local$|^reward$" if learns_from_pairs and not scores else "[/@]|^local$"
        own = {group: option for group, option in chosen.items() if not re.search(unread, group)}
        if own or not saved:
            return own
    return {}

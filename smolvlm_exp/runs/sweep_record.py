"""A sweep on disk: its jobs in `sweep.json`, and each job's state by the files in its folder."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from smolvlm_exp.runs.checkpoint import checkpoints
from smolvlm_exp.runs.find import SWEEPS, damaged, newest, summary_of
from smolvlm_exp.runs.overrides import as_settings, key_of
from smolvlm_exp.utils.errors import RequestError, RunError
from smolvlm_exp.utils.files import read_json, write_json
from smolvlm_exp.utils.formatting import short_keys, short_value
from smolvlm_exp.utils.paths import OUTPUTS

DISPLAY_KEYS = ("keep", "keep_checkpoints", "metric")  # of the sweep, not part of what a job is
ENDED = ("done", "pruned")


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    number: int  # its folder's name
    overrides: tuple[str, ...]  # as typed for a single run: `adapter.r=8`

    @property
    def settings(self) -> dict[str, str]:
        """Key -> value as typed."""
        return as_settings(self.overrides)

    @property
    def identity(self) -> frozenset[str]:
        return frozenset(override for override in self.overrides if key_of(override) not in DISPLAY_KEYS)


def settings_values(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """Key -> its values, in the order of the jobs."""
    values: dict[str, dict[str, None]] = {}
    for job in jobs:
        for key, value in job.settings.items():
            values.setdefault(key, {})[value] = None
    return {key: list(found) for key, found in values.items() if key not in DISPLAY_KEYS}


def differing_settings(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """The keys whose values differ between jobs, with those values."""
    return {key: values for key, values in settings_values(jobs).items() if len(values) > 1}


def short_settings(job: Job, keys: Sequence[str]) -> dict[str, str]:
    """Short key -> short value of the settings in which this job differs."""
    return {name: short_value(job.settings[key]) for key, name in short_keys(keys).items() if key in job.settings}


def job_label(job: Job, keys: Sequence[str]) -> str:
    """The settings in which this job differs: `r=8 learning_rate=5e-05`."""
    return " ".join(f"{name}={value}" for name, value in short_settings(job, keys).items())


def read_jobs(folder: Path) -> list[Job]:
    """The jobs of the sweep in `folder`; none where it has not started.

    Raises:
        RequestError: its sweep.json is damaged.
    """
    path = folder / "sweep.json"
    try:
        return [Job(int(job["number"]), tuple(map(str, job["overrides"]))) for job in read_json(path).get("jobs", [])]
    except (LookupError, TypeError, ValueError) as error:
        raise damaged(path, error, "sweep") from error


def job_of(folder: Path) -> Job | None:
    """The job of a sweep that runs in `folder`; None where it is no job's."""
    return next((job for job in read_jobs(folder.parent) if str(job.number) == folder.name), None)


def write_jobs(folder: Path, jobs: Sequence[Job], keys: Sequence[str]) -> None:
    """Write a sweep's jobs, and the keys in which they differ."""
    write_json(folder / "sweep.json", {"keys": keys, "jobs": [asdict(job) for job in jobs]})


def read_keys(folder: Path) -> list[str]:
    """The keys in which a sweep's jobs differ."""
    keys = read_json(folder / "sweep.json").get("keys", [])
    return list(map(str, keys)) if isinstance(keys, list) else []


def job_state(folder: Path) -> str:
    """done, pruned, failed or stopped, from summary.json; else `cut` (killed after a checkpoint) or `missing`."""
    return summary_of(folder).get("status") or ("cut" if checkpoints(folder) else "missing")


def can_resume(folder: Path) -> bool:
    """Whether a job resumes from its newest checkpoint: it was stopped or killed, or could not continue (`RunError`).

    One that raised anything else starts again.
    """
    summary = summary_of(folder)
    raised = summary.get("status") == "failed" and summary.get("exit_code", 1) > 0
    ended = str(summary.get("reason", "")).startswith(f"{RunError.__name__}:")
    return bool(checkpoints(folder)) and (ended or not raised)


def sweep_name(sweep: Path) -> str:
    """A sweep's name, as `sweep 2026-01-31 12-00-00`."""
    return f"sweep {sweep.parent.name} {sweep.name}"


def sweep_position(folder: Path) -> tuple[str, dict[str, str]] | None:
    """Of a run in a sweep: (the sweep's name, {short key: value} of the settings in which its jobs differ)."""
    job = job_of(folder)
    return (sweep_name(folder.parent), short_settings(job, read_keys(folder.parent))) if job else None


def find_sweep(name: str) -> Path:
    """The sweep folder that `name` (a path, or `last`) means."""
    if name == "last":
        return newest(f"sweep=last: there is no sweep under {OUTPUTS}/sweeps/ yet.", [SWEEPS], "sweep.json").parent
    if not read_jobs(Path(name)):
        raise RequestError(f"sweep={name}: not a sweep folder (there is no sweep.json in it).")
    return Path(name)


def check_same_jobs(folder: Path, jobs: Sequence[Job]) -> None:
    """Refuse to resume the sweep in `folder` with other jobs; a `RequestError` says what differs."""
    before = read_jobs(folder)
    if {job.identity for job in jobs} == {job.identity for job in before}:
        return
    here, there = settings_values(jobs), settings_values(before)
    changes = [
        f"{key} is {', '.join(here.get(key, ['not set']))} here and {', '.join(there.get(key, ['not set']))} there"
        for key in here | there
        if set(here.get(key, [])) != set(there.get(key, []))
    ]
    raise RequestError(
        f"sweep={folder}: that sweep has other jobs: {'; '.join(changes) or 'other combinations of the same values'}.\n"
        f"Repeat its command unchanged, or leave sweep= out for a new sweep."
    )

"""What came of a sweep: a row a job, the best of them, those that nothing beats, and all of it as `sweep.csv`."""

import csv
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolvlm_exp.evaluation.metrics import GOALS
from smolvlm_exp.runs.checkpoint import checkpoints
from smolvlm_exp.runs.find import summary_of
from smolvlm_exp.runs.sweep_record import ENDED, Job, job_state, read_jobs, read_keys
from smolvlm_exp.utils.formatting import as_finite, parse_number

COSTS = ("train.seconds", "train.memory_peak_gib")


@dataclass(frozen=True)
class JobResult:
    """One job and what its summary.json says."""

    job: Job
    status: str
    summary: dict[str, Any]

    def value(self, path: str) -> float | None:
        """A number by its path in the summary (`after.recall`); None where it is missing or no finite number."""
        part, _, key = path.partition(".")
        return as_finite((self.summary.get(part) or {}).get(key))

    @property
    def reason(self) -> str:
        """Why it failed, in one line."""
        return " ".join(str(self.summary.get("reason", "")).split())


@dataclass(frozen=True)
class SweepResults:
    """A sweep's rows, the settings they differ in (`seed` apart: it repeats), and the metric they are compared by."""

    folder: Path
    rows: list[JobResult]
    keys: list[str]
    metric: str

    @property
    def varied(self) -> list[str]:
        """The settings that are compared: a seed only repeats."""
        return [key for key in self.keys if key != "seed"]

    @property
    def best(self) -> JobResult | None:
        """The finished run with the best metric; of several the first."""
        return max(self.done, key=self.goodness, default=None)

    @property
    def done(self) -> list[JobResult]:
        """The finished runs that have the metric."""
        return [row for row in self.rows if row.status == "done" and row.value(self.metric) is not None]

    def measured(self, row: JobResult) -> float:
        """The metric of a run that has it."""
        value = row.value(self.metric)
        assert value is not None
        return value

    def goodness(self, row: JobResult) -> float:
        """The metric, turned so that more is better."""
        return GOALS[self.metric] * self.measured(row)

    @property
    def front(self) -> list[JobResult]:
        """The runs that no other beats in one of metric, seconds and memory without losing in another (Pareto)."""
        points = {
            row.job.number: (self.goodness(row), *(-(row.value(cost) or 0.0) for cost in COSTS)) for row in self.done
        }
        return [row for row in self.rows if row.job.number in points and not is_dominated(row.job.number, points)]

    @property
    def failed(self) -> bool:
        return any(row.status not in ("done", "pruned") for row in self.rows)


def is_dominated(number: int, points: dict[int, tuple[float, ...]]) -> bool:
    own = points[number]
    return any(p != own and all(a >= b for a, b in zip(p, own, strict=True)) for p in points.values())


def read_results(folder: Path, metric: str) -> SweepResults:
    """What the disk says of the sweep in `folder` now."""
    jobs = read_jobs(folder)
    rows = [JobResult(job, job_state(folder / str(job.number)), summary_of(folder / str(job.number))) for job in jobs]
    return SweepResults(folder, rows, read_keys(folder), metric)


def job_command(job: Job) -> str:
    """What a person types to run this job again, alone."""
    return " ".join(["python -m smolvlm_exp", *(shlex.quote(override) for override in job.overrides)])


def results_table(found: SweepResults) -> list[dict[str, Any]]:
    """A flat dict a job, all with the same keys: settings as typed, then every number of its summary by its path."""
    best, front = found.best, found.front
    parts = ("before", "after", "train")
    paths = list(dict.fromkeys(f"{p}.{k}" for p in parts for row in found.rows for k in row.summary.get(p) or {}))
    return [
        {
            "job": row.job.number,
            "status": row.status,
            **{key: parse_number(row.job.settings.get(key, "")) for key in found.keys},
            **{path: row.value(path) for path in paths},
            "best": row is best,
            "pareto": row in front,
            "reason": row.reason,
            "command": job_command(row.job),
        }
        for row in found.rows
    ]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def prune_checkpoints(found: SweepResults, keep: str) -> None:
    """Remove checkpoints of jobs that are done.

    Args:
        keep: all; last, of each job its newest; best, the newest of the best job alone.
    """
    for row in found.rows:
        if keep == "all" or row.status not in ENDED:
            continue
        folder = found.folder / str(row.job.number)
        spared = keep == "last" or row is found.best
        for checkpoint in checkpoints(folder)[: -1 if spared else None]:
            shutil.rmtree(checkpoint, ignore_errors=True)  # another job that ends at this moment may be at it too

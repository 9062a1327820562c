"""The results of a sweep: one per job, the best of them, the Pareto front, main effects, and rows for `sweep.csv`."""

import shlex
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from smolvlm_exp.evaluation.comparison import Group, Run, load_per_row, measure_gap
from smolvlm_exp.evaluation.metrics import GOALS, deciding_metric, summary_value
from smolvlm_exp.evaluation.statistics import t_interval
from smolvlm_exp.evaluation.verdict import rows_changed, too_few, verdict
from smolvlm_exp.runs.checkpoint import checkpoints
from smolvlm_exp.runs.find import summary_of
from smolvlm_exp.runs.folder import in_use
from smolvlm_exp.runs.sweep_record import ENDED, Job, job_state, read_jobs, read_keys
from smolvlm_exp.utils.formatting import parse_number
from smolvlm_exp.utils.paths import relative_to_cwd

RUNNING = "running"  # by this command or by another that works on the same sweep
COSTS = {"train.seconds": "s", "train.memory_peak_gib": "GiB"}


@dataclass(frozen=True)
class JobResult(Job):
    """A job, its status, and its summary.json."""

    status: str
    summary: dict[str, Any]

    def value(self, path: str) -> float | None:
        return summary_value(self.summary, path)

    @property
    def reason(self) -> str:
        """Why it failed, in one line."""
        return " ".join(str(self.summary.get("reason", "")).split())

    @property
    def command(self) -> str:
        """Runs this job again, alone."""
        return " ".join(["python -m smolvlm_exp", *(shlex.quote(override) for override in self.overrides)])


@dataclass(frozen=True)
class SweepResults:
    folder: Path
    jobs: list[JobResult]
    keys: list[str]  # settings that differ between jobs
    metric: str

    @property
    def settings(self) -> list[str]:
        """The settings that are compared: a seed only repeats."""
        return [key for key in self.keys if key != "seed"]

    @property
    def done(self) -> list[JobResult]:
        """The finished jobs that have the metric."""
        return [job for job in self.jobs if job.status == "done" and job.value(self.metric) is not None]

    @property
    def best(self) -> JobResult | None:
        """The finished job with the best metric; of equals the one that took least time, then least memory."""
        return max(self.done, key=lambda job: (self.score(job), *self.costs(job)), default=None)

    @cached_property
    def tied(self) -> list[JobResult]:
        """Jobs of other settings that cannot be told from the best: equal, or within the noise on the same rows."""
        best = self.best
        if best is None:
            return []
        groups = {job.number: Group({}, [self.run_of(job)]) for job in self.done}
        others = [job for job in self.done if self.compared(job) != self.compared(best)]
        gaps = {job.number: measure_gap(groups[best.number], groups[job.number], self.metric) for job in others}
        return [job for job in others if abs(gaps[job.number].difference) <= (gaps[job.number].noise or 0.0)]

    @property
    def verdict(self) -> str:
        """What the held-out rows do not allow to say; empty where the best job beats the others and the base."""
        best = self.best
        if best is None:
            return ""
        part, _, key = self.metric.partition(".")
        changed = rows_changed((job.summary for job in self.done), self.keys)
        if few := too_few(best.summary.get("held_out_rows")):
            return "; ".join(filter(None, (changed, few)))
        said = verdict(best.summary, [key] if part == "after" else [])
        rows = f" on {best.summary['held_out_rows']:,} held-out rows" if "held_out_rows" in best.summary else ""
        names = ", ".join(str(job.number) for job in self.tied[:8]) + (" ..." if len(self.tied) > 8 else "")
        tie = f"a tie: job {best.number} cannot be told from {names}{rows}; of equals the fastest counts as the best"
        return "; ".join(filter(None, (changed, said, tie if self.tied else "")))

    def run_of(self, job: JobResult) -> Run:
        folder = self.folder / str(job.number)
        return Run(folder, job.settings, job.summary, load_per_row(folder))

    def compared(self, job: JobResult) -> list[str]:
        return [job.settings.get(key, "") for key in self.settings]

    def failed(self, strict: bool = False) -> bool:
        """Whether a job did not end or, `strict`, failed a check."""
        unchecked = strict and any(job.summary.get("checks_passed") is False for job in self.jobs)
        return unchecked or any(job.status not in (*ENDED, RUNNING) for job in self.jobs)

    def measured(self, job: JobResult) -> float:
        """The metric of a job that has it."""
        value = job.value(self.metric)
        assert value is not None
        return value

    def score(self, job: JobResult) -> float:
        """The metric, negated where less is better."""
        return GOALS[self.metric] * self.measured(job)

    def costs(self, job: JobResult) -> list[float]:
        """Negated, so that more is better."""
        return [-(job.value(cost) or 0.0) for cost in COSTS]

    @property
    def front(self) -> list[JobResult]:
        """The Pareto front: no other job is at least as good in metric, seconds and memory and better in one."""
        points = [(self.score(job), *self.costs(job)) for job in self.done]
        return [
            job
            for job, own in zip(self.done, points, strict=True)
            if not any(p != own and all(a >= b for a, b in zip(p, own, strict=True)) for p in points)
        ]

    @property
    def resume_command(self) -> str:
        return f"python -m smolvlm_exp -m sweep={shlex.quote(str(relative_to_cwd(self.folder)))}"


def read_result(sweep: Path, job: Job) -> JobResult:
    folder = sweep / str(job.number)
    state = job_state(folder)
    if state not in ENDED and in_use(folder):
        state = RUNNING
    return JobResult(job.number, job.overrides, state, summary_of(folder))


def read_results(sweep: Path, asked: str | None) -> SweepResults:
    """The state of the sweep in this folder, by the files of its jobs; `asked`: config.metric."""
    jobs = [read_result(sweep, job) for job in read_jobs(sweep)]
    return SweepResults(sweep, jobs, read_keys(sweep), deciding_metric(asked, [job.summary for job in jobs]))


@dataclass(frozen=True)
class Effect:
    """The metric's mean over the jobs where a setting has this value."""

    value: str
    mean: float
    interval: float | None  # half of a 95 % interval over the seeds; None for a single seed
    seeds: int
    jobs: int


def main_effects(results: SweepResults) -> dict[str, list[Effect]]:
    """Setting -> an effect per value, over the combinations of all other settings in which every value has finished.

    Where a job is missing, its combination is left out for the other values too, so that like is compared with like.
    """
    effects: dict[str, list[Effect]] = {}
    for key in results.settings:
        blocks: dict[tuple[str, ...], dict[str, JobResult]] = {}
        others = [other for other in results.keys if other != key]
        for job in results.done:
            block = tuple(job.settings.get(other, "") for other in others)
            blocks.setdefault(block, {})[job.settings.get(key, "")] = job
        values = dict.fromkeys(job.settings.get(key, "") for job in results.jobs)
        complete = [block for block in blocks.values() if len(block) == len(values)]
        effects[key] = [effect(v, [block[v] for block in complete], results) for v in values] if complete else []
    return effects


def effect(value: str, jobs: list[JobResult], results: SweepResults) -> Effect:
    seeds: dict[str, list[float]] = {}
    for job in jobs:
        seeds.setdefault(job.settings.get("seed", ""), []).append(results.measured(job))
    means = [mean(values) for values in seeds.values()]
    return Effect(value, mean(means), t_interval(means), len(means), len(jobs))


def results_table(results: SweepResults) -> list[dict[str, Any]]:
    """A flat dict per job, all with the same keys: settings as typed, then every number of its summary by its path."""
    best, front = results.best, results.front
    parts = ("before", "after", "train")
    paths = dict.fromkeys(f"{p}.{k}" for p in parts for job in results.jobs for k in job.summary.get(p) or {})
    return [
        {
            "job": job.number,
            "status": job.status,
            **{key: parse_number(job.settings.get(key, "")) for key in results.keys},
            **{path: job.value(path) for path in paths},
            "best": job is best,
            "tied": job in results.tied,
            "pareto": job in front,
            "reason": job.reason,
            "command": job.command,
        }
        for job in results.jobs
    ]


def prune_checkpoints(results: SweepResults, keep: str) -> None:
    """Remove finished jobs' checkpoints, except `all`, the `last` of each job, or the last of the `best` job."""
    for job in results.jobs if keep != "all" else ():
        if job.status in ENDED:
            keep_newest = keep == "last" or job is results.best
            for checkpoint in checkpoints(results.folder / str(job.number))[: -1 if keep_newest else None]:
                shutil.rmtree(checkpoint, ignore_errors=True)  # another job that ends now may remove it too

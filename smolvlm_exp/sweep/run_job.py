"""One job of a sweep, in whatever process and on whatever machine the launcher gives it."""

import logging
from pathlib import Path
from statistics import median

from smolvlm_exp.config.schema import Config
from smolvlm_exp.runs.sweep_record import job_label, read_jobs, read_keys
from smolvlm_exp.sweep.job_process import run_in_process, stop_requested
from smolvlm_exp.sweep.results import SweepResults, prune_checkpoints, read_results
from smolvlm_exp.utils.formatting import duration

log = logging.getLogger(__name__)


def run_job(config: Config, folder: Path, home: Path, at_once: int) -> float | None:
    """Run the job of `folder` in a process of its own and remove checkpoints as `keep` says; returns its metric.

    Args:
        home: where the sweep's command was typed.
        at_once: jobs at once on this machine; -1: one per core.
    """
    if stop_requested():
        return None
    sweep, name = folder.parent, folder.name
    job = next(job for job in read_jobs(sweep) if str(job.number) == name)
    log.info(f"[{name}] {job_label(job, read_keys(sweep))}")
    run_in_process(config, folder, home, at_once)
    results = read_results(sweep, config.metric)
    result = next(result for result in results.jobs if str(result.number) == name)
    log.info(f"[{name}] {result.status}{f': {result.reason}' if result.reason else ''}{remaining_time(results)}")
    prune_checkpoints(results, config.keep_checkpoints)
    return result.value(config.metric)


def remaining_time(results: SweepResults) -> str:
    """How many jobs are left, and how long they will take by those that are done."""
    left = sum(job.status in ("missing", "cut", "stopped") for job in results.jobs)
    seconds = [job.summary["seconds"] for job in results.jobs if job.status == "done"]
    if not left:
        return ""
    estimate = f", about {duration(median(seconds) * left)} one after the other" if seconds else ""
    return f"; {left} of {len(results.jobs)} jobs left{estimate}"

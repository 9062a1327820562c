"""One job's turn, in whatever process and on whatever machine the launcher gives it."""

import logging
from pathlib import Path
from statistics import median

from smolvlm_exp.config.schema import Config
from smolvlm_exp.runs.sweep_record import job_label, read_keys
from smolvlm_exp.sweep.job_process import run_in_process, stop_asked
from smolvlm_exp.sweep.results import JobResult, SweepResults, prune_checkpoints, read_results
from smolvlm_exp.sweep.time_estimate import seconds_of
from smolvlm_exp.utils.formatting import duration

log = logging.getLogger(__name__)


def run_job(config: Config, folder: Path, home: Path, at_once: int) -> float | None:
    """Run the job of `folder` apart, say how it went, and clear what is not to be kept; returns its metric.

    Args:
        home: where the sweep's command was typed.
        at_once: jobs at once on this machine; -1: one a core.
    """
    if stop_asked():
        return None
    before = row_of(read_results(folder.parent, config.metric), folder)
    log.info(f"[{folder.name}] {job_label(before.job, read_keys(folder.parent))}")
    run_in_process(config, folder, home, at_once)
    found = read_results(folder.parent, config.metric)
    row = row_of(found, folder)
    log.info(f"[{folder.name}] {row.status}{f': {row.reason}' if row.reason else ''}{remaining_time(found)}")
    prune_checkpoints(found, config.keep_checkpoints)
    return row.value(config.metric)


def row_of(found: SweepResults, folder: Path) -> JobResult:
    return next(row for row in found.rows if str(row.job.number) == folder.name)


def remaining_time(found: SweepResults) -> str:
    """How many jobs are left, and how long they take by those that are done."""
    left = sum(row.status in ("missing", "cut", "stopped") for row in found.rows)
    times = [seconds for row in found.rows if (seconds := seconds_of(found.folder / str(row.job.number)))]
    if not left:
        return ""
    about = f", about {duration(median(times) * left)} one after the other" if times else ""
    return f"; {left} of {len(found.rows)} jobs left{about}"

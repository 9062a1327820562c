"""What a sweep prints: the plan and its estimated time before the first job, the results after the last."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from rich.table import Table

from smolvlm_exp.config.schema import Config
from smolvlm_exp.reporting.results import wide_console
from smolvlm_exp.reporting.trackers.wandb import track_table
from smolvlm_exp.runs.sweep_record import sweep_name
from smolvlm_exp.sweep.results import COSTS, SweepResults, prune_checkpoints, read_results, results_table
from smolvlm_exp.sweep.sweep_page import write_page
from smolvlm_exp.tasks.time_estimate import estimate_time
from smolvlm_exp.utils.files import write_text
from smolvlm_exp.utils.formatting import duration, humanize, number, short_keys, short_value
from smolvlm_exp.utils.paths import relative_to_cwd

if TYPE_CHECKING:
    from optuna import Study

log = logging.getLogger(__name__)


def announce(folder: Path, title: str, varied: dict[str, str], states: Sequence[str], left: Sequence[Config]) -> None:
    """Print the number of jobs with their states, the settings that differ, and the estimated time of those left."""
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    progress = "" if set(counts) <= {"missing"} else f": {', '.join(f'{n} {state}' for state, n in counts.items())}"
    log.info(f"sweep: {title} in {relative_to_cwd(folder)}{progress}")
    width = max((len(key) for key in varied), default=0)
    for key, values in varied.items():
        log.info(f"  {key:<{width}}  {values}")
    if not left:
        log.info("nothing is left to run")
    elif estimate := estimate_time(folder, left):
        seconds, source = estimate
        jobs = f"{len(left)} job{'s' * (len(left) > 1)} one after the other"
        log.info(f"estimated time: about {duration(seconds)} for {jobs}, from {source}")
    else:
        log.info("estimated time: unknown until the first job finishes")


def report_results(folder: Path, config: Config, stopped: bool, study: "Study | None" = None) -> SweepResults:
    """Write sweep.csv and sweep.html, print the table, log it to W&B."""
    import pandas

    results = read_results(folder, config.metric)
    prune_checkpoints(results, config.keep_checkpoints)
    rows = results_table(results)
    table = pandas.DataFrame(rows, dtype=object)  # object: integers stay integers
    write_text(folder / "sweep.csv", table.to_csv(index=False))
    page = write_page(results, study)
    print_table(results)
    if best := results.best:
        if results.verdict:
            log.info(f"verdict: {results.verdict}")
        log.info(f"best: job {best.number}, {results.metric} {number(results.measured(best))}. To run it again:")
        log.info(f"  {best.command}")
    statuses = dict(Counter(row["status"] for row in rows))
    jobs = folder / "*" / "wandb" / "offline-run-*"
    track_table(config.tracker, folder, "sweep", sweep_name(folder), rows, statuses, jobs)
    log.info(relative_to_cwd(page))
    if stopped:
        log.info(f"stopped; resume with: {results.resume_command}")
    return results


def print_table(results: SweepResults) -> None:
    columns = {results.metric: humanize(results.metric.split(".")[1])} | COSTS
    table = Table("job", *short_keys(results.keys).values(), *columns.values(), "")
    for column in table.columns:
        column.overflow = "fold"
    for job in results.jobs:
        settings = [short_value(job.settings.get(key, "")) for key in results.keys]
        values = [job.value(metric) for metric in columns]
        numbers = ["" if value is None else f"{value:.3g}" for value in values]
        reason = f" {shorten(job.reason, 60)}" if job.status == "failed" else ""
        state = "" if job.status == "done" else f"{job.status}{reason}"
        rank = "best" if job is results.best else "tie" if job in results.tied else state
        table.add_row(str(job.number), *settings, *numbers, rank)
    table.caption = f"{results.best.summary.get('held_out_rows', '?')} held-out rows" if results.best else None
    wide_console().print(table)

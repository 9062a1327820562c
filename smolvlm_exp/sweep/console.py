"""What a sweep says: before the first job what it will do, after the last what came of it."""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from rich.console import Console
from rich.table import Table

from smolvlm_exp.config.schema import Config
from smolvlm_exp.reporting.tracker import track_sweep
from smolvlm_exp.runs.sweep_record import sweep_name
from smolvlm_exp.sweep.results import (
    SweepResults,
    job_command,
    prune_checkpoints,
    read_results,
    results_table,
    write_csv,
)
from smolvlm_exp.sweep.sweep_page import Sections, write_page
from smolvlm_exp.sweep.time_estimate import estimate_time
from smolvlm_exp.utils.formatting import duration, humanize, number, short_keys, short_value
from smolvlm_exp.utils.paths import relative_to_cwd

log = logging.getLogger(__name__)


SHORT = {"train.seconds": "s", "train.memory_peak_gib": "GiB"}


def announce(folder: Path, what: str, varied: dict[str, str], states: Sequence[str], left: Sequence[Config]) -> None:
    """The number of jobs, what differs, and the expected time.

    Args:
        what: `12 jobs`.
        varied: each setting that differs, and its values in words.
        states: of the jobs that there are already.
        left: the configurations of those that are to run.
    """
    counts = {name: states.count(name) for name in dict.fromkeys(states)}
    before = "" if set(counts) <= {"missing"} else f": {', '.join(f'{n} {name}' for name, n in counts.items())}"
    log.info(f"sweep: {what} in {relative_to_cwd(folder)}{before}")
    width = max((len(key) for key in varied), default=0)
    for key, values in varied.items():
        log.info(f"  {key:<{width}}  {values}")
    if not left:
        log.info("expected: nothing is left to do")
    elif told := estimate_time(folder, left):
        about = f"{duration(told[0])} for {len(left)} job{'s' * (len(left) > 1)} one after the other"
        log.info(f"expected: about {about}, by {told[1]}")
    else:
        log.info(
            "expected: known after the first job: no run of this model and data has finished here",
        )


def report_results(folder: Path, config: Config, stopped: bool, sections: Sections = ()) -> SweepResults:
    """Write sweep.csv and sweep.html (`sections` in place of main effects), print the table, hand it to W&B."""
    found = read_results(folder, config.metric)
    prune_checkpoints(found, config.keep_checkpoints)
    rows = results_table(found)
    write_csv(folder / "sweep.csv", rows)
    page = write_page(found, sections)
    show(found)
    if best := found.best:
        log.info(f"best: job {best.job.number}, {found.metric} {number(found.measured(best))}; again:")
        log.info(f"  {job_command(best.job)}")
    track_sweep(config.tracker, folder, sweep_name(folder), rows)
    log.info(relative_to_cwd(page))
    if stopped:
        log.info(f"stopped; go on with: python -m smolvlm_exp -m sweep={shlex.quote(str(relative_to_cwd(folder)))}")
    return found


def show(found: SweepResults) -> None:
    """The table on the terminal: a line a job."""
    heads = {found.metric: humanize(found.metric.split(".")[1])} | SHORT
    shown = Table("job", *short_keys(found.keys).values(), *heads.values(), "", title=None)
    for column in shown.columns:
        column.overflow = "fold"
    best = found.best
    for row in found.rows:
        values = [row.value(metric) for metric in heads]
        why = f" {shorten(row.reason, 60)}" if row.status == "failed" else ""
        state = "best" if row is best else "" if row.status == "done" else f"{row.status}{why}"
        cells = ["" if value is None else f"{value:.3g}" for value in values]
        shown.add_row(
            str(row.job.number), *(short_value(row.job.settings.get(key, "")) for key in found.keys), *cells, state
        )
    Console().print(shown)

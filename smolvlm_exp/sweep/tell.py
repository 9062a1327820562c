"""What a sweep says: before the first job what it will do, after the last what came of it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from smolvlm_exp.charts import number
from smolvlm_exp.config import Config
from smolvlm_exp.page import duration, words
from smolvlm_exp.runs import as_typed
from smolvlm_exp.sweep.disk import tidy
from smolvlm_exp.sweep.estimate import expected
from smolvlm_exp.sweep.jobs import Job, differing, short
from smolvlm_exp.sweep.outcome import COSTS, Outcome, command, outcome, table, write_csv
from smolvlm_exp.sweep.page import write_page
from smolvlm_exp.sweep.record import group_of, state
from smolvlm_exp.tracking import track_sweep


def announce(folder: Path, jobs: Sequence[Job], left: Sequence[Config]) -> None:
    """The number of jobs, what differs, and the expected time."""
    states = [state(folder / str(job.number)) for job in jobs]
    counts = {name: states.count(name) for name in dict.fromkeys(states)}
    before = "" if set(counts) == {"missing"} else f": {', '.join(f'{n} {name}' for name, n in counts.items())}"
    print(f"sweep: {len(jobs)} jobs in {as_typed(folder)}{before}")
    varied = differing(jobs)
    width = max((len(key) for key in varied), default=0)
    for key, values in varied.items():
        print(f"  {key:<{width}}  {', '.join(values)}{'  (repetitions)' if key == 'seed' else ''}")
    if not left:
        print("expected: nothing is left to do")
    elif told := expected(folder, left):
        print(f"expected: about {duration(told[0])} for {len(left)} jobs one after the other, by {told[1]}")
    else:
        print("expected: not known before the first job is done: no run of this model and data has finished here")


def conclude(folder: Path, config: Config, stopped: bool) -> int:
    """Write sweep.csv and sweep.html, print the table; returns the exit code."""
    found = outcome(folder, config.metric)
    tidy(found, config.keep)
    rows = table(found)
    write_csv(folder / "sweep.csv", rows)
    page = write_page(found)
    show(found)
    if best := found.best:
        print(f"best: job {best.job.number}, {found.metric} {number(found.measured(best))}; again:")
        print(f"  {command(best.job)}")
    track_sweep(config.tracker, folder, group_of(folder), rows)
    print(as_typed(page))
    if stopped:
        print(f"stopped; go on with: python -m smolvlm_exp -m sweep={shlex.quote(str(as_typed(folder)))}")
        return 75
    return 1 if found.failed else 0


def show(found: Outcome) -> None:
    """The table on the terminal: a line a job."""
    names, metrics = short(found.keys), (found.metric, *COSTS)
    shown = Table("job", *names.values(), *(words(metric.split(".")[1]) for metric in metrics), "", title=None)
    best = found.best
    for row in found.rows:
        values = [row.value(metric) for metric in metrics]
        state = "best" if row is best else "" if row.status == "done" else " ".join((row.status, row.reason)).strip()
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        shown.add_row(str(row.job.number), *(row.job.settings.get(key, "") for key in found.keys), *cells, state)
    Console().print(shown)

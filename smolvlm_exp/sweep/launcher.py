"""Jobs to Hydra's launcher, whichever it is, and one way to stop them all: a file that each of them looks for."""

import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smolvlm_exp.runs.sweep_record import Job
from smolvlm_exp.sweep.job_process import STOP
from smolvlm_exp.utils.signals import StopRequest

log = logging.getLogger(__name__)


class Stop(StopRequest):
    """Ctrl-C and SIGTERM make a file that every job's parent looks for, on whatever machine it waits.

    A job that runs saves and ends, one that has not begun does not begin. A second signal leaves at once.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.file = folder / f".stop-{os.getpid()}-{time.time_ns()}"

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self.file.unlink(missing_ok=True)

    def heard(self) -> None:
        self.file.touch()
        print("\nstopping the sweep: what runs saves first; once more to leave at once", file=sys.stderr, flush=True)


def launch(launcher: Any, folder: Path, jobs: Sequence[Job], stop: Stop) -> bool:
    """Run jobs into their folders. Hydra's basic launcher gets one at a time, so that a stop comes between two.

    Returns:
        Whether the launcher did its part; what became of the jobs is in their folders.
    """
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    batches = [[job] for job in jobs] if isinstance(launcher, BasicLauncher) else [list(jobs)]
    for batch in batches:
        if stop.asked or not batch:
            break
        try:
            returned = launcher.launch([hydra_overrides(job, folder, stop) for job in batch], batch[0].number)
            for job in returned:
                _ = job.return_value  # raises what went wrong outside the jobs' own processes
        except Exception as error:  # Slurm is not there, a node died: what other jobs did is told all the same
            traceback.print_exc()
            log.warning(f"sweep: the launcher failed: {error}")
            return False
    return True


def hydra_overrides(job: Job, folder: Path, stop: Stop) -> list[str]:
    """The job's overrides, where it writes and looks; features go to the disk, where the next job finds them."""
    own = {"hydra.sweep.dir": folder.resolve(), "hydra.sweep.subdir": job.number}
    own[f"+hydra.job.env_set.{STOP}"] = stop.file.resolve()
    if "trainer.cache_ram" not in job.settings:
        own["trainer.cache_ram"] = "0MiB"
    return [*job.overrides, *(f"{key}={quoted(str(value))}" for key, value in own.items())]


def quoted(value: str) -> str:
    """A value that Hydra's grammar reads as this very text."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"

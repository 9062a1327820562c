"""Hand jobs to Hydra's launcher, whichever it is, and stop them all through a file that each of them watches."""

import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smolvlm_exp.runs.checkpoint import chain_of, is_disk_error
from smolvlm_exp.runs.overrides import as_override
from smolvlm_exp.runs.sweep_record import Job
from smolvlm_exp.sweep.job_process import STOP
from smolvlm_exp.utils.signals import StopRequest

log = logging.getLogger(__name__)


class SweepStop(StopRequest):
    """On Ctrl-C or SIGTERM, creates a file that every job's parent process watches, on whatever machine.

    Running jobs save and stop; no other job starts. A second signal exits at once.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.file = folder / f".stop-{os.getpid()}-{time.time_ns()}"

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self.file.unlink(missing_ok=True)

    def on_request(self) -> None:
        self.file.touch()
        message = "\nstopping the sweep after running jobs have saved; press Ctrl-C again to exit at once"
        print(message, file=sys.stderr, flush=True)


def launch(launcher: Any, folder: Path, jobs: Sequence[Job], stop: SweepStop) -> bool:
    """Run jobs into their folders; with Hydra's basic launcher one at a time, so that a stop takes effect between two.

    Returns:
        Whether the launcher worked; how each job ended is in its folder.
    """
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    batches = [[job] for job in jobs] if isinstance(launcher, BasicLauncher) else [list(jobs)]
    for batch in batches:
        if stop.requested or not batch:
            break
        try:
            returned = launcher.launch([hydra_overrides(job, folder, stop) for job in batch], batch[0].number)
            for job in returned:
                _ = job.return_value  # raises what went wrong outside the jobs' own processes
        except Exception as error:  # Slurm is not there, a node died: the other jobs' results are still reported
            if any(map(is_disk_error, chain_of(error))):  # where they cannot be written either
                raise
            traceback.print_exc()
            log.warning(f"sweep: the launcher failed: {error}")
            return False
    return True


def hydra_overrides(job: Job, folder: Path, stop: SweepStop) -> list[str]:
    """The job's overrides, its folder and its stop file; image features go to disk, where the next job finds them."""
    own = {
        "hydra.sweep.dir": folder.resolve(),
        "hydra.sweep.subdir": job.number,
        f"+hydra.job.env_set.{STOP}": stop.file.resolve(),
    }
    if "trainer.cache_ram" not in job.settings:
        own["trainer.cache_ram"] = "0MiB"
    return [*job.overrides, *(as_override(key, str(value)) for key, value in own.items())]

"""What a sweep keeps: adapters, summaries, metrics and reports; of finished jobs' checkpoints what `keep` says."""

import shutil

from smolvlm_exp.runs.checkpoint import checkpoints
from smolvlm_exp.runs.sweep_record import ENDED
from smolvlm_exp.sweep.results import Outcome


def tidy(found: Outcome, keep: str) -> None:
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

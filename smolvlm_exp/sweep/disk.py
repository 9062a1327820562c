"""What a sweep keeps: adapters, summaries, metrics and reports; of finished jobs' checkpoints what `keep` says."""

import shutil

from smolvlm_exp.checkpoint import checkpoints
from smolvlm_exp.sweep.outcome import Outcome
from smolvlm_exp.sweep.record import ENDED


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

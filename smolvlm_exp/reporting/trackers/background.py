"""A tracker in a thread of its own, so that it never stops or slows training."""

import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smolvlm_exp.utils.errors import first_line
from smolvlm_exp.utils.paths import relative_to_cwd

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds to wait at a run's end for what has not been sent
TITLES = {"wandb": "W&B", "tensorboard": "TensorBoard", "trackio": "Trackio"}


class BackgroundRun:
    """Does jobs with what `start` returns, one after the other. After a failure it does no more."""

    def __init__(self, tracker: str, folder: Path, start: Callable[[], Any]) -> None:
        """`folder`: of the run, for messages."""
        self.title, self.folder = TITLES[tracker], relative_to_cwd(folder)
        self.jobs: queue.SimpleQueue[Callable[[Any], object] | None] = queue.SimpleQueue()
        self.put = self.jobs.put
        self.thread = threading.Thread(target=self.work, args=(start,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Wait for the jobs, PATIENCE seconds at most."""
        self.jobs.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            log.warning(
                f"{self.title} did not answer within {PATIENCE:g} s; giving up. All results are in {self.folder}"
            )

    def work(self, start: Callable[[], Any]) -> None:
        try:
            client = start()
            while (job := self.jobs.get()) is not None:
                job(client)
        except BaseException as error:  # SystemExit where W&B cannot log in, asyncio's CancelledError
            why = first_line(error)
            log.warning(f"{self.title} failed ({why}); nothing more is sent. All results are in {self.folder}")

"""Work for a service that may be slow, down or broken, done beside the run: it never waits, and never fails with it."""

import queue
import threading
from collections.abc import Callable
from typing import Any


class Background:
    """Jobs in their order in a thread of their own. After the first failure the others are left out, which is said."""

    def __init__(self, name: str, open: Callable[[], Any]) -> None:
        """
        Args:
            name: of the service, for messages.
            open: makes what each job is called with; it runs in the thread too.
        """
        self.name, self.open = name, open
        self.jobs: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def put(self, job: Callable[[Any], None]) -> None:
        self.jobs.put(job)

    def close(self, patience: float) -> bool:
        """Wait for the jobs, `patience` seconds at most; whether all were done or given up by then."""
        self.jobs.put(None)
        self.thread.join(patience)
        return not self.thread.is_alive()

    def work(self) -> None:
        try:
            client = self.open()
            while (job := self.jobs.get()) is not None:
                job(client)
        except (Exception, SystemExit) as error:  # W&B ends the program where it cannot log in
            reason = (str(error) or type(error).__name__).splitlines()[0]
            print(f"{self.name}: no more is sent ({reason}); the run goes on, and its folder has everything")

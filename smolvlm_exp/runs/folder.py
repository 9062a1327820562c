"""A run's folder is written by one process at a time, and never by another run."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from smolvlm_exp.utils.errors import RequestError

PATIENCE = 10.0  # seconds for the data workers of a run that was just killed to end
RUN_FILES = ("metrics.jsonl", "checkpoints", "summary.json", "adapter", "model")  # signs of a run


@contextlib.contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Within, the folder is this process's, or a `RequestError`; the lock ends with the process."""
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=PATIENCE)
    except Timeout:
        raise RequestError(
            f"{folder} is in use: another process is writing this run. Wait for it, stop it, or use another "
            "hydra.run.dir."
        ) from None
    except OSError as error:
        raise RequestError(f"{folder} cannot be written: {error.strerror}.") from error
    with lock:
        yield


def check_unused(folder: Path) -> None:
    """Refuse to start a new run in a folder, named by the command, that already holds one."""
    existing = next((name for name in RUN_FILES if (folder / name).exists()), None)
    if existing:
        raise RequestError(
            f"hydra.run.dir={folder} already holds a run ({existing}), which is never overwritten.\n"
            f"Resume it with resume={folder}, or use another folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise RequestError(f"hydra.run.dir={folder} is not writable, or cannot be made.")

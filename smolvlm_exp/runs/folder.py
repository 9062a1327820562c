"""A run's folder is its own: one process at a time writes into it, and no other run ever does."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from smolvlm_exp.utils.errors import RequestError

PATIENCE = 10.0  # seconds for data workers of a run that was killed a moment ago to notice it
RUN_FILES = ("metrics.jsonl", "checkpoints", "summary.json", "adapter", "model")  # what tells that a run was here


@contextlib.contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Within, the folder is this process's. A process that dies lets go of it.

    Raises:
        RequestError: another process is at work in it.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise RequestError(
            f"{folder} is in use: another process is writing this run. Wait for it, stop it, or use another "
            "hydra.run.dir."
        ) from None
    except OSError as error:
        raise RequestError(f"{folder} cannot be written: {error.strerror}.") from error
    try:
        yield
    finally:
        lock.release()


def check_unused(folder: Path) -> None:
    """Before a new run begins in a folder that the command names.

    Raises:
        RequestError: there is a run in it already.
    """
    found = next((name for name in RUN_FILES if (folder / name).exists()), None)
    if found:
        raise RequestError(
            f"hydra.run.dir={folder}: there is a run in it already ({found}), which is not written over.\n"
            f"Go on with it by resume={folder}, or give another folder."
        )
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise RequestError(f"hydra.run.dir={folder}: nothing can be written there ({there}).")

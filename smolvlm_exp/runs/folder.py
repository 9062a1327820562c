"""A run's folder is written by one process at a time, and never by another run."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from filelock import FileLock, Timeout

from smolvlm_exp.runs.find import damaged, saved_hydra
from smolvlm_exp.utils.errors import RequestError

PATIENCE = 10.0  # seconds for the data workers of a run that was just killed to end
RESULTS = ("metrics.jsonl", "checkpoints", "adapter", "model", "answers.jsonl")  # of work that was done
RUN_FILES = ("metrics.jsonl", "checkpoints", "summary.json", "adapter", "model")  # signs of a run
MULTIRUN = "multirun.yaml"  # the configuration of a sweep
COMPLETED = ("mine", "generate")  # tasks that complete what an earlier command of theirs has left
T = TypeVar("T")


@contextlib.contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Within, the folder, made where it is missing, is this process's, or a `RequestError`; it ends with the process.

    Whoever asks what is in the folder in order to write into it asks within.
    """
    with lock(folder / ".lock", folder):
        yield


def missing(folder: Path) -> list[Path]:
    """The folder and its parents, as far as they are not there."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


@contextlib.contextmanager
def remove_if_refused(folder: Path, made: Sequence[Path]) -> Iterator[None]:
    """Within, a request that is refused takes the folders along that were made for it, and no results.

    Args:
        folder: locked; another process may have written into it before it was.
        made: `missing`, from before it was locked.
    """
    ours = folder in made and [path.name for path in folder.iterdir()] == [".lock"]
    try:
        yield
    except (RequestError, SystemExit) as error:
        refused = isinstance(error, RequestError) or error.code == 2
        if refused and ours and not any((folder / name).exists() for name in RESULTS):
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another run has begun beside it
                for parent in made[1:]:
                    parent.rmdir()
        raise


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """The same for one file, in a folder that other processes may write into too."""
    with lock(path.with_name(f".{path.name}.lock"), path):
        yield


def in_use(folder: Path) -> bool:
    """Whether a process holds a run's folder."""
    if not (folder / ".lock").is_file():
        return False
    try:
        with FileLock(folder / ".lock").acquire(timeout=0):
            return False
    except Timeout:
        return True


@contextlib.contextmanager
def lock(file: Path, path: Path) -> Iterator[None]:
    try:
        held = FileLock(file.absolute(), is_singleton=True).acquire(timeout=PATIENCE)  # which may hold it already
    except Timeout:
        raise RequestError(
            f"{path} is in use: another process is writing there. Wait for it, stop it, or name another place."
        ) from None
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}.") from error
    with held:
        yield


def check_unused(folder: Path, task: str) -> None:
    """Refuse to start in a folder that holds a run or a sweep, unless this task completes what it finds there."""
    for sweep in (folder, folder.parent) if folder.name.isdigit() else (folder,):
        if (sweep / MULTIRUN).is_file():
            raise RequestError(
                f"hydra.run.dir={folder}: {sweep} holds a sweep ({MULTIRUN}), which is never overwritten: use another "
                "folder."
            )
    existing = next((name for name in RUN_FILES if (folder / name).exists()), None)
    completes = task in COMPLETED and saved_hydra(folder, "config").get("task", {}).get("name") == task
    if existing and not completes:
        raise RequestError(
            f"hydra.run.dir={folder} already holds a run ({existing}), which is never overwritten.\n"
            f"Resume it with resume={folder}, or use another folder."
        )


def check_unused_sweep(folder: Path, config: Any) -> None:
    """Refuse to start a sweep in a folder that holds one of another kind, or a run, there or by the name of a job.

    Args:
        config: of the sweep, with Hydra's own settings.
    """
    path, here = folder / MULTIRUN, sweep_kind(config)
    if not path.is_file():
        for place in (folder, *folder.glob("[0-9]*")):
            if existing := next((name for name in (".hydra", *RUN_FILES) if (place / name).exists()), None):
                raise RequestError(
                    f"hydra.sweep.dir={folder}: {place} already holds a run ({existing}), which is never overwritten: "
                    "use another folder."
                )
        return
    there = read_multirun(folder, sweep_kind)
    if there != here or config["task"]["name"] not in (*COMPLETED, "train"):
        raise RequestError(
            f"hydra.sweep.dir={folder} already holds a sweep ({' of '.join(there)}), which is never overwritten: use "
            "another folder."
        )


def read_multirun(folder: Path, part: Callable[[Any], T]) -> T:
    """A part of the configuration that the sweep in `folder` was started with.

    Raises:
        RequestError: the file is missing or damaged.
    """
    path = folder / MULTIRUN
    try:
        return part(yaml.safe_load(path.read_bytes()) if path.is_file() else None)
    except (OSError, yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise damaged(path, error, "sweep") from error


def sweep_kind(config: Any) -> tuple[str, str]:
    """What starts its jobs, and their task."""
    return config["hydra"]["sweeper"]["_target_"].rpartition(".")[2], f"task={config['task']['name']}"

"""Checkpoints that are whole and verified, or invisible.

One is written into a folder of another name and brought to the disk; a manifest with every file's SHA-256 comes last;
then the folder gets its name. What a kill, a full disk or a failing disk leaves is told from a whole one by the
manifest alone, and nothing that does not agree with it is ever read.
"""

import contextlib
import errno
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from smolvlm_exp.utils.errors import RequestError, RunError
from smolvlm_exp.utils.files import fsync, sha256

log = logging.getLogger(__name__)


MANIFEST = "manifest.json"
SAVING = ".saving"  # beside the checkpoints: what is being written
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How torch and safetensors, which do not raise OSError, say that a disk or a quota is full.
FULL_WORDS = ("no space left", "os error 28", "file too large", "os error 27", "disk quota", "inline_container")


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints that were written to the end, the newest last; whether they are sound says `newest`."""
    return [path for path in checkpoint_folders(run) if (path / MANIFEST).is_file()]


def checkpoint_folders(run: Path) -> list[Path]:
    """Folders that have a checkpoint's name, by step."""
    found = [path for path in (run / "checkpoints").glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[11:])


def newest_intact(run: Path) -> Path:
    """The newest checkpoint that is what its manifest says; those that are not are named, with what is wrong.

    Raises:
        RequestError: there is none, so that there is nothing to go on from. Nothing starts from step 0 instead.
    """
    if (run / "checkpoints" / SAVING).exists():
        log.warning(f"checkpoint: a save in {run} was cut short; what it left is not used")
    problems: list[str] = []
    for checkpoint in reversed(checkpoint_folders(run)):
        problem = damage(checkpoint)
        if not problem:
            for each in problems:
                log.warning(f"checkpoint: {each}")
            if problems:
                log.warning(f"checkpoint: {checkpoint.name} is whole, and is used in their place")
            return checkpoint
        problems.append(f"{checkpoint.name} is not used: {problem}")
    if problems:
        told = "\n".join(f"  {each}" for each in problems)
        raise RequestError(
            f"resume={run}: none of its checkpoints is whole, so nothing was started.\n{told}\n"
            "Bring a good copy back, or start again in another folder (leave resume out)."
        )
    raise RequestError(f"resume={run}: it has saved no checkpoint yet, so there is nothing to go on from.")


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, in plain words; empty when every file is there as it was written."""
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(size), str(digest)) for name, (size, digest) in listed.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    there = {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*") if not path.is_dir()}
    there.pop(MANIFEST)
    for name in sorted(expected.keys() | there.keys()):
        if name not in there:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is not one of its files"
        if there[name].is_symlink() or not there[name].is_file():
            return f"{name} is no plain file"
        size, digest = expected[name]
        try:
            found = there[name].stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes where {size:,} were written"
            if sha256(there[name]) != digest:
                return f"{name} is not what was written: its SHA-256 differs"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


@contextlib.contextmanager
def disk_full_as_run_error(run: Path) -> Iterator[None]:
    """Within, a disk that is full ends the run with one error that says so and how to go on.

    Raises:
        RunError: the disk, a quota, or a limit on the sizes of files.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        left = checkpoints(run)
        told = "Free some and give the command again: nothing half-written is left."
        if left:
            told = f"Free some and go on: {left[-1].name} is whole, and resume={run} goes on from it."
        if (run / "checkpoints").exists():
            told += " trainer.save_total_limit=1 keeps fewer."
        free = shutil.disk_usage(run).free / 2**20
        raise RunError(
            f"no room left in {run}: {str(error).splitlines()[0]} ({free:,.0f} MiB free).\n{told}"
        ) from error


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `final` once all of it is on the disk; nothing is left of one that fails.

    What had that name before stays until then. What a process that was killed left there is cleared up here: two at
    once are kept apart by folder.claimed.
    """
    staging, before = (final.with_name(f".{final.name}.{end}") for end in ("part", "old"))

    def clear() -> None:
        if before.exists() and not final.exists():
            before.rename(final)  # it ended between the two renames
        for path in (staging, before):
            shutil.rmtree(path, ignore_errors=True)

    clear()
    try:
        with disk_full_as_run_error(final.parent):
            staging.mkdir(parents=True)
            yield staging
            for path in (*staging.rglob("*"), staging):
                fsync(path)
            if final.exists():
                final.rename(before)
            staging.rename(final)
            fsync(final.parent)
    finally:
        clear()


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk, a quota or a file-size limit is behind an error, in whichever of its guises."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(words in str(error).lower() for words in FULL_WORDS)


def finalise(staging: Path, final: Path) -> None:
    """Everything in `staging` to the disk, its manifest last; then its name."""
    files = [path for path in sorted(staging.rglob("*")) if path.is_file()]
    listed = {str(path.relative_to(staging)): (path.stat().st_size, sha256(path)) for path in files}
    for path in files:
        fsync(path)
    manifest = staging / MANIFEST
    manifest.write_text(json.dumps({"version": 1, "files": listed}, indent=1) + "\n", encoding="utf-8")
    for path in (manifest, *(path for path in staging.rglob("*") if path.is_dir()), staging):
        fsync(path)
    remove_checkpoint(final)  # a damaged one that the run went past
    staging.rename(final)
    fsync(final.parent)


def prune_checkpoints(saved: Path, limit: int | None, best: str | None) -> None:
    """Remove what came before the checkpoint just saved, but for the newest `limit - 1` and the best."""
    run = saved.parent.parent
    older = [path for path in checkpoints(run) if step_of(path) < step_of(saved) and str(path) != best]
    for path in older[: len(older) - (limit - 1)] if limit and limit <= len(older) else []:
        remove_checkpoint(path)


def remove_checkpoint(checkpoint: Path) -> None:
    """It loses its name first: a kill half-way leaves nothing that looks like a checkpoint."""
    if not checkpoint.exists():
        return
    away = checkpoint.parent / SAVING / f"old-{checkpoint.name}"
    away.parent.mkdir(exist_ok=True)
    shutil.rmtree(away, ignore_errors=True)
    checkpoint.rename(away)
    shutil.rmtree(away, ignore_errors=True)

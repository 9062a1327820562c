"""Checkpoints that are complete and verified, or invisible.

One is written into a staging folder, then a manifest with every file's SHA-256; all of it is synced, and the folder
renamed. Nothing that does not agree with its manifest is ever read.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from smolvlm_exp.utils.errors import RequestError, RunError, first_line
from smolvlm_exp.utils.files import fsync, read_json, sha256

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SAVING = ".saving"  # among the checkpoints: the staging folder
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FAILED = (errno.EIO, errno.EROFS, errno.ESTALE)  # a file system that meets errors may become read-only
SPARE = 2**20  # bytes; a disk with less is full
# How torch and safetensors, which do not raise OSError, say that a disk or a quota is full, or that a disk failed.
FULL_WORDS = ("no space left", "os error 28", "file too large", "os error 27", "disk quota", "inline_container")
FAILED_WORDS = ("input/output error", "os error 5)", "read-only file system", "os error 30")


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints that were completely written, newest last; not verified, see `newest_intact`."""
    return [path for path in checkpoint_folders(run) if (path / MANIFEST).is_file()]


def checkpoint_folders(run: Path) -> list[Path]:
    """Folders named as checkpoints, by step."""
    folders = (run / "checkpoints").glob("checkpoint-*")
    named = (path for path in folders if path.name[11:].isdecimal() and path.name == f"checkpoint-{step_of(path)}")
    return sorted(named, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[11:])


def newest_intact(run: Path) -> Path:
    """The newest checkpoint that agrees with its manifest; newer ones that do not are reported.

    Raises:
        RequestError: there is none. Nothing starts from step 0 instead.
    """
    if (run / "checkpoints" / SAVING).exists():
        log.warning(f"checkpoint: a save in {run} was interrupted; its files are ignored")
    problems: list[str] = []
    for checkpoint in reversed(checkpoint_folders(run)):
        problem = damage(checkpoint) or of_another_step(checkpoint)
        if not problem:
            for line in problems:
                log.warning(f"checkpoint: {line}")
            if problems:
                log.warning(f"checkpoint: {checkpoint.name} is intact; resuming from it instead")
            return checkpoint
        problems.append(f"{checkpoint.name} is damaged: {problem}")
    if not problems:
        raise RequestError(f"resume={run}: this run has saved no checkpoint, so there is nothing to resume from.")
    listed = "\n".join(f"  {line}" for line in problems)
    raise RequestError(
        f"resume={run}: none of its checkpoints is intact, so nothing was started.\n{listed}\n"
        "Restore a good copy, or start again in another folder (without resume)."
    )


def of_another_step(checkpoint: Path) -> str:
    """Of a checkpoint that was given another name; empty when it is of the step that it is named after."""
    step = read_json(checkpoint / "trainer_state.json").get("global_step")
    return "" if step == step_of(checkpoint) else f"its trainer_state.json is of step {step}"


def damage(checkpoint: Path, alone: bool = True) -> str:
    """What is wrong with a checkpoint; empty when every file is as it was written.

    Args:
        alone: no other file may be there.
    """
    if not is_regular(checkpoint / MANIFEST) and os.path.lexists(checkpoint / MANIFEST):
        return f"its {MANIFEST} is not a regular file"
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(size), str(digest)) for name, (size, digest) in listed.items()}
        found = (path for path in checkpoint.rglob("*") if path.is_symlink() or not path.is_dir())
        files = {str(path.relative_to(checkpoint)): path for path in found}
    except FileNotFoundError:
        return f"no {MANIFEST}, so it was never finished"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    files.pop(MANIFEST)
    for name in sorted(expected.keys() | (files.keys() if alone else set())):
        if name not in files:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is not in its {MANIFEST}"
        if not is_regular(files[name]):
            return f"{name} is not a regular file"
        size, digest = expected[name]
        try:
            actual = files[name].stat().st_size
            if actual != size:
                return f"{name} has {actual:,} bytes, expected {size:,}"
            if sha256(files[name]) != digest:
                return f"{name} has changed: its SHA-256 differs"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


def is_regular(path: Path) -> bool:
    """Neither a link nor a pipe or a device, which could be read without end."""
    return path.is_file() and not path.is_symlink()


@contextlib.contextmanager
def disk_error_as_run_error(folder: Path) -> Iterator[None]:
    """Within, a disk that is full or fails, a quota or a limit on file sizes is a `RunError` that says how to resume.

    Args:
        folder: of the run, the sweep or the export that is written.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not folder.exists():
            raise RunError(
                f"{folder} is gone: it was renamed or removed while it was written.\nWhat was saved is where it was "
                "moved to: resume=FOLDER continues there."
            ) from error
        cause = next(filter(is_disk_error, chain_of(error)), None)
        if isinstance(error, RequestError | RunError) or cause is None:
            raise
        full, first = is_disk_full(cause), first_line(cause)
        if full:
            places = (Path(tempfile.gettempdir()),) if shutil.disk_usage(folder).free > SPARE else ()
            place = next((path for path in places if shutil.disk_usage(path).free < SPARE), folder)
            problem = f"no space left in {place}: {first} ({shutil.disk_usage(place).free / 2**20:,.0f} MiB free)"
        else:
            problem = f"the disk failed in {folder}: {first}"
        raise RunError(f"{problem}.\n{'Free some space' if full else 'Check the disk'}{what_then(folder)}") from error


def what_then(folder: Path) -> str:
    """How to continue in a folder when its disk can be written again."""
    sweep = next((path for path in (folder, folder.parent) if (path / "sweep.json").is_file()), None)
    fewer = " trainer.save_total_limit=1 keeps fewer checkpoints." if (folder / "checkpoints").exists() else ""
    if sweep:
        return f", then -m sweep={sweep} continues.{fewer}"
    if saved := checkpoints(folder):
        return f", then resume={folder} continues from {saved[-1].name}, which is intact.{fewer}"
    if fewer:
        return f", then start again in another folder: no checkpoint was complete.{fewer}"
    return " and run the command again; no partial files are left."


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A folder to fill that is renamed to `final` once all of it is on the disk; nothing is left of one that fails.

    What had that name before stays until then. Leftovers of a killed process are removed; folder.lock_run_folder
    keeps two processes out of one folder.
    """
    staging, before = (final.with_name(f".{final.name}.{end}") for end in ("part", "old"))

    def clear() -> None:
        if before.exists() and not final.exists():
            before.rename(final)  # killed between the two renames
        for path in (staging, before):
            shutil.rmtree(path, ignore_errors=True)

    clear()
    try:
        with disk_error_as_run_error(final.parent):
            staging.mkdir(parents=True)
            yield staging
            fsync_all(staging)
            if final.exists():
                final.rename(before)
            staging.rename(final)
            fsync(final.parent)
    finally:
        clear()


def is_disk_full(error: BaseException) -> bool:
    """Whether a full disk, a quota or a file-size limit is behind an error."""
    return speaks_of(error, FULL, FULL_WORDS)


def is_disk_error(error: BaseException) -> bool:
    """Whether a disk that is full or fails is behind an error."""
    return is_disk_full(error) or speaks_of(error, FAILED, FAILED_WORDS)


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from: Optuna says of a disk that fails that it holds no lock."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def speaks_of(error: BaseException, numbers: Sequence[int], words: Sequence[str]) -> bool:
    known = isinstance(error, OSError) and error.errno in numbers
    return known or any(word in str(error).lower() for word in words)


def fsync_all(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        fsync(path)


def finalise(staging: Path, final: Path) -> None:
    """Write the manifest of `staging`, sync everything in it, and rename it."""
    files = [path for path in sorted(staging.rglob("*")) if path.is_file()]
    listed = {str(path.relative_to(staging)): (path.stat().st_size, sha256(path)) for path in files}
    text = json.dumps({"version": 1, "files": listed}, indent=1) + "\n"
    (staging / MANIFEST).write_text(text, encoding="utf-8")
    fsync_all(staging)
    remove_checkpoint(final)  # a damaged one of the same step
    staging.rename(final)
    fsync(final.parent)


def prune_checkpoints(saved: Path, limit: int | None, best: str | None, damaged: Collection[int] = ()) -> None:
    """Remove those before the checkpoint just saved, except the newest `limit - 1` and the best.

    Args:
        damaged: steps of checkpoints that are removed before all others, so that none takes an intact one's place.
    """
    older = [path for path in checkpoints(saved.parents[1]) if step_of(path) < step_of(saved) and str(path) != best]
    older.sort(key=lambda path: step_of(path) not in damaged)
    for path in older[: max(len(older) - (limit - 1), 0)] if limit else ():
        remove_checkpoint(path)


def remove_checkpoint(checkpoint: Path) -> None:
    """Renamed first, so that a kill half-way leaves nothing that looks like a checkpoint."""
    if not os.path.lexists(checkpoint):
        return
    away = checkpoint.parent / SAVING / f"old-{checkpoint.name}"
    away.parent.mkdir(exist_ok=True)
    shutil.rmtree(away, ignore_errors=True)
    checkpoint.rename(away)
    shutil.rmtree(away, ignore_errors=True)

"""Run a job of a sweep in a process of its own: however it ends, the other jobs continue, under every launcher.

An exception, running out of memory and kill -9 end the process and are recorded in the job's summary.json. The process
holds its folder's lock, so that no job runs twice at once, and stops after saving when its parent is gone. On Linux
without a GPU it is forked from a server that has already imported torch, transformers and TRL; CUDA does not work in
forks, so elsewhere every job imports them itself (7 s).
"""

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from filelock import FileLock, Timeout

from smolvlm_exp.config.schema import Config
from smolvlm_exp.runs.checkpoint import disk_error_as_run_error
from smolvlm_exp.runs.find import choices, summary_of
from smolvlm_exp.runs.sweep_record import ENDED, can_resume, job_label, job_of, job_state, read_keys
from smolvlm_exp.sweep.devices import assign_device
from smolvlm_exp.sweep.results import RUNNING, SweepResults, prune_checkpoints, read_result, read_results
from smolvlm_exp.utils.errors import Pruned, RequestError, RunError, isolated
from smolvlm_exp.utils.files import write_json
from smolvlm_exp.utils.formatting import as_finite, duration
from smolvlm_exp.utils.phases import clock
from smolvlm_exp.utils.signals import STOPPED
from smolvlm_exp.utils.startup import configure_logging, silence_upstream

log = logging.getLogger(__name__)

STOP = "SMOLVLM_EXP_STOP"  # path of a file; once it exists, the sweep's jobs stop after saving (launcher.py creates it)
PATIENCE = 30.0  # seconds for a job whose sweep was just killed to save and release its folder


def run_job(config: Config, folder: Path, home: Path, at_once: int) -> float | None:
    """Run the job of `folder` in a process of its own and prune the sweep's checkpoints; returns its metric.

    Args:
        home: where the sweep's command was typed; a cluster's worker may start elsewhere.
        at_once: jobs at once on this machine; -1: one per core.
    """
    if stop_requested():
        return None
    sweep, job = folder.parent, job_of(folder)
    assert job is not None
    log.info(f"[{job.number}] {job_label(job, read_keys(sweep))}")
    run_in_process(config, folder, home, at_once)
    results, result = read_results(sweep, config.metric), read_result(sweep, job)
    reason = f": {result.reason}" if result.reason else ""
    log.info(f"[{job.number}] {result.status}{reason}{remaining_time(results)}")
    prune_checkpoints(results, config.keep_checkpoints)
    return result.value(results.metric)


def remaining_time(results: SweepResults) -> str:
    """How many jobs are left, and how long they will take, judging by the finished ones."""
    left = sum(job.status in ("missing", "cut", "stopped", RUNNING) for job in results.jobs)
    times = (as_finite(job.summary.get("seconds")) for job in results.jobs if job.status == "done")
    seconds = [time for time in times if time is not None]
    if not left:
        return ""
    estimate = f", about {duration(median(seconds) * left)} one after the other" if seconds else ""
    return f"; {left} of {len(results.jobs)} jobs left{estimate}"


def run_in_process(config: Config, folder: Path, home: Path, at_once: int) -> None:
    """Run one job in a child process and wait for it; its summary.json says how it ended."""
    # joblib's workers set `loky`, which their children do not know
    multiprocessing.set_start_method("forkserver" if can_fork() else "spawn", force=True)
    multiprocessing.set_forkserver_preload(["smolvlm_exp.sweep.preload"])
    child = multiprocessing.Process(target=run_child, args=(config, folder, home, at_once))
    child.start()
    stopping = False
    with ignore_sigint():
        while child.exitcode is None:
            child.join(timeout=0.2)
            if stop_requested() and not stopping:
                stopping = True
                child.terminate()
    stopped = stopping or stop_requested()  # Ctrl-C reaches the child too
    if child.exitcode not in (0, STOPPED) and not stopped and summary_of(folder).get("exit_code") != child.exitcode:
        record_failure(config, folder, describe_exit(child.exitcode), child.exitcode)


def can_fork() -> bool:
    return sys.platform == "linux" and not Path("/proc/driver/nvidia").exists()


@contextlib.contextmanager
def ignore_sigint() -> Iterator[None]:
    """In a launcher's worker, which Ctrl-C reaches too; the sweep's command decides what stops."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    worker = in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if worker:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        if worker:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def stop_requested() -> bool:
    return Path(os.environ.get(STOP, "/dev/null/none")).exists()


def describe_exit(exit_code: int) -> str:
    """Why a process ended that could not record it itself."""
    if exit_code > 0:
        return f"its process ended with exit code {exit_code}"
    killer = signal.Signals(-exit_code)
    hint = " (by a user, or by the system because memory ran out)" if killer == signal.SIGKILL else ""
    return f"killed by {killer.name}{hint}"


def run_child(config: Config, folder: Path, home: Path, at_once: int) -> None:
    """Runs in the child. Its exit code: 0 done or run by another command, 1 failed, 75 stopped after saving."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the server ignores it
    clock.restart()
    os.chdir(home)
    threading.Thread(target=stop_with_parent, daemon=True).start()
    try:
        with (
            disk_error_as_run_error(folder),
            FileLock(folder / ".lock").acquire(timeout=PATIENCE),
            assign_device(at_once),
            tee_output(folder / "output.log", f"[{folder.name}] "),
        ):
            code = 0 if job_state(folder) in ENDED else attempt(config, folder)
    except Timeout:
        log.info(f"[{folder.name}] another command is already running this job")
        code = 0
    except RunError as error:  # of the disk, outside of the run itself
        record_failure(config, folder, error)
        code = 1
    sys.exit(code)


def attempt(config: Config, folder: Path) -> int:
    """Train, from the newest checkpoint where an earlier attempt may be resumed; returns the exit code."""
    silence_upstream()
    configure_logging()
    resume = can_resume(folder)
    for name in ("summary.json", *(() if resume else ("metrics.jsonl", "checkpoints"))):  # of an earlier attempt
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    try:
        from smolvlm_exp.sweep.pruning_callback import pruning_callbacks
        from smolvlm_exp.tasks.train import train

        config = replace(config, resume=str(folder)) if resume else config
        with disk_error_as_run_error(folder):  # before training too: what is no RunError begins again
            summary = train(config, folder, pruning_callbacks(folder))
    except Pruned:
        return 0
    except Exception as error:
        if isinstance(error, RequestError | RunError):
            print(f"smolvlm_exp: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        if not summary_of(folder):  # it failed before the run had reached the tracker
            with isolated("the tracker"):
                from smolvlm_exp.tasks.tracking import tracker_of

                tracker_of(config, folder).finish({"status": "failed"}, exit_code=1)
        record_failure(config, folder, error)
        return 1
    except (KeyboardInterrupt, SystemExit):  # a second signal, or before there was anything to save
        (folder / "summary.json").unlink(missing_ok=True)
        return STOPPED
    return STOPPED if summary["status"] == "stopped" else 0


def stop_with_parent() -> None:
    """Save and stop when the process that waits for this job has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def record_failure(config: Config, folder: Path, reason: Exception | str, exit_code: int = 1) -> None:
    """Add the failure to what the run itself has written into summary.json."""
    known = summary_of(folder) or {"seed": config.seed, "settings": choices(folder)}
    if isinstance(reason, Exception):
        reason = f"{type(reason).__name__}: {reason}"
    with contextlib.suppress(OSError):  # a full disk may have ended the run
        write_json(folder / "summary.json", {**known, "status": "failed", "reason": reason, "exit_code": exit_code})


class Tee:
    """A text stream that also writes to a log, and prefixes each line on the terminal with the job's number.

    A disk that is full takes lines of the log, not the job.
    """

    def __init__(self, terminal: TextIO, log: TextIO, prefix: str) -> None:
        self.terminal, self.log, self.prefix = terminal, log, prefix
        self.at_line_start = True

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.log.write(text)
        lines = text.splitlines(keepends=True)
        prefixed = "".join((self.prefix if i or self.at_line_start else "") + line for i, line in enumerate(lines))
        self.at_line_start = text.endswith("\n") if text else self.at_line_start
        self.terminal.write(prefixed)
        if self.at_line_start:
            self.flush()
        return len(text)

    def flush(self) -> None:
        self.terminal.flush()
        with contextlib.suppress(OSError):
            self.log.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.log, name)  # encoding, fileno; no terminal, so no progress bars


@contextlib.contextmanager
def tee_output(path: Path, prefix: str) -> Iterator[None]:
    """Within, what this process prints, and the stack trace of a crash, also go to the end of the file `path`."""
    before, log = (sys.stdout, sys.stderr), path.open("a", encoding="utf-8")
    sys.stdout, sys.stderr = (Tee(stream, log, prefix) for stream in before)
    faulthandler.enable(file=log)
    try:
        yield
    finally:
        faulthandler.disable()
        sys.stdout, sys.stderr = before
        with contextlib.suppress(OSError):
            log.close()

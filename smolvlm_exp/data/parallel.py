"""A function over all rows of a data set, on all cores; the result is cached on disk."""

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import xxhash
from filelock import FileLock

from smolvlm_exp.utils.cores import usable_cores
from smolvlm_exp.utils.errors import RunError
from smolvlm_exp.utils.files import atomic_file
from smolvlm_exp.utils.progress import progress

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

log = logging.getLogger(__name__)

Function: TypeAlias = "Callable[[pa.Table], pa.Table]"

BATCH = 16  # rows that a process holds at once, with their images
FEWEST = 48  # rows that are worth other processes, which take a tenth of a second to start

worker_rows: Any  # of a process of the pool
worker_function: Any


def hash_of(*parts: Any) -> str:
    """A hash of JSON, the same in every process."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())


def worker_count(requested: int | None, rows: int, least: int = 16) -> int | None:
    """Processes for `rows` rows: as many as requested; else one per core, each with `least` rows or more.

    None: this process alone.
    """
    if multiprocessing.current_process().daemon:  # which may not have children
        return None
    count = requested or (min(usable_cores(), rows // least) if rows >= FEWEST else 1)
    return count if count > 1 else None


def map_rows(
    rows: "Dataset",
    function: Function,
    features: "Features",
    key: str,
    workers: int | None,
    label: str,
    cached: bool = True,
) -> "Dataset":
    """`function` of every `BATCH` rows, in order, the same whatever the number of processes.

    Processes that need the same rows at once, as the ranks of a run and the jobs of a sweep do, wait for the first.

    Args:
        function: of a table of rows as they are stored; returns as many, of the types `features`.
        key: a hash of all that the result depends on.
        workers: processes; None: this one.
        label: of the progress bar.
        cached: keep the result on disk, and take it from there; else in memory.
    """
    import pyarrow as pa
    from datasets import Dataset, config
    from datasets.table import InMemoryTable

    def tables() -> Iterator[pa.Table]:
        with progress(label, len(rows)) as advance:
            for table in batches(rows.with_format("arrow"), function, workers):
                yield table
                advance(len(table))

    folder = Path(config.HF_DATASETS_CACHE) / "smolvlm_exp"
    path = folder / f"{key}.arrow"

    def stored() -> Dataset:
        made = Dataset.from_file(str(path))
        made._fingerprint = key
        return made

    try:
        if cached:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                with suppress(OSError, pa.ArrowInvalid):  # it is not there, or was cut
                    return stored()
                for left in folder.glob(f".{path.name}.*"):  # by a process that was killed
                    left.unlink()
                with (
                    atomic_file(path) as part,
                    pa.OSFile(str(part), "wb") as file,
                    pa.ipc.new_stream(file, features.arrow_schema) as stream,
                ):
                    for table in tables():
                        stream.write_table(table)
                return stored()
    except OSError as error:
        log.warning(
            f"data: the cache {folder} cannot be written ({error.strerror or error}): rows are checked again in every "
            "run, in memory. HF_DATASETS_CACHE or HF_HOME names another place"
        )
    table = pa.concat_tables([features.arrow_schema.empty_table(), *tables()])
    return Dataset(InMemoryTable(table), fingerprint=key)


def batches(rows: "Dataset", function: Function, workers: int | None) -> "Iterator[pa.Table]":
    """`function` of one batch after the other; of few more than there are processes at once, for memory's sake."""
    spans = [(start, min(start + BATCH, len(rows))) for start in range(0, len(rows), BATCH)]
    if workers is None:
        yield from (function(rows[start:stop]) for start, stop in spans)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)  # a fork has all of `rows`
    pool = ProcessPoolExecutor(workers, context, start_worker, (rows, function))
    waiting: deque[Future[pa.Table]] = deque()
    try:
        for span in spans:
            waiting.append(pool.submit(run_worker, *span))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RunError(
            "A process that prepares rows was killed, perhaps because memory ran out: data.num_proc=1 takes the least."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(rows: "Dataset", function: Function) -> None:
    """In a new process of the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=exit_with_parent, daemon=True).start()
    global worker_rows, worker_function
    worker_rows, worker_function = rows, function


def exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_worker(start: int, stop: int) -> "pa.Table":
    return worker_function(worker_rows[start:stop])

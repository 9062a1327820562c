"""Several jobs at once on one machine: each has a GPU of its own, or its share of the cores where there is none."""

import contextlib
import getpass
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


@contextlib.contextmanager
def assign_device(jobs: int) -> Iterator[None]:
    """Within, this process sees one GPU that no other job of this person uses, or computes with a share of the cores.

    Args:
        jobs: at once on this machine; -1: one a core. One alone has all of it.
    """
    if jobs == 1:
        yield
    elif cards := visible_gpus():
        with free_gpu(cards) as card:
            os.environ["CUDA_VISIBLE_DEVICES"] = card
            yield
    else:
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores // (jobs if jobs > 0 else cores))))
        yield


def visible_gpus() -> list[str]:
    """The GPUs this process may use, without starting CUDA on any of them."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [card.strip() for card in told.split(",") if card.strip()]
    import torch

    return [str(card) for card in range(torch.cuda.device_count())]


@contextlib.contextmanager
def free_gpu(cards: list[str]) -> Iterator[str]:
    """One of `cards` that no other job holds; waits for one. A job that dies lets go of its own."""
    folder = Path(tempfile.gettempdir()) / f"smolvlm_exp-{getpass.getuser()}"
    folder.mkdir(exist_ok=True)
    locks = {card: FileLock(folder / f"card-{card}.lock") for card in cards}
    while True:
        for card, lock in locks.items():
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                try:
                    yield card
                finally:
                    lock.release()
                return
        time.sleep(0.5)

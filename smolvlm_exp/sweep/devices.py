"""Jobs in parallel on one machine: each gets a GPU of its own or, without GPUs, its share of the cores."""

import contextlib
import getpass
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from smolvlm_exp.utils.cores import usable_cores


@contextlib.contextmanager
def assign_device(jobs: int) -> Iterator[None]:
    """Within, this process sees one GPU that no other job of this user has, or uses a share of the cores.

    Args:
        jobs: at once on this machine; -1: one per core. A single job gets all GPUs and cores.
    """
    if jobs == 1:
        yield
    elif gpus := visible_gpus():
        with free_gpu(gpus) as gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            yield
    else:
        import torch

        cores = usable_cores()
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores // (jobs if jobs > 0 else cores))))
        yield


def visible_gpus() -> list[str]:
    """The GPUs this process may use, without starting CUDA on any of them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
    import torch

    return [str(gpu) for gpu in range(torch.cuda.device_count())]


@contextlib.contextmanager
def free_gpu(gpus: list[str]) -> Iterator[str]:
    """Wait for one of `gpus` that no other job holds, and hold it; a job that dies releases its GPU."""
    folder = Path(tempfile.gettempdir()) / f"smolvlm_exp-{getpass.getuser()}"
    folder.mkdir(exist_ok=True)
    locks = {gpu: FileLock(folder / f"card-{gpu}.lock") for gpu in gpus}
    while True:
        for gpu, lock in locks.items():
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                try:
                    yield gpu
                finally:
                    lock.release()
                return
        time.sleep(0.5)

"""The processes of one torch.distributed group, or the only process there is."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def place() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def from_first(answer: Callable[[], Any]) -> Any:
    """What the first process answers, in every process; where it raises, all do."""
    rank, processes = place()
    if processes == 1:
        return answer()
    value, error = None, None
    if rank == 0:
        try:
            value = answer()
        except Exception as problem:
            error = problem
    said = [value, f"{type(error).__name__}: {error}" if error else None]
    dist.broadcast_object_list(said)
    if said[1]:
        raise error or RuntimeError(f"in the first process: {said[1]}")
    return said[0]


def gather(value: Any) -> list[Any]:
    """The value of each process, in every process."""
    values = [value] * place()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def all_of(flag: bool) -> bool:
    """Whether it is true in every process."""
    return all(gather(flag))


def share(count: int, rank: int, processes: int) -> range:
    """A rank's share of `count` things, in one piece."""
    return range(count * rank // processes, count * (rank + 1) // processes)

"""The processes of one torch.distributed group, or the only process there is."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors

from smolvlm_exp.utils.progress import track

S = TypeVar("S")
T = TypeVar("T")
MESSAGE_BYTES = 2**26  # of gradients


def rank_world() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def broadcast_from_rank0(function: Callable[[], Any]) -> Any:
    """Rank 0's result, in every process; where it raises, all do."""
    rank, processes = rank_world()
    if processes == 1:
        return function()
    value, error = None, None
    if rank == 0:
        try:
            value = function()
        except Exception as problem:
            error = problem
    message = [value, f"{type(error).__name__}: {error}" if error else None]
    dist.broadcast_object_list(message)
    if message[1]:
        raise error or RuntimeError(f"rank 0: {message[1]}")
    return message[0]


def gather(value: Any) -> list[Any]:
    """The value of each process, in every process."""
    values = [value] * rank_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def all_ranks(flag: bool) -> bool:
    """Whether it is true in every process."""
    return all(gather(flag))


@contextlib.contextmanager
def shared_folder(fill: Callable[[str], None]) -> Iterator[str]:
    """A temporary folder that rank 0 fills, and removes when all processes are done with it."""
    with tempfile.TemporaryDirectory() as own:
        broadcast_from_rank0(partial(fill, own))
        del fill  # it may hold what it has written
        yield broadcast_from_rank0(lambda: own)
        all_ranks(True)


def rank_slice(count: int, rank: int, processes: int) -> range:
    """A rank's contiguous share of `count` items."""
    return range(count * rank // processes, count * (rank + 1) // processes)


def full_tensor(tensor: Any) -> torch.Tensor:
    """A sharded tensor, gathered by all processes together; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


def scatter_map(items: Sequence[S], work: Callable[[S], T], model: nn.Module, label: str = "") -> list[T]:
    """work(item) of every item, each done by one process of the group; all of them in every process.

    Args:
        model: what `work` runs. Sharded weights are fetched by all processes together, so there each does everything.
        label: of the progress bar; empty where `work` shows its own.
    """
    rank, processes = rank_world()
    alone = processes == 1 or any(map(is_sharded, model.parameters()))
    own = items if alone else items[rank::processes]
    done = [work(item) for item in (track(own, label, len(own)) if label else own)]
    if alone:
        return done
    parts = gather(done)
    return [parts[i % processes][i // processes] for i in range(len(items))]


def all_reduce_mean(tensors: Sequence[torch.Tensor]) -> None:
    """Put the mean over all processes into each tensor; a few large messages."""
    for chunk in _take_tensors(tensors, MESSAGE_BYTES):
        message = _flatten_dense_tensors(chunk)
        dist.all_reduce(message)
        message /= rank_world()[1]
        torch._foreach_copy_(chunk, list(_unflatten_dense_tensors(message, chunk)))


@contextlib.contextmanager
def no_gather(accelerator: Any) -> Iterator[None]:
    """Within, what accelerate would gather or reduce is this process's own.

    TRL's loss code gathers a dozen metrics, and processes whose micro-batches differ would wait for each other forever.
    """
    own = {name: lambda value, *_, **__: value for name in ("gather", "gather_for_metrics", "reduce")}
    vars(accelerator).update(own)
    try:
        yield
    finally:
        for name in own:
            delattr(accelerator, name)


def init_distributed() -> None:
    """Form the group, each process on its own GPU where there are any."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")


def destroy_distributed() -> None:
    """At a successful end; after a failure the launcher ends the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()

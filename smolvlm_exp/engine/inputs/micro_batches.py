"""Which rows go through the model together: an optimiser step's rows, in micro-batches of the engine's own size."""

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

Batch = dict[str, Any]  # packing.collate's


@dataclass
class MicroBatch:
    """One forward and backward pass."""

    segments: list[list[int]]  # row numbers; TRL's loss code sees one segment at a time
    shares: list[float]  # how many of the loader's batches each stands for

    @property
    def rows(self) -> list[int]:
        return list(chain(*self.segments))


@dataclass
class Step:
    """One optimiser step's rows in this process."""

    units: list[list[int]]  # the loader's batches
    micros: list[MicroBatch]
    batches: list[Batch] = field(default_factory=list)  # collated ahead, one per micro-batch; or none

    @property
    def pairs(self) -> int:
        return sum(map(len, self.units))


class StepSampler:
    """Row numbers of one micro-batch at a time, for a loader whose workers prepare them ahead."""

    def __init__(self, accumulate: int, split: Callable[[list[list[int]]], list[MicroBatch]]) -> None:
        self.accumulate, self.split = accumulate, split
        self.source: Iterator[dict[str, list[int]]] = iter(())
        self.steps: deque[Step] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        while units := [batch["rows"] for batch in islice(self.source, self.accumulate)]:
            step = Step(units, self.split(units))
            self.steps.append(step)
            yield from (micro.rows for micro in step.micros)


def step_rows(loader: Any, accumulate: int, steps: Iterable[int]) -> Iterator[list[int]]:
    """The row numbers of optimiser steps, which count from 1, as the trainer's `loader` gives them to this process.

    The loader stays as it is.
    """
    batches = copy.deepcopy(loader.batch_sampler)
    sampler = getattr(batches, "batch_sampler", batches).sampler  # accelerate wraps it to cut out a process's share
    per_epoch = math.ceil(len(batches) / accumulate)
    for epoch, places in groupby((divmod(step - 1, per_epoch) for step in steps), itemgetter(0)):
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        units = list(batches)
        for _, place in places:
            yield [int(row) for unit in units[place * accumulate : (place + 1) * accumulate] for row in unit]


def split_micro_batches(units: list[list[int]], size: int, batch_loss: bool) -> list[MicroBatch]:
    """The loader's batches as micro-batches of at most `size` rows.

    Args:
        batch_loss: the loss is not a mean over pairs, so each of the loader's batches is a segment of its own.
    """
    if batch_loss:
        count = max(size // len(units[0]), 1)
        groups = [units[i : i + count] for i in range(0, len(units), count)]
        return [MicroBatch(group, [1.0] * len(group)) for group in groups]
    rows, shares = list(chain(*units)), [1 / len(unit) for unit in units for _ in unit]
    return [MicroBatch([rows[i : i + size]], [sum(shares[i : i + size])]) for i in range(0, len(rows), size)]


def slice_pairs(tensors: Mapping[str, Any], part: slice, pairs: int) -> Any:
    """Some pairs of a batch's tensors, each (pairs, ...), or (2 pairs, ...) with the chosen answers first."""
    if part == slice(0, pairs):
        return tensors
    cut = {name: value.unflatten(0, (-1, pairs))[:, part].flatten(0, 1) for name, value in tensors.items()}
    return type(tensors)(**cut)


def concat_pairs(parts: Sequence[Mapping[str, Any]], pairs: Sequence[int]) -> Any:
    """The tensors of batches of `pairs` pairs together, padded on the right to one length: undoes `slice_pairs`."""
    if len(parts) == 1:
        return parts[0]
    together = {}
    for name in parts[0]:
        sides = zip(*(part[name].split(count) for part, count in zip(parts, pairs, strict=True)), strict=True)
        rows = [row for side in sides for chunk in side for row in chunk]
        if rows[0].dim():
            together[name] = pad_sequence(rows, batch_first=True, padding_value=-100 if name == "labels" else 0)
        else:
            together[name] = torch.stack(rows)
    return type(parts[0])(**together)

"""Which rows go through the model together: an optimiser step's rows, in micro-batches of the engine's own size."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from smolvlm_exp.engine.inputs.collate import Batch


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
    batches: list[Batch] = field(default_factory=list)  # collated ahead, one for each micro; or none
    running: MicroBatch = field(default_factory=lambda: MicroBatch([], []))

    @property
    def pairs(self) -> int:
        return sum(map(len, self.units))


def split_micro_batches(units: list[list[int]], size: int, batch_loss: bool) -> list[MicroBatch]:
    """The loader's batches as micro-batches of at most `size` rows.

    Args:
        batch_loss: the loss is not a mean over pairs, so each of the loader's batches is a segment of its own.
    """
    if batch_loss:
        together = max(size // len(units[0]), 1)
        return [
            MicroBatch(units[i : i + together], [1.0] * len(units[i : i + together]))
            for i in range(0, len(units), together)
        ]
    rows, shares = list(chain(*units)), [1 / len(unit) for unit in units for _ in unit]
    return [MicroBatch([rows[i : i + size]], [sum(shares[i : i + size])]) for i in range(0, len(rows), size)]


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

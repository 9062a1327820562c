"""What fits: a micro-batch and activation checkpointing, from a budget; predicted from shapes, without a device.

A step is the same mathematics whatever is chosen here: micro-batches divide the effective batch, which stays exactly
as set. Of the plans that fit, the fastest is taken (roofline.py); probe.py corrects the formulas for memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from smolvlm_exp.engine.memory.footprint import LEVELS, MemorySpec, RowSizes, peak, resident
from smolvlm_exp.engine.memory.roofline import TRAINER, Card, replayed, seconds
from smolvlm_exp.utils.units import format_bytes

BATCH_LOSSES = {"sft", "aot", "aot_unpaired"}  # not a mean over pairs: sft averages over tokens, aot sorts the batch
SPARE = 1 / 32  # of a line that has one of few lengths, as CUDA graphs want it: on average
MARGIN = 0.08  # of a budget, left free: the allocator's fragmentation, rows of unequal length


@dataclass(frozen=True)
class Plan:
    """How a step is run."""

    micro_batch: int  # pairs in one forward and backward pass
    accumulation: int  # such passes in a step
    checkpointing: str  # of the text layers: one of LEVELS
    vision_checkpointing: str  # of the vision tower, where adapters reach it
    resident: int  # predicted bytes that are allocated throughout
    activations: int  # predicted bytes on top of these at the worst moment
    seconds: float  # predicted, per pair
    graphs: bool = False  # passes are replayed as CUDA graphs, and have room for their activations twice
    measured: int | None = None  # bytes at the worst moment, where a probe has run it

    @property
    def levels(self) -> tuple[str, str]:
        return self.checkpointing, self.vision_checkpointing

    @property
    def peak(self) -> int:
        return self.resident + self.activations


class DoesNotFit(ValueError):
    """Not even the most frugal plan fits."""

    def __init__(self, least: Plan, budget: int) -> None:
        self.least, self.budget = least, budget
        size, pairs = least.measured or least.peak, least.micro_batch
        super().__init__(
            f"micro-batch {pairs} with full activation checkpointing still takes {format_bytes(size)}; with "
            f"{MARGIN:.0%} left free that is {format_bytes(size / (1 - MARGIN))}, over the budget of "
            f"{format_bytes(budget)}"
        )


def plan(spec: MemorySpec, rows: RowSizes, budget: int, effective: int, card: Card, unit: int = 1) -> Plan:
    """The fastest plan within `budget` bytes, for everything; see `proposals` and `best`."""
    return best(proposals(spec, rows, effective, card, unit), budget)


def proposals(
    spec: MemorySpec, rows: RowSizes, effective: int, card: Card, unit: int = 1, levels: Sequence[str] = LEVELS
) -> list[Plan]:
    """All plans there are, each with memory for the longest rows and time for average ones.

    Args:
        effective: pairs in a step of one process.
        unit: pairs that have to stay together, where the loss is no mean over pairs; divides `effective`.
        levels: of LEVELS, those to choose from.
    """
    choices = [(text, vision) for text in levels for vision in (levels if spec.vision.trained else levels[-1:])]
    if not fused(spec):  # transformers' own layers: all or none
        choices = [(level, level) for level in levels if level != "mlp"]
    plans = []
    for micro in range(unit, effective + 1, unit):
        if effective % micro == 0:
            longest, average = rows.longest(micro), rows.average(micro)
            for choice, graphs in product(choices, (False, True) if replayed(spec, card) else (False,)):
                activations = peak(spec, longest, *choice) * (1 + graphs)
                time = seconds(replace(spec, graphs=graphs), average, choice, card, effective // micro)
                time *= TRAINER * (1 + SPARE * graphs) / micro
                plans.append(Plan(micro, effective // micro, *choice, resident(spec), activations, time, graphs))
    return plans


def best(plans: Sequence[Plan], budget: int) -> Plan:
    """The fastest whose peak leaves MARGIN of the budget free.

    Raises:
        DoesNotFit: none does.
    """
    fitting = [plan for plan in plans if fits_budget(plan.peak, budget)]
    if not fitting:
        raise DoesNotFit(min(plans, key=lambda plan: plan.peak), budget)
    return min(fitting, key=lambda plan: (plan.seconds, plan.peak))


def fused(spec: MemorySpec) -> bool:
    return spec.text.fused and (spec.vision.fused or not spec.vision.trained)


def fits_budget(size: float, budget: float) -> bool:
    return size <= (1 - MARGIN) * budget

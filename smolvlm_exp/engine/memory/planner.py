"""What fits: a micro-batch and activation checkpointing, from a budget; predicted from shapes, without a device.

A step is the same mathematics whatever is chosen here: micro-batches divide the effective batch, which stays exactly
as set. Of the plans that fit, the fastest is taken (`seconds`); probe.py corrects the formulas.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from smolvlm_exp.engine.memory.footprint import LEVELS, BatchLoad, MemorySpec, RowSizes, peak, resident
from smolvlm_exp.utils.units import format_bytes

BATCH_LOSSES = {"sft", "aot", "aot_unpaired"}  # not a mean over pairs: sft averages over tokens, aot sorts the batch
MARGIN = 0.08  # of a budget, left free: the allocator's fragmentation, rows of unequal length
BACKWARD = 1.7  # seconds of a backward pass over a forward one's, measured: norms, gains and the adapters' gradients


@dataclass(frozen=True)
class Card:
    """How fast a device is, for `seconds`."""

    name: str
    matmul: float  # FLOP/s of a large matrix product in the model's dtype
    reached: float = 0.63  # what the engine reaches of it in a forward pass, everything counted: measured on an H100
    bandwidth: float = 2e12  # bytes/s, for unpacking weights
    launches: tuple[float, float] = (1.9e-3, 1.1e-3)  # seconds a host needs to start a text, a vision layer's pass


# Measured on two cores: a 256M model reaches a third of a product's speed, and bitsandbytes unpacks slowly.
CPU = Card("CPU", matmul=3e11, reached=0.35, bandwidth=3e8)


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
    measured: int | None = None  # bytes at the worst moment, where a probe has run it

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
            for choice in choices:
                activations = peak(spec, longest, *choice)
                time = seconds(spec, average, *choice, card) / micro
                plans.append(Plan(micro, effective // micro, *choice, resident(spec), activations, time))
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


def seconds(spec: MemorySpec, load: BatchLoad, checkpointing: str, vision_checkpointing: str, card: Card) -> float:
    """Of one forward and backward pass: arithmetic and unpacking, or starting the kernels where that takes longer.

    Where both take about as long, each waits for the other at times, hence the fourth powers.
    """
    text, vision = spec.text, spec.vision
    flops, unpacked, started = 6.0 * spec.vocabulary * text.hidden * load.answers, 0.0, 0.0
    stacks = [(text, checkpointing, load.tokens, load.scores, card.launches[0])]
    if not spec.features:
        within = load.tiles * spec.patches**2
        stacks.append((vision, vision_checkpointing, load.tiles * spec.patches, within, card.launches[1]))
    for stack, level, tokens, scores, launch in stacks:
        qkv, out, into, down = stack.matrices
        weights = qkv + out + into + down
        recomputed = {"none": 0, "mlp": into, "full": qkv + out + into + down * bool(stack.tails[3])}[level]
        # How often all layers' products and attentions are computed, in forward passes of the same length.
        products = stack.layers + stack.trained * (BACKWARD + recomputed / weights)
        attentions = stack.layers + stack.trained * (2.5 + (level == "full"))
        flops += 2 * weights * tokens * products + 4 * stack.queries * scores * attentions
        unpacked += spec.weights.startswith("4bit") * products * weights * (spec.element + 0.5)
        started += products * launch
    worked = flops / (card.reached * card.matmul) + unpacked / card.bandwidth
    return (worked**4 + started**4) ** 0.25

"""What fits: a micro-batch and what its layers keep, from a budget; predicted from shapes, then measured.

A step is the same mathematics whatever is chosen here: micro-batches divide the effective batch, which stays exactly
what was asked. Of the plans that fit, the fastest is taken (`seconds`); `probe` runs it on the longest rows there are
before training does, and puts right what the formulas got wrong.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from smolvlm_exp.engine.footprint import LEVELS, Facts, Load, Rows, Stack, peak, resident

GIB = 2**30
MARGIN = 0.08  # of a budget, left free: what the allocator holds in pieces too small to use, rows of unequal length
BACKWARD = 1.7  # seconds of a backward pass over a forward one's, measured: norms, gains and the adapters' gradients
TRIES = 5  # plans that a probe runs at most
OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Card:
    """How fast a device is, for `seconds`."""

    name: str
    matmul: float  # FLOP/s of a large matrix product in the model's dtype
    reached: float = 0.63  # of which the engine reaches in a forward pass, everything counted: measured on an H100
    bandwidth: float = 2e12  # bytes/s, for unpacking weights
    launches: tuple[float, float] = (1.9e-3, 1.1e-3)  # seconds a host needs to start a text, a vision layer's pass


CPU = Card("CPU", matmul=3e11, bandwidth=1e10)


@dataclass(frozen=True)
class Plan:
    """How a step is run."""

    micro_batch: int  # pairs in one forward and backward pass
    accumulation: int  # such passes in a step
    keep: str  # what a text layer keeps for its backward pass: one of LEVELS
    keep_vision: str  # and a layer of the vision tower, where adapters reach it
    resident: int  # predicted bytes that are there throughout
    activations: int  # predicted bytes beside them at the worst moment
    seconds: float  # predicted, a pair
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
            f"{'one pair' if pairs == 1 else f'{pairs} pairs'} at a time, and nothing kept that can be computed again, "
            f"still takes {words(size)}; with {MARGIN:.0%} left free that is {words(size / (1 - MARGIN))}, over the "
            f"budget of {words(budget)}"
        )


def plan(
    facts: Facts,
    rows: Rows,
    budget: int,
    effective: int,
    card: Card,
    unit: int = 1,
    levels: Sequence[str] = LEVELS,
    factor: float = 1.0,
) -> Plan:
    """The fastest plan whose peak leaves MARGIN of the budget free.

    Args:
        budget: bytes, for everything.
        effective: pairs in a step of one process.
        unit: pairs that have to go together, where the loss is no mean over pairs.
        levels: of LEVELS, those to choose from.
        factor: by which the formulas are off, as a probe found.

    Raises:
        DoesNotFit: there is none.
    """
    assert effective % unit == 0
    found = [
        proposal(facts, rows, micro, effective, keep, keep_vision, card, factor)
        for micro in range(unit, effective + 1, unit)
        if effective % micro == 0
        for keep, keep_vision in choices(facts, levels)
    ]
    fitting = [each for each in found if fits(each.peak, budget)]
    if not fitting:
        raise DoesNotFit(min(found, key=lambda each: each.peak), budget)
    return min(fitting, key=lambda each: (each.seconds, each.peak))


def choices(facts: Facts, levels: Sequence[str]) -> list[tuple[str, str]]:
    """What text and vision layers may keep: transformers' own layers, where some are not fused, all or none."""
    if not fused(facts):
        return [(level, level) for level in levels if level != "attention"]
    return [(keep, vision) for keep in levels for vision in (levels if facts.vision.trained else levels[-1:])]


def fused(facts: Facts) -> bool:
    return facts.text.fused and (facts.vision.fused or not facts.vision.trained)


def proposal(
    facts: Facts, rows: Rows, micro: int, effective: int, keep: str, keep_vision: str, card: Card, factor: float
) -> Plan:
    """What a choice comes to: memory for the longest rows, time for average ones."""
    activations = round(factor * peak(facts, rows.longest(micro), keep, keep_vision))
    time = seconds(facts, rows.average(micro), keep, keep_vision, card) / micro
    return Plan(micro, effective // micro, keep, keep_vision, resident(facts), activations, time)


def fits(size: float, budget: float) -> bool:
    return size <= (1 - MARGIN) * budget


def seconds(facts: Facts, load: Load, keep: str, keep_vision: str, card: Card) -> float:
    """Of one forward and backward pass: arithmetic and unpacking, or starting the kernels where that takes longer.

    Where both take about as long, now one waits and now the other, hence the fourth powers.
    """
    text, vision = facts.text, facts.vision
    flops, unpacked, started = 6.0 * facts.vocabulary * text.hidden * load.answers, 0.0, 0.0
    stacks = [(text, keep, load.tokens, load.scores, card.launches[0])]
    if not facts.features:
        within = load.tiles * facts.patches**2
        stacks.append((vision, keep_vision, load.tiles * facts.patches, within, card.launches[1]))
    for stack, level, tokens, scores, launch in stacks:
        products, attentions = passes(stack, level)
        weights = sum(stack.matrices)
        flops += 2 * weights * tokens * products + 4 * stack.queries * scores * attentions
        unpacked += facts.weights.startswith("4bit") * products * weights * (facts.element + 0.5)
        started += products * launch
    worked = flops / (card.reached * card.matmul) + unpacked / card.bandwidth
    return (worked**4 + started**4) ** 0.25


def passes(stack: Stack, keep: str) -> tuple[float, float]:
    """How often all layers' products and attentions are computed, in forward passes of the same length."""
    qkv, out, into, down = stack.matrices
    again = {"everything": 0, "attention": into, "inputs": qkv + out + into + down * bool(stack.tails[3])}[keep]
    products = stack.layers + stack.trained * (BACKWARD + again / (qkv + out + into + down))
    return products, stack.layers + stack.trained * (2.5 + (keep == "inputs"))


# On a device


def available() -> int:
    """Bytes that this process may have on its GPU: what is free, and what it holds; less where it is capped."""
    import torch

    free, total = torch.cuda.mem_get_info()
    cap = torch.cuda.get_per_process_memory_fraction() * total
    return int(min(free + torch.cuda.memory_reserved(), cap))


def enforce(budget: int) -> None:
    """Let this process have no more than `budget` bytes of its GPU: asking for more is then out of memory."""
    import torch

    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(budget / total, 1.0))


def probe(
    make: Callable[[float], Plan],
    run: Callable[[Plan], None],
    budget: int,
    parameters: Sequence[Any],
    later: int = 0,
    agree: Callable[[float], float] = float,
) -> Plan:
    """Run the plan on the longest rows; where it takes less or more than predicted, plan and run again.

    Gradients and random states are afterwards what they were.

    Args:
        make: `plan` with everything given but `factor`.
        run: a plan's forward and backward pass over the longest rows.
        parameters: those that get gradients.
        later: bytes that will be there in training and are not now: the optimiser's.
        agree: the largest of a number over all processes that train together.

    Returns:
        The fastest plan that was measured to fit; `measured` is its peak, `later` included.

    Raises:
        DoesNotFit: none does.
    """
    tried: dict[tuple[int, str, str], Plan] = {}
    factor = 1.0
    with undone(parameters):
        for _ in range(TRIES):
            try:
                chosen = make(factor)
            except DoesNotFit as error:
                chosen = error.least  # the formulas may be wrong
            key = chosen.micro_batch, chosen.keep, chosen.keep_vision
            if key in tried:
                break
            measured = agree(measure(run, chosen) + later)
            too_much = 1.1 * max(budget, chosen.peak)  # stands for out of memory
            tried[key] = replace(chosen, measured=round(min(measured, too_much)))
            factor *= (min(measured, too_much) - chosen.resident) / chosen.activations
    fitting = [each for each in tried.values() if fits(each.measured or 0, budget)]
    if not fitting:
        raise DoesNotFit(min(tried.values(), key=lambda each: each.measured or 0), budget)
    return min(fitting, key=lambda each: each.seconds)


def measure(run: Callable[[Plan], None], plan: Plan) -> float:
    """Bytes at the worst moment of a plan's second run, when kernels are compiled and gradients there; or infinity."""
    import torch

    torch.cuda.empty_cache()
    try:
        run(plan)
        torch.cuda.reset_peak_memory_stats()
        run(plan)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return float("inf")
    return torch.cuda.max_memory_allocated()


@contextmanager
def undone(parameters: Sequence[Any]) -> Iterator[None]:
    """Gradients and random states are in the end what they were; peaks are counted anew."""
    import torch

    gpu = torch.cuda.is_available()
    gradients = [parameter.grad for parameter in parameters]
    states = torch.get_rng_state(), torch.cuda.get_rng_state() if gpu else None
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1])
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def out_of_memory(error: RuntimeError) -> bool:
    """torch.OutOfMemoryError, and what else means the same."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def this_card(dtype: Any) -> Card:
    """The current GPU, its matrix products in `dtype` timed."""
    import torch

    left = torch.randn(4096, 4096, device="cuda").to(dtype)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for _ in range(3):
        left @ left
    events[0].record()
    for _ in range(10):
        left @ left
    events[1].record()
    torch.cuda.synchronize()
    return Card(torch.cuda.get_device_name(), 10 * 2 * 4096**3 / (events[0].elapsed_time(events[1]) / 1e3))


def words(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"

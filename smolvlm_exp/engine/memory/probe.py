"""A plan run before training starts, on the longest rows: what a step really takes of a GPU."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import torch

from smolvlm_exp.engine.memory.cards import PASSES_REACH, attention_shares, has_kernels
from smolvlm_exp.engine.memory.planner import DoesNotFit, Plan, best, fits_budget
from smolvlm_exp.engine.memory.roofline import Card
from smolvlm_exp.utils.progress import track

log = logging.getLogger(__name__)

TRIES = 5  # plans that are run at most
# How a device, one of its libraries (cuBLAS, cuDNN, cuSOLVER) and a CPU say it.
OUT_OF_MEMORY = ("out of memory", "STATUS_ALLOC_FAILED", "DefaultCPUAllocator")


def available_memory() -> int:
    """Bytes that this process can have on its GPU: what is free and what it holds, up to its cap."""
    free, total = torch.cuda.mem_get_info()
    cap = torch.cuda.get_per_process_memory_fraction() * total
    return int(min(free + torch.cuda.memory_reserved(), cap))


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still have on a device."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    return available_memory() - torch.cuda.memory_allocated()


def cap_memory(budget: int) -> None:
    """Let this process have no more than `budget` bytes of its GPU; more is then out of memory."""
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(budget / total, 1.0))


def probe(
    plans: Sequence[Plan],
    run: Callable[[Plan], None],
    budget: int,
    parameters: Sequence[Any],
    later: int = 0,
    agree: Callable[[float], float] = float,
) -> Plan:
    """Run the best plan on the longest rows; where it takes less or more than predicted, choose and run again.

    Gradients and random states are restored.

    Args:
        plans: see `proposals`.
        run: a plan's forward and backward pass over the longest rows.
        parameters: those that get gradients.
        later: bytes that training will allocate and the probe does not: the optimiser's.
        agree: the largest of a number over all processes that train together.

    Returns:
        The fastest plan that was measured to fit; `measured` is its peak, `later` included.

    Raises:
        DoesNotFit: none does.
    """
    tried: dict[tuple[int, str, str, bool], Plan] = {}
    factor, offset = 1.0, 0  # what the formulas are off by
    with restored_state(parameters):
        for attempt in track(range(TRIES), "memory plan", TRIES):  # fewer, where the first fits as predicted
            likely = [
                replace(plan, resident=plan.resident + offset, activations=round(factor * plan.activations))
                for plan in plans
            ]
            try:
                chosen = best(likely, budget)
            except DoesNotFit as error:
                chosen = error.least  # the formulas may be wrong
            working = [plan for plan in tried.values() if fits_budget(plan.measured or 0, budget)]
            if attempt == TRIES - 1 and not working:
                chosen = min(likely, key=lambda plan: plan.peak)
            key = chosen.micro_batch, *chosen.levels, chosen.graphs
            if key in tried:
                break
            resting, most = (agree(size + later) for size in measure(run, chosen))
            if most == float("inf"):
                resting, most = chosen.resident, 1.1 * max(budget, chosen.peak)
            elif chosen.graphs:  # that what was run had none makes no difference but this
                most += most - resting
            tried[key] = replace(chosen, measured=round(most))
            offset += round(resting) - chosen.resident
            factor *= (most - resting) / chosen.activations
    working = [plan for plan in tried.values() if fits_budget(plan.measured or 0, budget)]
    if not working:
        raise DoesNotFit(min(tried.values(), key=lambda plan: plan.measured or 0), budget)
    return min(working, key=lambda plan: plan.seconds)


def measure(run: Callable[[Plan], None], plan: Plan) -> tuple[float, float]:
    """Bytes between a plan's first and second run, when gradients are there, and at the second's worst moment.

    The first run compiles kernels. Infinity: out of memory.
    """
    torch.cuda.empty_cache()
    try:
        run(plan)
        resting = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(plan)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return float("inf"), float("inf")
    return resting, torch.cuda.max_memory_allocated()


@contextmanager
def restored_state(parameters: Sequence[Any]) -> Iterator[None]:
    """Restores gradients and random states in the end; peaks are measured from zero again."""
    gpu = torch.cuda.is_available()
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if gpu else []):
            yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def out_of_memory(error: Exception) -> bool:
    """torch.OutOfMemoryError, or another error that means the same."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(words in str(error) for words in OUT_OF_MEMORY)


def in_halves(function: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, what: str) -> torch.Tensor:
    """`function` of a batch, whose rows do not depend on each other; in halves where memory runs out."""
    try:
        return function(batch)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(batch) // 2
    log.warning(f"Out of memory with {len(batch)} {what} at once: retrying with {half}")
    return torch.cat([in_halves(function, part, what) for part in (batch[:half], batch[half:])])


def measure_card(dtype: Any) -> Card:
    """The current GPU, its matrix products in `dtype` and its memory timed."""
    generator = torch.Generator("cuda").manual_seed(0)  # leaves the run's random state alone
    left = torch.randn(4096, 4096, device="cuda", generator=generator).to(dtype)
    matmul = 2 * 4096**3 / timed(lambda: left @ left)
    buffer = torch.zeros(2**27, dtype=torch.uint8, device="cuda")  # more than a card's L2 cache
    bandwidth = 2 * len(buffer) / timed(lambda: buffer.bitwise_not_())
    capability = torch.cuda.get_device_capability()
    text, vision = attention_shares(capability)
    name, kernels = torch.cuda.get_device_name(), has_kernels(capability)
    return Card(name, matmul, PASSES_REACH * bandwidth, text, vision, kernels=kernels)


def timed(function: Callable[[], Any], times: int = 10) -> float:
    """Seconds that the GPU takes for it."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for _ in range(3):
        function()
    events[0].record()
    for _ in range(times):
        function()
    events[1].record()
    torch.cuda.synchronize()
    return float(events[0].elapsed_time(events[1])) / 1e3 / times

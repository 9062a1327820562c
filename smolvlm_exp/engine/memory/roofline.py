"""Seconds from shapes: what a pass over some pairs takes of a device, and of the host that starts its kernels.

The device: each product takes its arithmetic or its traffic, whichever is longer; attention its arithmetic; what lies
between two products (ops.py) its traffic. The host: so many kernels, each started in so many microseconds. A pass
takes whichever is longer, forward and backward apart. The counts follow engine/layers; the rates that are reached are
fitted to measurements, all of which tests/engine/memory/test_roofline.py holds against the result.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from smolvlm_exp.engine.memory.footprint import UNFUSED, BatchLoad, MemorySpec, Stack

# Reached on an H100 and an H200, benchmarks/RESULTS.md.
PRODUCTS = 0.9  # of a large product's rate, by the products of deep layers
RAMP = 100  # columns of depth that a product loses while it begins
KERNEL = 3e-6  # seconds that the smallest kernel and the gap behind it take of the device
TRAINER = 1.05  # a run's step over its passes: waiting for data, metrics
WITHOUT_KERNELS = (
    10.0,
    1.2,
)  # the traffic and launches of torch code (ops.py) over those of the kernels it stands in for
# Kernels that a layer starts in its forward and its backward pass, in what checkpointing repeats of it (mlp, full), and
# once in an optimizer step to put its adapters together (LoRA, DoRA): of the text model, of the vision tower.
TEXT_LAUNCHES, VISION_LAUNCHES = (33, 67, 7, 27, 27, 74), (20, 40, 3, 15, 40, 50)
PASS_LAUNCHES, STEP_LAUNCHES = (82, 34), 330  # embeddings, log-probs and loss, forward and backward; clipping and AdamW


@dataclass(frozen=True)
class Card:
    """How fast a device and its host are; what is reached, not what a data sheet promises."""

    name: str
    matmul: float  # FLOP/s of a large matrix product in the model's dtype
    bandwidth: float  # bytes/s of what lies between two products
    text_attention: tuple[float, float] = (0.5, 0.42)  # of `matmul`, forward and backward
    vision_attention: tuple[float, float] = (0.5, 0.42)
    launch: float = (
        52e-6  # seconds that the host takes to start a kernel, Python included: 38 to 72 on the hosts measured
    )
    kernels: bool = True  # Triton's and flash attention's; else torch code
    unpacking: float | None = None  # bytes/s; None: as `bandwidth`


CPU_REACHED = 0.5  # of a large product's rate on a CPU; the default run and a 256M model, on two cores
CPU = Card("CPU", CPU_REACHED * 3e11, 2e10, launch=0.0, unpacking=3e8)  # where bitsandbytes unpacks slowly


@dataclass(frozen=True)
class Phase:
    """A part of a step whose kernels are started while those before them run."""

    device: float  # seconds
    launches: float

    def seconds(self, card: Card) -> float:
        """Where device and host take about as long, each waits for the other at times, hence the powers."""
        host = self.launches * card.launch
        return float((self.device**6 + host**6) ** (1 / 6))


def seconds(spec: MemorySpec, load: BatchLoad, levels: tuple[str, str], card: Card, passes: float = math.inf) -> float:
    """Of one forward and backward pass, and its share in the optimizer's step.

    Args:
        levels: checkpointing of the text model and of the vision tower.
        passes: in a step; infinite: no step is counted.
    """
    return sum(phase.seconds(card) for phase in phases(spec, load, levels, card, passes))


def phases(
    spec: MemorySpec, load: BatchLoad, levels: tuple[str, str], card: Card, passes: float = math.inf
) -> tuple[Phase, Phase]:
    """Forward and backward; the first begins with what an optimizer step leaves to be worked out."""
    forward = backward = 0.0
    launches = [float(count) for count in PASS_LAUNCHES]
    step_launches, step_traffic = float(STEP_LAUNCHES), 0.0
    graphs = [0.0, 0.0, 0.0]  # of forward pass, backward pass and step, what no host starts
    for part in parts(spec, load, levels, card):
        stack = part.stack
        first, second, mlp, full, lora, dora = part.launches
        repeated, starts = {"none": (0.0, 0), "mlp": (part.mlp, mlp), "full": (part.full, full)}[part.level]
        forward += stack.layers * part.forward
        backward += stack.trained * (part.backward + repeated)
        launches[0] += stack.layers * first
        launches[1] += stack.trained * (second + starts)
        step_launches += stack.trained * (dora if any(stack.gains) else lora)
        if stack is spec.text and replayed(spec, card):
            graphs = [launches[0] - PASS_LAUNCHES[0], launches[1] - PASS_LAUNCHES[1], step_launches - STEP_LAUNCHES]
        step_traffic += (
            stack.trained * any(stack.gains) * sum(stack.matrices) * (0.5 + 2 * spec.element)
        )  # DoRA's W A^T
    head = 2 * spec.vocabulary * spec.text.hidden * load.answers / (PRODUCTS * card.matmul)
    scores, states = (spec.element * size / card.bandwidth for size in (
        spec.vocabulary * load.answers, 4 * load.tokens * spec.text.hidden,
    ))  # fmt: skip
    trained = spec.text.trained > 0 or spec.vision.trained > 0
    step = (step_traffic / card.bandwidth + KERNEL * step_launches) / passes
    started = launches[0] - graphs[0] + (step_launches - graphs[2]) / passes, launches[1] - graphs[1]
    return (
        Phase(forward + head + 3 * scores + states + KERNEL * launches[0] + step, started[0]),
        Phase(trained * (backward + 2 * head + 5 * scores + states + KERNEL * launches[1]), trained * started[1]),
    )


def replayed(spec: MemorySpec, card: Card) -> bool:
    """Whether the text model's passes become CUDA graphs (layers/graphs.py)."""
    possible = spec.text.fused and spec.text.trained > 0 and spec.weights != "8bit"
    return spec.graphs and possible and spec.triton and card.kernels


@dataclass(frozen=True)
class Part:
    """A stack's layer: seconds of its forward and backward pass, and of what checkpointing repeats."""

    stack: Stack
    level: str
    launches: tuple[float, ...]
    forward: float
    backward: float
    mlp: float
    full: float


def parts(spec: MemorySpec, load: BatchLoad, levels: tuple[str, str], card: Card) -> Iterator[Part]:
    patches = load.tiles * spec.patches
    spread = load.sources / load.tokens
    yield part(spec, spec.text, levels[0], load.tokens, load.scores, spread, TEXT_LAUNCHES, card, card.text_attention)
    if not spec.features:
        scores = load.tiles * spec.patches**2
        yield part(spec, spec.vision, levels[1], patches, scores, 1.0, VISION_LAUNCHES, card, card.vision_attention)


def part(
    spec: MemorySpec,
    stack: Stack,
    level: str,
    tokens: float,
    scores: float,
    spread: float,
    launches: tuple[int, ...],
    card: Card,
    attention: tuple[float, float],
) -> Part:
    """
    Args:
        scores: (query, key) products per head; spread: keys that attention reads, over tokens.
    """
    products = [
        max(
            2 * tokens * width * (depth + RAMP) / (PRODUCTS * card.matmul),
            tokens * (width + depth) * spec.element / card.bandwidth,
        )
        + stack.quantised * unpacking(spec, width * depth, card)
        for width, depth in zip(stack.widths, stack.depths, strict=True)
    ]
    factor, starts = (1.0, 1.0) if card.kernels else WITHOUT_KERNELS
    value = tokens * spec.element / card.bandwidth * factor * (1 if stack.fused else UNFUSED)
    before, backward = traffic(stack, spread)
    between = [value * values for values in before]
    attended = 4 * stack.queries * scores / card.matmul
    forward_attention, backward_attention = attended / attention[0], 2.5 * attended / attention[1]
    last = products[3] if stack.tails[3] else 0.0
    weights = sum(products) if not spec.adapter else 0.0  # whose own gradients take as many products again
    return Part(
        stack,
        level,
        tuple(count * starts for count in launches),
        forward=sum(products) + forward_attention + sum(between),
        backward=sum(products) + weights + backward_attention + value * backward,
        mlp=products[2] + between[2],
        full=sum(products[:3]) + last + forward_attention + sum(between[:3]),
    )


def unpacking(spec: MemorySpec, weights: int, card: Card) -> float:
    """Seconds in which a product's 4-bit weights are read and written as the model's dtype."""
    if not spec.weights.startswith("4bit"):
        return 0.0
    return weights * (0.5 + spec.element) / (card.unpacking or card.bandwidth)


def traffic(stack: Stack, spread: float) -> tuple[tuple[float, ...], float]:
    """Values per token that are read and written around a layer's four products, forward and backward.

    Norms, rotary positions, the activation, residual sums; the adapters' narrow products, which read their input again.
    """
    qkv, _, into, _ = stack.widths
    hidden, inner, queries = stack.hidden, stack.intermediate, stack.queries
    adapted = [bool(tail) for tail in stack.tails]
    narrow = [depth * there for depth, there in zip(stack.depths, adapted, strict=True)]
    forward = (
        2 * hidden + narrow[0] + qkv * (1 + spread),
        3 * hidden + narrow[1],
        2 * hidden + narrow[2] + into + inner,
        3 * hidden + narrow[3],
    )
    mlp = 4 * hidden + inner + 2 * into + adapted[3] * (5 * hidden + 2 * inner) + adapted[2] * (3 * hidden + 2 * into)
    attention = 4 * hidden + qkv * (3 + 2 * spread) + adapted[1] * (5 * hidden + queries)
    attention += adapted[0] * (3 * hidden + 2 * qkv)
    return forward, mlp + attention


def frozen(spec: MemorySpec) -> MemorySpec:
    """`spec` without a backward pass."""
    return replace(spec, text=replace(spec.text, trained=0), vision=replace(spec.vision, trained=0))

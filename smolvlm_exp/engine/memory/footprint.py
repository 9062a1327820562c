"""Bytes from shapes: what a model occupies, and what one forward and backward pass over some pairs takes on top.

The counts follow engine/layers and forward.py tensor by tensor; tests/engine/memory/test_planner.py compares them with
peaks measured on a GPU. A *stack* is the text model's layers or the vision tower's. Nothing here needs torch, so that
`task=plan` answers at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

# The linear layers of a layer's four products: q, k, v; output; the MLP's way in; its way out.
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
TEXT = (QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
VISION = (QKV, ("self_attn.out_proj",), ("mlp.fc1",), ("mlp.fc2",))
ALIGNED = 8  # columns that adapters add to a product are a multiple: its rows then start on 16 bytes in bfloat16
LEVELS = ("none", "mlp", "full")  # activation checkpointing: what a layer recomputes for its backward pass
CUBLAS = 32 * 2**20  # bytes that cuBLAS allocates, once
VOCABULARY_CHUNK, TOKEN_CHUNK = 32768, 4096  # forward.py's and TRL's: logits exist for so many at a time
UNFUSED = 2.6  # what transformers' own layers save, over what a fused one does (43.9 against 17 GiB for 8 pairs, 2.2B)
STORED = {  # bytes per weight of the linear layers; 4 bits have a scale per 64 weights, in 8 bits where doubled
    "4bit": 0.5 + 4 / 64,
    "4bit double": 0.5 + 1 / 64 + 4 / (64 * 256),
    "8bit": 1.0,
}


@dataclass(frozen=True)
class Stack:
    """Equal layers, and what adapts them."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    queries: int  # columns of q: heads x their size
    keys: int  # columns of k, and of v
    gated: bool  # the MLP's way in is two matrices, gate and up
    trained: int = 0  # layers that save something for the backward pass: from the lowest adapted one up
    tails: tuple[int, ...] = (0, 0, 0, 0)  # columns that adapters add to each product: the sum of their ranks
    gains: tuple[bool, ...] = (False,) * 4  # whether DoRA scales the product's result
    fused: bool = True
    quantised: bool = True  # where the model is

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Columns of each product's result."""
        return self.queries + 2 * self.keys, self.hidden, (1 + self.gated) * self.intermediate, self.hidden

    @property
    def depths(self) -> tuple[int, int, int, int]:
        """Columns of each product's input."""
        return self.hidden, self.queries, self.hidden, self.intermediate

    @property
    def matrices(self) -> tuple[int, ...]:
        """Weights in each product."""
        return tuple(width * depth for width, depth in zip(self.widths, self.depths, strict=True))


@dataclass(frozen=True)
class MemorySpec:
    """What does not depend on the rows or on the plan."""

    text: Stack
    vision: Stack
    vocabulary: int
    patches: int  # of a tile
    image_tokens: int  # of a tile
    pixels: int  # values of a tile, 3 S S
    element: int  # bytes of a value in the model's dtype
    weights: str  # a key of STORED, or `whole`
    matrix_weights: int  # weights stored like this: the linear layers', without the head's
    other_weights: int  # the rest, in the model's dtype
    trained_weights: int  # an adapter's, or all where there is none
    trained_element: int = 4  # bytes of one of these: adapters are float32
    adapter: bool = True
    features: bool = False  # images come as precomputed features
    gpu: bool = True
    triton: bool = True  # kernels between the products, on a GPU
    graphs: bool = False  # the text model's passes are replayed as CUDA graphs, where they can be


@dataclass(frozen=True)
class BatchLoad:
    """What some rows come to in one packed batch (packing.py)."""

    tokens: int  # T of the packed line
    sources: int  # keys that attention reads
    answers: int  # tokens that are scored
    tiles: int
    scores: int  # (query, key) products that attention computes per head


class RowSizes:
    """The rows of a data set by length: the most that a number of them takes, and what they take on average."""

    def __init__(self, sizes: Sequence[Sequence[int]], pairs: bool = True) -> None:
        """
        Args:
            sizes: tokens of prompt, chosen and rejected answer, and tiles, for each row, as inputs/dataset.py has them.
            pairs: both answers are scored; else the chosen ones alone (supervised fine-tuning).
        """
        columns = zip(*(row_counts(row, pairs) for row in sizes), strict=True)
        self.sums = [list(accumulate(sorted(column, reverse=True), initial=0)) for column in columns]
        self.count = len(sizes)

    def longest(self, pairs: int) -> BatchLoad:
        """No batch of so many rows takes more: each count is the sum of the largest ones."""
        return BatchLoad(*(column[min(pairs, self.count)] for column in self.sums))

    def average(self, pairs: int) -> BatchLoad:
        return BatchLoad(*(round(column[-1] / self.count * pairs) for column in self.sums))


def row_counts(row: Sequence[int], pairs: bool) -> tuple[int, int, int, int, int]:
    """What a row's sizes add to each count of a BatchLoad."""
    prompt, chosen, rejected, tiles = map(int, row)
    first = prompt + chosen - 1
    if not pairs:
        return first, first, chosen, tiles, first**2 // 2
    second = prompt - 1 + rejected
    scores = first**2 // 2 + rejected * (prompt - 1) + rejected**2 // 2
    return first + rejected, first + second, chosen + rejected, tiles, scores


def resident(spec: MemorySpec) -> int:
    """Bytes allocated throughout: weights, adapter with gradients and AdamW's moments, workspaces."""
    stored = STORED.get(spec.weights, spec.element)
    weights = stored * spec.matrix_weights + spec.element * spec.other_weights
    trained = (3 + spec.adapter) * spec.trained_weights * spec.trained_element  # a full model is counted above
    copies = 0  # what `Product` makes of its adapters: A and the blocks of s B; gain, norm and ||W||^2 in float32
    for stack in (spec.text, spec.vision):
        for width, depth, tail, gain in zip(stack.widths, stack.depths, stack.tails, stack.gains, strict=True):
            copies += stack.fused * stack.layers * (tail * (width + depth) * spec.element + 12 * width * gain)
    return int(weights + trained + copies + workspace(spec) + spec.gpu * CUBLAS)


def moments(spec: MemorySpec) -> int:
    """Bytes of AdamW's two moments, which exist from the first optimiser step on."""
    return 2 * spec.trained_weights * spec.trained_element


def workspace(spec: MemorySpec) -> int:
    """Bytes into which weights are unpacked: one product's, for all layers."""
    stacks = [stack for stack in (spec.text, spec.vision) if stack.quantised]
    if spec.weights == "8bit":  # float32 numbers twice and the result, of one matrix
        return (8 + spec.element) * max(s.hidden * s.intermediate for s in stacks)
    if not spec.weights.startswith("4bit"):
        return 0
    sizes = [
        max((width + tail) * depth, width * (depth + tail))
        for s in stacks
        for width, depth, tail in zip(s.widths, s.depths, s.tails, strict=True)
    ]
    return spec.element * max(sizes)


def saved_activations(stack: Stack, checkpointing: str, element: int) -> float:
    """Values per token that one layer saves for its backward pass."""
    if checkpointing == "full":
        return stack.hidden
    qkv, out, into, down = stack.widths
    everything: float = stack.hidden + qkv + stack.queries + out + into + down * stack.gains[3] + sum(stack.tails)
    everything += stack.heads * 4 / element  # attention's log-sum-exp, float32
    if not stack.fused:
        return UNFUSED * everything
    return everything if checkpointing == "none" else everything - into


def attention_graph(stack: Stack, checkpointing: str, spread: float) -> float:
    """Values per token that one layer's attention keeps on a CPU, which does not compute it again; see attention.py.

    Rotated q, k, v; of a packed batch (`spread` > 1) also their padded copies, with a key for each query head, and
    results.
    """
    if checkpointing == "full" or not stack.fused:
        return 0
    rotated = stack.queries + 2 * spread * stack.keys
    if spread == 1:
        return rotated
    return 2 * rotated + stack.queries + (2 * spread * stack.queries if stack.keys < stack.queries else 0)


def backward(stack: Stack, checkpointing: str, element: int, spread: float, kernels: bool) -> float:
    """Values per token that one layer's backward pass takes at its worst moment, on top of what was saved.

    Args:
        spread: keys that attention reads, over tokens.
        kernels: between the products; else torch code.
    """
    qkv, _, into, _ = stack.widths
    hidden, inner, queries = stack.hidden, stack.intermediate, stack.queries
    adapted = [bool(tail) or gain for tail, gain in zip(stack.tails, stack.gains, strict=True)]
    recomputed: float = {
        "none": 0,
        "mlp": into + stack.tails[2],
        "full": qkv + queries + hidden * stack.gains[1] + into + sum(stack.tails),
    }[checkpointing]
    if not stack.fused:
        recomputed = saved_activations(stack, "none", element) if checkpointing == "full" else 0
    # The gradient of the result, the hidden states after attention; du of the way out, its input's gradient, then du of
    # the way in. A kernel writes the input itself over its gradient, and du of the way in over what was recomputed.
    in_place = kernels and stack.fused and checkpointing != "none"
    mlp = recomputed + 2 * hidden + (hidden + stack.tails[3]) * adapted[3]
    mlp += inner * (1 + (not kernels and bool(stack.tails[3])))
    mlp += (into + stack.tails[2]) * (not in_place)
    # The same two, the output product's input's gradient; q, k, v and their gradients with flash attention's float32
    # sums, then these gradients and du of q, k, v.
    rotated = queries + 2 * spread * stack.keys
    grads = rotated + (2 * spread * queries if stack.keys < queries else 0)
    attention = max(recomputed - into - hidden * stack.gains[1], 0) + 2 * hidden + queries + grads
    attention += max(rotated + queries * 4 / element, qkv + stack.tails[0])
    if not kernels:  # copies between torch's operations, in float32: measured on the embedded model, and on an H200
        mlp += (3 if stack.gated else 2) * (1 + 6 / element) * into
        attention += 2 * rotated
    return max(mlp, attention)


def peak(spec: MemorySpec, load: BatchLoad, checkpointing: str, vision_checkpointing: str) -> int:
    """Bytes on top of `resident` at the worst moment of a step: a forward and backward pass over `load`, or AdamW's."""
    text, vision, element = spec.text, spec.vision, spec.element
    line, patches = load.tokens, load.tiles * spec.patches
    text_saved = saved_activations(text, checkpointing, element) * line * text.trained
    vision_saved = saved_activations(vision, vision_checkpointing, element) * patches * vision.trained
    spread, kernels = load.sources / line, spec.gpu and spec.triton
    if not spec.gpu:
        text_saved += attention_graph(text, checkpointing, spread) * line * text.trained
        vision_saved += attention_graph(vision, vision_checkpointing, 1) * patches * vision.trained
    images = load.tiles * (spec.image_tokens * text.hidden * element if spec.features else spec.pixels)
    states = 2.0 * line * text.hidden  # embeddings and the last layer's states, which transformers holds on to
    if vision.trained:  # post-layernorm and pixel shuffle
        states += load.tiles * spec.image_tokens * text.hidden + patches * vision.hidden
    total = (text_saved + vision_saved + states) * element + images
    logits = min(load.answers, TOKEN_CHUNK) * min(VOCABULARY_CHUNK, spec.vocabulary) * element
    worst = [
        2 * spec.trained_weights * spec.trained_element,  # AdamW's own intermediate results
        total + 4 * line * text.hidden + logits + load.answers * text.hidden * (4 + element),  # log-probabilities
        total + backward(text, checkpointing, element, spread, kernels) * line * element * bool(text.trained),
    ]
    if vision.trained:
        late = vision_saved + backward(vision, vision_checkpointing, element, 1.0, kernels) * patches
        worst.append(late * element + images)
    elif not spec.features:  # forward alone: q, k, v, output, the MLP's way in and five hidden states; floats
        layer = sum(vision.widths) + vision.intermediate * (1 if kernels else 1 + 12 / element) + 3 * vision.hidden
        worst.append(layer * patches * element + 5 * images)
    return int(max(worst))

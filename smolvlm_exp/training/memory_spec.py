"""A run's MemorySpec, which the memory planner needs, from settings alone: no weights, no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from smolvlm_exp.engine.memory.footprint import ALIGNED, TEXT, VISION, MemorySpec, Stack
from smolvlm_exp.models.quant import QuantConfig
from smolvlm_exp.models.shape import Shape

TEXT_LAYER, VISION_LAYER = "model.text_model.layers.", "model.vision_model.encoder.layers."
CONNECTOR = "model.connector.modality_projection.proj"


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter, and where it goes."""

    names: Sequence[str]  # linear layers, as `linear_sizes` names them
    r: int
    dora: bool
    dropout: bool  # in effect


def memory_spec(
    shape: Shape, weights: str, adapted: AdapterSpec | None, features: bool, element: int, gpu: bool
) -> MemorySpec:
    """
    Args:
        weights: how the linear layers' are stored; see `weight_storage`.
        adapted: None for full fine-tuning.
        features: images come as precomputed features, where vision tower and connector are frozen.
        element: bytes of a number in the model's dtype.
    """
    sizes = linear_sizes(shape)
    learns = adapted is None or any(not name.startswith(TEXT_LAYER) for name in adapted.names)
    text = stack_of(text_stack(shape), TEXT_LAYER, TEXT, adapted)
    vision = stack_of(vision_stack(shape), VISION_LAYER, VISION, adapted)
    matrices = sum(math.prod(size) for size in sizes.values())
    # Outside the linear layers, and the head: embeddings, norms, biases, the tower's first layer.
    patches = (shape.image_size // shape.patch_size) ** 2
    tower = (3 * shape.patch_size**2 + 1 + patches + 2) * vision.hidden
    vision_norms_and_biases = vision.layers * (4 * vision.hidden + sum(vision.widths))
    text_norms = (2 * text.layers + 1) * text.hidden
    others = 2 * shape.vocab_size * text.hidden + text_norms + tower + vision_norms_and_biases
    trained = matrices + others
    if adapted:
        trained = sum(adapted.r * sum(sizes[name]) + adapted.dora * sizes[name][0] for name in adapted.names)
    return MemorySpec(
        text=with_all_layers(text) if learns else text,
        vision=vision,
        vocabulary=shape.vocab_size,
        patches=patches,
        image_tokens=shape.image_seq_len,
        pixels=3 * shape.image_size**2,
        element=element,
        weights=weights,
        matrix_weights=matrices,
        other_weights=others,
        trained_weights=trained,
        trained_element=4 if adapted else element,
        adapter=adapted is not None,
        features=features and not learns,
        gpu=gpu,
    )


def text_stack(shape: Shape) -> Stack:
    size = shape.hidden_size // shape.num_attention_heads
    return Stack(
        layers=shape.num_hidden_layers,
        hidden=shape.hidden_size,
        intermediate=shape.intermediate_size,
        heads=shape.num_attention_heads,
        queries=shape.hidden_size,
        keys=size * shape.num_key_value_heads,
        gated=True,
    )


def vision_stack(shape: Shape) -> Stack:
    return Stack(
        layers=shape.vision_num_hidden_layers,
        hidden=shape.vision_hidden_size,
        intermediate=shape.vision_intermediate_size,
        heads=shape.vision_num_attention_heads,
        queries=shape.vision_hidden_size,
        keys=shape.vision_hidden_size,
        gated=False,
    )


def linear_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer but the head, by name, as transformers names them."""
    sizes = {CONNECTOR: (shape.hidden_size, shape.vision_hidden_size * shape.scale_factor**2)}
    stacks = (TEXT_LAYER, text_stack(shape), TEXT), (VISION_LAYER, vision_stack(shape), VISION)
    for prefix, stack, kinds in stacks:
        qkv = stack.queries, stack.keys, stack.keys
        outputs = qkv, (stack.hidden,), (stack.intermediate,) * 2, (stack.hidden,)
        for layer in range(stack.layers):
            for product, names in enumerate(kinds):
                for name, columns in zip(names, outputs[product], strict=False):
                    sizes[f"{prefix}{layer}.{name}"] = columns, stack.depths[product]
    return sizes


def stack_of(plain: Stack, prefix: str, kinds: Sequence[Sequence[str]], adapted: AdapterSpec | None) -> Stack:
    """`plain` with adapters, every layer counted as the one with most of them."""
    if adapted is None:
        return with_all_layers(replace(plain, fused=False))
    layers: dict[int, set[str]] = {}
    for name in adapted.names:
        if name.startswith(prefix):
            number, _, kind = name.removeprefix(prefix).partition(".")
            layers.setdefault(int(number), set()).add(kind)
    if not layers:
        return plain
    counts = [max(len(adapters & set(names)) for adapters in layers.values()) for names in kinds]
    return replace(
        plain,
        trained=plain.layers - min(layers),
        tails=tuple(-(-count * adapted.r // ALIGNED) * ALIGNED for count in counts),
        gains=tuple(adapted.dora and count > 0 for count in counts),
        fused=not adapted.dropout,
    )


def with_all_layers(stack: Stack) -> Stack:
    """Gradients pass through all of its layers."""
    return replace(stack, trained=stack.layers)


def weight_storage(quant: QuantConfig) -> str:
    """A key of footprint.STORED, or `whole`."""
    if quant.load_in_4bit:
        return "4bit double" if quant.bnb_4bit_use_double_quant else "4bit"
    return "8bit" if quant.load_in_8bit else "whole"

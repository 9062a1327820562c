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
    shape: Shape,
    weights: str,
    adapted: AdapterSpec | None,
    features: bool,
    element: int,
    gpu: bool,
    triton: bool = True,
    whole: Sequence[str] = (),
) -> MemorySpec:
    """
    Args:
        weights: how the linear layers' are stored; see `weight_storage`.
        adapted: None for full fine-tuning.
        features: images come as precomputed features, where vision tower and connector are frozen.
        element: bytes of a number in the model's dtype.
        triton: on a GPU, kernels run between the products.
        whole: parts whose weights are not quantised, as quant.skip names them.
    """
    sizes = linear_sizes(shape)
    plain_text, plain_vision = stacks(shape)
    text = with_adapters(plain_text, TEXT_LAYER, TEXT, adapted)
    vision = with_adapters(plain_vision, VISION_LAYER, VISION, adapted)
    learns = adapted is None or any(not name.startswith(TEXT_LAYER) for name in adapted.names)
    if learns:  # gradients pass through the text model to the connector or the vision tower
        text = replace(text, trained=text.layers)
    text, vision = (
        replace(text, quantised="text_model" not in whole),
        replace(vision, quantised="vision_model" not in whole),
    )
    left = tuple(f"model.{part}." for part in whole)
    matrices = sum(math.prod(size) for name, size in sizes.items() if not name.startswith(left))
    # Outside the linear layers, and the head: embeddings, norms, biases, the tower's first layer.
    patches = (shape.image_size // shape.patch_size) ** 2
    tower = (3 * shape.patch_size**2 + 1 + patches + 2) * vision.hidden
    vision_norms_and_biases = vision.layers * (4 * vision.hidden + sum(vision.widths))
    text_norms = (2 * text.layers + 1) * text.hidden
    others = 2 * shape.vocab_size * text.hidden + text_norms + tower + vision_norms_and_biases
    others += sum(math.prod(size) for name, size in sizes.items() if name.startswith(left))
    trained = matrices + others
    if adapted:
        trained = sum(adapted.r * sum(sizes[name]) + adapted.dora * sizes[name][0] for name in adapted.names)
    return MemorySpec(
        text=text,
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
        triton=triton,
    )


def stacks(shape: Shape) -> tuple[Stack, Stack]:
    """The text model's layers and the vision tower's, without adapters."""
    text = Stack(
        layers=shape.num_hidden_layers,
        hidden=shape.hidden_size,
        intermediate=shape.intermediate_size,
        heads=shape.num_attention_heads,
        queries=shape.hidden_size,
        keys=shape.hidden_size // shape.num_attention_heads * shape.num_key_value_heads,
        gated=True,
    )
    vision = Stack(
        layers=shape.vision_num_hidden_layers,
        hidden=shape.vision_hidden_size,
        intermediate=shape.vision_intermediate_size,
        heads=shape.vision_num_attention_heads,
        queries=shape.vision_hidden_size,
        keys=shape.vision_hidden_size,
        gated=False,
    )
    return text, vision


def linear_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer but the head, by name, as transformers names them."""
    sizes = {CONNECTOR: (shape.hidden_size, shape.vision_hidden_size * shape.scale_factor**2)}
    for stack, prefix, products in zip(stacks(shape), (TEXT_LAYER, VISION_LAYER), (TEXT, VISION), strict=True):
        qkv = stack.queries, stack.keys, stack.keys
        outputs = qkv, (stack.hidden,), (stack.intermediate,) * 2, (stack.hidden,)
        for layer in range(stack.layers):
            for names, out, depth in zip(products, outputs, stack.depths, strict=True):
                for name, columns in zip(names, out, strict=False):
                    sizes[f"{prefix}{layer}.{name}"] = columns, depth
    return sizes


def with_adapters(plain: Stack, prefix: str, products: Sequence[Sequence[str]], adapted: AdapterSpec | None) -> Stack:
    """Every layer counted as the one with most adapters; without an AdapterSpec all weights are trained."""
    if adapted is None:
        return replace(plain, trained=plain.layers, fused=False)
    layers: dict[int, set[str]] = {}
    for name in adapted.names:
        if name.startswith(prefix):
            number, _, kind = name.removeprefix(prefix).partition(".")
            layers.setdefault(int(number), set()).add(kind)
    if not layers:
        return plain
    counts = [max(len(adapters & set(names)) for adapters in layers.values()) for names in products]
    return replace(
        plain,
        trained=plain.layers - min(layers),
        tails=tuple(-(-count * adapted.r // ALIGNED) * ALIGNED for count in counts),
        gains=tuple(adapted.dora and count > 0 for count in counts),
        fused=not adapted.dropout,
    )


def weight_storage(quant: QuantConfig) -> str:
    """A key of footprint.STORED, or `whole`."""
    if quant.load_in_4bit:
        return "4bit double" if quant.bnb_4bit_use_double_quant else "4bit"
    return "8bit" if quant.load_in_8bit else "whole"

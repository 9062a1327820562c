"""SmolVLM's layers, fused: the text model's over packed pairs, the vision tower's over whole tiles.

`fuse` puts them into a model, and says why a part cannot run fused.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from smolvlm_exp.engine.layers import ops
from smolvlm_exp.engine.layers.dora import use_exact_dora
from smolvlm_exp.engine.layers.fused_layer import IN, FusedLayer, LayerContext, joined
from smolvlm_exp.engine.layers.gpu_attention import Qkv
from smolvlm_exp.engine.layers.graphs import StackGraphs, Tensors
from smolvlm_exp.engine.layers.layout import Layout
from smolvlm_exp.engine.layers.linear import Product, base_of, linear_obstacles
from smolvlm_exp.engine.layers.quantized_weights import is_8bit
from smolvlm_exp.engine.memory.footprint import ALIGNED, TEXT, VISION
from smolvlm_exp.engine.memory.probe import free_memory
from smolvlm_exp.engine.model_parts import core_of
from smolvlm_exp.utils.gpu import has


def fuse(model: Any, checkpointing: str, vision_checkpointing: str) -> list[str]:
    """Exact DoRA everywhere; text model and vision tower fused where nothing in them prevents it.

    Call it once the adapter is on. Calling it again changes the checkpointing.

    Args:
        model: a SmolVLM, with or without an adapter.
        checkpointing, vision_checkpointing: of text model and vision tower; of footprint.py's `LEVELS`.

    Returns:
        One sentence for each part that keeps transformers' own layers.
    """
    use_exact_dora(model)
    core = core_of(model)
    reasons = {
        "the text model": fuse_text(core, checkpointing),
        "the vision tower": fuse_layers(core.vision_model.encoder.layers, FusedVisionLayer, vision_checkpointing),
    }
    return [f"{part} runs unfused, and slower: {reason}." for part, reason in reasons.items() if reason]


def fuse_text(core: Any, checkpointing: str = "none", trains: bool = True) -> str | None:
    """`fuse_layers` of the text model, which then reads packed batches as one stack, and others as before."""
    reason = fuse_layers(core.text_model.layers, FusedTextLayer, checkpointing, trains)
    if reason is not None:
        vars(core.text_model).pop("stack", None)
    elif stack_of(core) is None:
        core.text_model.stack = TextStack([layer.forward for layer in core.text_model.layers])
    return reason


def fuse_layers(layers: Iterable[Any], kind: type[FusedLayer], checkpointing: str, trains: bool = True) -> str | None:
    """Why `layers` cannot run as `kind`, none of which does; None: all do from now on, with this checkpointing.

    Args:
        trains: else passes have no gradients, and fewer reasons count.
    """
    reason = next((reason for layer in layers for reason in kind.obstacles(layer, trains)), None)
    for layer in layers:
        fused = isinstance(layer.forward, kind)
        if fused and reason is None:
            layer.forward.checkpointing = checkpointing
        elif fused:
            layer.forward = layer.forward.ordinary
        elif reason is None:
            layer.forward = kind(layer, checkpointing)
    return reason


@dataclass
class TextContext(LayerContext):
    layout: Layout
    cos: torch.Tensor  # (T, D)
    sin: torch.Tensor  # (T, D)


class FusedTextLayer(FusedLayer):
    """A decoder layer whenever it gets a layout."""

    names, gated = TEXT, True

    def __init__(self, layer: Any, checkpointing: str) -> None:
        super().__init__(layer, checkpointing)
        attention = layer.self_attn
        size = attention.head_dim
        self.heads = (attention.q_proj.out_features // size, attention.k_proj.out_features // size)
        self.scaling = attention.scaling
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.eps = layer.input_layernorm.variance_epsilon

    def __call__(self, hidden_states: torch.Tensor, *args: Any, layout: Layout | None = None, **kwargs: Any) -> Any:
        if layout is None:
            return self.ordinary(hidden_states, *args, **kwargs)
        cos, sin = (part[0] for part in kwargs["position_embeddings"])
        context = TextContext(self.products(hidden_states.dtype), layout, cos, sin)
        return self.run(hidden_states[0], context)[None]

    @staticmethod
    def obstacles(layer: nn.Module, trains: bool = True) -> Iterator[str]:
        activation = getattr(getattr(layer, "mlp", None), "act_fn", None)
        if type(activation) is not type(ACT2FN["silu"]):
            yield f"its activation is {type(activation).__name__}, not SiLU"
        yield from linear_obstacles(layer, trains)
        for name, module in layer.named_modules():
            if name.endswith("_proj") and getattr(base_of(module), "bias", None) is not None:
                yield f"{name} has a bias"

    def queries_keys_values(self, u: torch.Tensor, context: TextContext) -> Qkv:
        gain = context.products[IN].gain
        return ops.rotary(u, gain, context.cos, context.sin, context.layout, self.heads)

    def queries_keys_values_backward(
        self, grads: Qkv, u: torch.Tensor, context: TextContext
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        into = context.products[IN]
        return ops.rotary_backward(grads, u, into.gain, context.cos, context.sin, context.layout, into.tail)


class TextStack:
    """The text model's fused layers, one after the other or as CUDA graphs."""

    def __init__(self, layers: list[FusedTextLayer]) -> None:
        self.layers, self.graphs, self.replays = layers, StackGraphs(layers), False
        self.warm = False  # a pass has compiled its kernels, and taken what memory it takes

    @property
    def hooked(self) -> bool:
        """Whether a wrapper (FSDP) wants to see each layer called."""
        layer = self.layers[0].layer
        return bool(layer._forward_pre_hooks or layer._forward_hooks)

    @property
    def can_replay(self) -> bool:
        """On a GPU that has Triton, where nothing in a layer waits for the device."""
        return has("triton") and not any(is_8bit(module) for fused in self.layers for module in fused.layer.modules())

    def __call__(self, hidden: torch.Tensor, layout: Layout, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden: (T, H) embeddings; cos and sin: (T, D).

        Returns:
            (T, H) the last layer's hidden states, before the final norm.
        """
        if self.replays and torch.is_grad_enabled():
            result = self.replay(hidden, layout, cos, sin) if self.warm and self.has_room(hidden.device) else None
            if result is not None:
                return result
            self.warm = True
        for layer in self.layers:
            hidden = layer.run(hidden, TextContext(layer.products(hidden.dtype), layout, cos, sin))
        return hidden

    def has_room(self, device: torch.device) -> bool:
        """For a pass's memory twice: a graph keeps its own, and what is computed beside it takes some too."""
        if self.graphs.passes:
            return True
        needed = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        return 2 * needed <= free_memory(device)

    def replay(self, hidden: torch.Tensor, layout: Layout, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor | None:
        cu_queries, cu_keys, *longest = layout.sequences
        keys = round_up(layout.keys, layout.tokens // 8)
        # Bounds for the kernels: exact ones would be other graphs.
        longest = [min(round_up(n, 256), most) for n, most in zip(longest, (layout.tokens, keys), strict=True)]
        tensors = {"cos": cos, "sin": sin, "slots": layout.slots, "cu_queries": cu_queries, "cu_keys": cu_keys}

        def context_of(products: list[Product], own: Tensors) -> TextContext:
            fixed = copy.copy(layout)
            vars(fixed).update(slots=own["slots"], keys=keys, sequences=(own["cu_queries"], own["cu_keys"], *longest))
            return TextContext(products, fixed, own["cos"], own["sin"])

        return self.graphs.run(hidden, tensors, (keys, *longest), context_of)


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def stack_of(core: Any) -> TextStack | None:
    return getattr(core.text_model, "stack", None)


@contextmanager
def replaying(core: Any, wanted: bool) -> Iterator[None]:
    """Passes of the text model with gradients are CUDA graphs within, where `wanted`."""
    stack = stack_of(core)
    if stack is None or not wanted:
        yield
        return
    stack.replays = True
    try:
        yield
    finally:
        stack.replays = False


def free_graphs(core: Any) -> None:
    """Before something else needs the memory."""
    stack = stack_of(core)
    if stack is not None:
        stack.graphs.free()


@dataclass
class VisionContext(LayerContext):
    patches: int  # in a tile


class FusedVisionLayer(FusedLayer):
    """A vision layer whenever no patch is masked, which is always so for whole tiles."""

    names, gated = VISION, False

    def __init__(self, layer: Any, checkpointing: str) -> None:
        super().__init__(layer, checkpointing)
        self.heads, self.scaling = layer.self_attn.num_heads, layer.self_attn.scale
        self.norms = layer.layer_norm1, layer.layer_norm2
        self.eps = layer.layer_norm1.eps

    def __call__(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None:
            return self.ordinary(hidden_states, attention_mask, **kwargs)
        context = VisionContext(self.products(hidden_states.dtype), None, hidden_states.shape[1])
        return self.run(hidden_states.flatten(0, 1), context).view_as(hidden_states)

    @staticmethod
    def obstacles(layer: nn.Module, trains: bool = True) -> Iterator[str]:
        mlp: Any = layer.mlp
        if type(mlp.activation_fn).__name__ != "GELUTanh":
            yield f"its activation is {type(mlp.activation_fn).__name__}, not GELU's tanh form"
        yield from linear_obstacles(layer, trains)

    def queries_keys_values(self, u: torch.Tensor, context: VisionContext) -> Qkv:
        into = context.products[IN]
        qkv = ops.affine(None, u, into.gain, into.bias)
        parts = qkv.view(-1, context.patches, 3, self.heads, qkv.shape[1] // (3 * self.heads))
        return parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]

    def queries_keys_values_backward(
        self, grads: Qkv, u: torch.Tensor, context: VisionContext
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        into = context.products[IN]
        return ops.scale_backward([joined(grad) for grad in grads], u, into.gain, into.tail)


def use_patch_product(tower: Any) -> None:
    """Let the tower cut its images into patches by `patch_product` on a GPU.

    cuDNN computes 104 tiles by another algorithm than 52 and rounds differently, so that a policy would start off a
    reference that was computed in batches of another size. A product's rows do not depend on how many there are.
    """
    convolution = tower.embeddings.patch_embedding
    if type(convolution) is nn.Conv2d:
        convolution.forward = partial(embed_patches, convolution)  # type: ignore[method-assign]


def embed_patches(convolution: nn.Conv2d, pixel_values: torch.Tensor) -> torch.Tensor:
    if pixel_values.is_cuda:
        return patch_product(convolution, pixel_values)
    return nn.Conv2d.forward(convolution, pixel_values)


def patch_product(convolution: nn.Conv2d, pixel_values: torch.Tensor) -> torch.Tensor:
    """A convolution whose patches do not overlap, as one matrix product: (n, C, S, S) -> (n, H, S // p, S // p)."""
    high, wide = convolution.kernel_size
    rows, columns = pixel_values.shape[2] // high, pixel_values.shape[3] // wide  # 384 pixels are 27 patches of 14
    cropped = pixel_values[:, :, : rows * high, : columns * wide]
    patches = cropped.unflatten(3, (columns, wide)).unflatten(2, (rows, high)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    weight = convolution.weight.flatten(1)
    spare = -weight.shape[1] % ALIGNED
    if spare:
        patches, weight = F.pad(patches, (0, spare)), F.pad(weight, (0, spare))
    return F.linear(patches, weight, convolution.bias).permute(0, 3, 1, 2)

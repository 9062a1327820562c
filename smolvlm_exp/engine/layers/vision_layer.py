"""The vision tower's layers over whole tiles, fused: LayerNorm, attention within a tile, GELU, biases."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from smolvlm_exp.engine.layers import ops as ew
from smolvlm_exp.engine.layers.fused_layer import FIRST, IN, FusedLayer, LayerContext, Qkv, SavedActivations
from smolvlm_exp.engine.layers.linear import ALIGNED, linear_obstacles


@dataclass
class VisionContext(LayerContext):
    patches: int  # in a tile


class FusedVisionLayer(FusedLayer):
    """A vision layer whenever no patch is masked, which is always so for whole tiles."""

    def __init__(self, layer: Any, checkpointing: str) -> None:
        super().__init__(layer, checkpointing)
        self.heads, self.scaling = layer.self_attn.num_heads, layer.self_attn.scale
        self.norms = layer.layer_norm1, layer.layer_norm2
        self.eps = layer.layer_norm1.eps

    def __call__(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None:
            return self.ordinary(hidden_states, attention_mask, **kwargs)
        context = VisionContext(self.adapters(hidden_states.dtype), None, hidden_states.shape[1])
        return self.run(context, hidden_states.flatten(0, 1)).view_as(hidden_states)

    @staticmethod
    def obstacles(layer: nn.Module) -> Iterator[str]:
        mlp: Any = layer.mlp
        if type(mlp.activation_fn).__name__ != "GELUTanh":
            yield f"its activation is {type(mlp.activation_fn).__name__}, not GELU's tanh form"
        yield from linear_obstacles(layer)

    def groups(self) -> list[list[nn.Module]]:
        attention, mlp = self.layer.self_attn, self.layer.mlp
        return [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.out_proj], [mlp.fc1], [mlp.fc2]]

    def queries_keys_values(self, saved: SavedActivations, context: VisionContext) -> Qkv:
        qkv = ew.scale(saved.result(IN), context.gain(IN), self.products[IN].bias)
        parts = qkv.view(-1, context.patches, 3, self.heads, qkv.shape[1] // (3 * self.heads))
        return parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]

    def queries_keys_values_backward(
        self, grads: Qkv, saved: SavedActivations, context: VisionContext
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return ew.scale_backward_parts(grads, saved.result(IN), context.gain(IN), context.tail(IN))

    def activated(self, u: torch.Tensor, context: VisionContext, tail: int) -> torch.Tensor:
        return ew.gelu(u, context.gain(FIRST), self.products[FIRST].bias, tail)

    def activated_backward(
        self, da: torch.Tensor, u: torch.Tensor, context: VisionContext, again: bool, over: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        return ew.gelu_backward(da, u, context.gain(FIRST), self.products[FIRST].bias, context.tail(FIRST), again, over)


def use_patch_product(tower: Any) -> None:
    """Let the tower cut its images into patches by `patch_product` on a GPU.

    cuDNN computes 104 tiles by another algorithm than 52 and rounds otherwise, so that a policy would begin off a
    reference that was computed with other images beside it. A product's rows do not depend on how many there are.
    """
    convolution = tower.embeddings.patch_embedding
    if type(convolution) is nn.Conv2d:
        convolution.forward = partial(cut, convolution)  # type: ignore[method-assign]


def cut(convolution: nn.Conv2d, pixel_values: torch.Tensor) -> torch.Tensor:
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

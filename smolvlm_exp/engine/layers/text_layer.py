"""The text model's layers over packed pairs, fused: RMSNorm, rotary positions, causal attention, SwiGLU."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from smolvlm_exp.engine.layers import ops as ew
from smolvlm_exp.engine.layers.fused_layer import FIRST, IN, FusedLayer, LayerContext, Qkv, SavedActivations
from smolvlm_exp.engine.layers.linear import base_of, linear_obstacles
from smolvlm_exp.engine.layers.shared_prefix_attention import Layout


@dataclass
class TextContext(LayerContext):
    cos: torch.Tensor  # (T, D)
    sin: torch.Tensor  # (T, D)


class FusedTextLayer(FusedLayer):
    """A decoder layer whenever it is given a layout."""

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
        return self.run(TextContext(self.adapters(hidden_states.dtype), layout, cos, sin), hidden_states[0])[None]

    @staticmethod
    def obstacles(layer: nn.Module) -> Iterator[str]:
        activation = getattr(getattr(layer, "mlp", None), "act_fn", None)
        if type(activation) is not type(ACT2FN["silu"]):
            yield f"its activation is {type(activation).__name__}, not SiLU"
        yield from linear_obstacles(layer)
        for name, module in layer.named_modules():
            if name.endswith("_proj") and getattr(base_of(module), "bias", None) is not None:
                yield f"{name} has a bias"

    def groups(self) -> list[list[nn.Module]]:
        attention, mlp = self.layer.self_attn, self.layer.mlp
        first = [attention.q_proj, attention.k_proj, attention.v_proj]
        return [first, [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]

    def queries_keys_values(self, saved: SavedActivations, context: TextContext) -> Qkv:
        return ew.rotary(saved.result(IN), context.gain(IN), context.cos, context.sin, context.layout, self.heads)

    def queries_keys_values_backward(
        self, grads: Qkv, saved: SavedActivations, context: TextContext
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        u, turn = saved.result(IN), (context.cos, context.sin)
        return ew.rotary_backward(grads, u, context.gain(IN), *turn, context.layout, context.tail(IN))

    def activated(self, u: torch.Tensor, context: TextContext, tail: int) -> torch.Tensor:
        return ew.swiglu(u, context.gain(FIRST), tail)

    def activated_backward(
        self, da: torch.Tensor, u: torch.Tensor, context: TextContext, again: bool, over: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        return ew.swiglu_backward(da, u, context.gain(FIRST), context.tail(FIRST), again, over)

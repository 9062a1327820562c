"""A decoder layer of the text model over packed pairs as one autograd function, with its own backward pass.

What autograd would do with the layer's some forty operations is done here with about twenty kernels a pass: products of
several linear layers at once (linear.py), everything between two products in one pass over memory (elementwise.py), and
nothing kept for the backward pass that is cheap to make again. `KEEP` says how much is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from smolvlm_exp.engine import elementwise as ew
from smolvlm_exp.engine.attend import attend, attend_backward
from smolvlm_exp.engine.attention import Layout
from smolvlm_exp.engine.linear import Active, Kept, base_of, linear_obstacles, products_of

# What a layer keeps between its forward and its backward pass, most first. Elements a token, with H hidden and I
# intermediate columns, as many key heads as query heads, and DoRA: 7 H + 2 I; 7 H; H.
KEEP = ("everything", "attention", "inputs")
QKV, OUT, GATE_UP, DOWN = range(4)


@dataclass
class Pass(Active):
    """What a layer's forward and backward pass share beside its tensors."""

    layout: Layout
    cos: torch.Tensor  # (T, D)
    sin: torch.Tensor  # (T, D)


class FusedDecoderLayer:
    """Stands in for a transformers decoder layer's `forward` whenever it is given a layout."""

    def __init__(self, layer: Any, keep: str) -> None:
        self.layer, self.ordinary, self.keep = layer, layer.forward, keep
        self.products = products_of(self.groups())
        attention = layer.self_attn
        size = attention.head_dim
        self.heads = (attention.q_proj.out_features // size, attention.k_proj.out_features // size)
        self.scaling = attention.scaling
        self.norms = layer.input_layernorm, layer.post_attention_layernorm

    def groups(self) -> list[list[nn.Module]]:
        """The linear layers as they are now, those together that read the same input."""
        attention, mlp = self.layer.self_attn, self.layer.mlp
        first = [attention.q_proj, attention.k_proj, attention.v_proj]
        return [first, [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]

    def __call__(self, hidden_states: torch.Tensor, *args: Any, layout: Layout | None = None, **kwargs: Any) -> Any:
        if layout is None:
            return self.ordinary(hidden_states, *args, **kwargs)
        self.products = products_of(self.groups(), self.products)
        cos, sin = (each[0] for each in kwargs["position_embeddings"])
        scene = Pass([product.use(hidden_states.dtype) for product in self.products], layout, cos, sin)
        return DecoderFunction.apply(self, scene, hidden_states[0], *scene.parameters)[None]

    def product(self, which: int, x: torch.Tensor, kept: Kept, scene: Pass) -> None:
        kept.results[which], kept.own[which] = self.products[which].forward(x, scene.adapters[which])

    def normed(self, which: int, x: torch.Tensor, tail: int = 0) -> torch.Tensor:
        return ew.rms_norm(x, self.norms[which].weight, self.norms[which].variance_epsilon, tail)

    def room(self, which: int, scene: Pass) -> int:
        return self.products[which].room(scene.adapters[which])

    def rotated(self, kept: Kept, scene: Pass) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return ew.rotary(kept.result(QKV), scene.gain(QKV), scene.cos, scene.sin, scene.layout, self.heads)

    def attention_half(self, kept: Kept, scene: Pass) -> torch.Tensor:
        """Fill in `kept` up to OUT; returns the hidden states after attention, (T, H)."""
        if kept.results[QKV] is None:
            self.product(QKV, self.normed(0, kept.hidden, self.room(QKV, scene)), kept, scene)
        if kept.attended is None:
            kept.attended, kept.state = attend(*self.rotated(kept, scene), scene.layout, self.scaling)
        if kept.results[OUT] is None:
            self.product(OUT, kept.attended.flatten(1), kept, scene)
        return ew.add(kept.hidden, kept.result(OUT), scene.gain(OUT))

    def gate_up(self, kept: Kept, middle: torch.Tensor, scene: Pass) -> None:
        if kept.results[GATE_UP] is None:
            self.product(GATE_UP, self.normed(1, middle, self.room(GATE_UP, scene)), kept, scene)

    def down(self, kept: Kept, scene: Pass) -> None:
        x = ew.swiglu(kept.result(GATE_UP), scene.gain(GATE_UP), self.room(DOWN, scene))
        self.product(DOWN, x, kept, scene)

    def forward(self, hidden: torch.Tensor, scene: Pass) -> tuple[torch.Tensor, Kept]:
        """The layer's result, (T, H), and what `keep` asks for."""
        kept = Kept.nothing(hidden)
        middle = self.attention_half(kept, scene)
        self.gate_up(kept, middle, scene)
        self.down(kept, scene)
        result = ew.add(middle, kept.result(DOWN), scene.gain(DOWN))
        if self.keep == "inputs":
            return result, Kept.nothing(hidden)
        if scene.gain(DOWN) is None:
            kept.results[DOWN] = None  # only a gain's gradient needs it
        if self.keep == "attention":
            kept.results[GATE_UP] = None
        return result, kept

    def backward(
        self, kept: Kept, scene: Pass, dy: torch.Tensor, needs_input: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients for the layer's input (T, H), and for the adapters, in the products' order."""
        middle = self.attention_half(kept, scene)
        self.gate_up(kept, middle, scene)
        gained = scene.gain(DOWN) is not None and kept.results[DOWN] is None
        if gained or (scene.adapters[DOWN] and kept.own[DOWN] is None):
            self.down(kept, scene)
        dmiddle, mlp_grads = self.mlp_backward(kept, middle, scene, dy)
        kept.results[GATE_UP] = kept.results[DOWN] = None
        del middle
        dx, attention_grads = self.attention_backward(kept, scene, dmiddle, needs_input)
        return dx, [*attention_grads, *mlp_grads]

    def mlp_backward(
        self, kept: Kept, middle: torch.Tensor, scene: Pass, dy: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        du, dgain = ew.scale_backward(dy, kept.results[DOWN], scene.gain(DOWN), scene.tail(DOWN))
        dinner = self.products[DOWN].backward(du, scene.adapters[DOWN])
        again = scene.adapters[DOWN] is not None
        du_gate_up, inner, dgain_gate_up = ew.swiglu_backward(
            dinner, kept.result(GATE_UP), scene.gain(GATE_UP), scene.tail(GATE_UP), again
        )
        grads = self.gradients(DOWN, du, inner, kept, dgain, scene)
        del du, dinner, inner
        dx = self.products[GATE_UP].backward(du_gate_up, scene.adapters[GATE_UP])
        x = self.normed(1, middle) if scene.adapters[GATE_UP] else None
        grads = [*self.gradients(GATE_UP, du_gate_up, x, kept, dgain_gate_up, scene), *grads]
        return self.norm_backward(1, dx, middle, residual=dy), grads

    def attention_backward(
        self, kept: Kept, scene: Pass, dy: torch.Tensor, needs_input: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        assert kept.attended is not None
        du, dgain = ew.scale_backward(dy, kept.result(OUT), scene.gain(OUT), scene.tail(OUT))
        dattended = self.products[OUT].backward(du, scene.adapters[OUT]).view_as(kept.attended)
        out_grads = self.gradients(OUT, du, kept.attended.flatten(1), kept, dgain, scene)
        rotated = self.rotated(kept, scene)
        grads = attend_backward(dattended, *rotated, kept.attended, kept.state, scene.layout, self.scaling)
        du, dgain = ew.rotary_backward(
            grads, kept.result(QKV), scene.gain(QKV), scene.cos, scene.sin, scene.layout, scene.tail(QKV)
        )
        del rotated, grads, dattended
        dx = None
        if needs_input:
            dx = self.products[QKV].backward(du, scene.adapters[QKV])
            dx = self.norm_backward(0, dx, kept.hidden, residual=dy)
        else:
            self.products[QKV].fill(du, scene.adapters[QKV])
        x = self.normed(0, kept.hidden) if scene.adapters[QKV] else None
        return dx, [*self.gradients(QKV, du, x, kept, dgain, scene), *out_grads]

    def gradients(
        self,
        which: int,
        du: torch.Tensor,
        x: torch.Tensor | None,
        kept: Kept,
        dgain: torch.Tensor | None,
        scene: Pass,
    ) -> list[torch.Tensor]:
        return self.products[which].adapter_gradients(du, x, kept.own[which], dgain, scene.adapters[which])

    def norm_backward(self, which: int, dx: torch.Tensor, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        norm = self.norms[which]
        return ew.rms_norm_backward(dx, x, norm.weight, norm.variance_epsilon, residual)


class DecoderFunction(torch.autograd.Function):
    """One `FusedDecoderLayer` for autograd."""

    @staticmethod
    def forward(
        ctx: Any, layer: FusedDecoderLayer, scene: Pass, hidden: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            result, kept = layer.forward(hidden, scene)
        ctx.layer, ctx.scene, ctx.state = layer, scene, kept.state
        ctx.save_for_backward(hidden, kept.attended, *kept.results, *kept.own)
        return result

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        hidden, attended, *rest = ctx.saved_tensors
        kept = Kept(hidden, rest[:4], rest[4:], attended, ctx.state)
        with torch.autocast(dy.device.type, enabled=False):
            dx, grads = ctx.layer.backward(kept, ctx.scene, dy.contiguous(), ctx.needs_input_grad[2])
        wanted = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[3:], strict=True))
        return None, None, dx, *wanted


def fuse_decoder_layers(text_model: Any, keep: str) -> str | None:
    """Let the layers of `text_model` run fused over packed batches.

    Args:
        keep: one of `KEEP`.

    Returns:
        None, or why they cannot be, in words; nothing is changed then.
    """
    for layer in text_model.layers:
        reason = next(obstacles(layer), None)
        if reason:
            return reason
    for layer in text_model.layers:
        if isinstance(layer.forward, FusedDecoderLayer):
            layer.forward.keep = keep
        else:
            layer.forward = FusedDecoderLayer(layer, keep)
    return None


def obstacles(layer: nn.Module) -> Iterator[str]:
    """What a fused layer does not do."""
    activation = getattr(getattr(layer, "mlp", None), "act_fn", None)
    if type(activation) is not type(ACT2FN["silu"]):
        yield f"its activation is {type(activation).__name__}, not SiLU"
    yield from linear_obstacles(layer)
    for name, module in layer.named_modules():
        if name.endswith("_proj") and getattr(base_of(module), "bias", None) is not None:
            yield f"{name} has a bias"

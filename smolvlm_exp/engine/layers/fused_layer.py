"""A transformer layer as one autograd function: what the text model's and the vision tower's have in common.

    middle = hidden + out(attention(in(norm(hidden))))          `in`: queries, keys and values in one product
    result = middle + second(activation(first(norm(middle))))

What autograd would do with the layer's some forty operations is done here with about twenty kernels a pass: products of
several linear layers at once (linear.py), everything between two products in one pass over memory (ops.py), and
nothing kept for the backward pass that is cheap to make again. `LEVELS` (footprint.py) says how much is saved.
text_layer.py and vision_layer.py say what norm, attention and activation are.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from smolvlm_exp.engine.layers import ops as ew
from smolvlm_exp.engine.layers.flash import attend, attend_backward
from smolvlm_exp.engine.layers.linear import Adapters, Product
from smolvlm_exp.engine.layers.shared_prefix_attention import Layout

IN, OUT, FIRST, SECOND = range(4)  # a layer's products
Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class LayerContext:
    """What a layer's forward and backward pass share beside its tensors: first of all its products' adapters."""

    adapters: list[Adapters | None]
    layout: Layout | None  # of a packed batch; None: tiles

    def gain(self, product: int) -> ew.Gain:
        adapters = self.adapters[product]
        return adapters.gain if adapters else None

    def tail(self, product: int) -> int:
        adapters = self.adapters[product]
        return adapters.tail if adapters else 0

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [p for adapters in self.adapters if adapters for p in adapters.parameters]


@dataclass
class SavedActivations:
    """What a layer keeps from its forward to its backward pass; None where it is to be computed again.

    `results` (T, N) and `own` (T, R) are its four products', `attended` attention's result and `state` what that keeps.
    """

    hidden: torch.Tensor  # (T, H) the layer's input
    results: list[torch.Tensor | None] = field(default_factory=lambda: [None] * 4)
    own: list[torch.Tensor | None] = field(default_factory=lambda: [None] * 4)
    attended: torch.Tensor | None = None
    state: tuple[Any, ...] = ()

    def result(self, product: int) -> torch.Tensor:
        result = self.results[product]
        assert result is not None
        return result


class FusedLayer:
    """Stands in for a transformers layer's `forward`; `ordinary` is what it stood in for.

    Hidden states are (T, H), gradients have their tensor's shape, and those for adapters come in the products' order.
    """

    scaling: float  # attention's
    norms: tuple[Any, Any]
    eps: float

    def __init__(self, layer: Any, checkpointing: str) -> None:
        self.layer, self.ordinary, self.checkpointing = layer, layer.forward, checkpointing
        self.products: list[Product] = []

    @staticmethod
    def obstacles(layer: nn.Module) -> Iterator[str]:
        """What stands against fusing a layer, in words."""
        raise NotImplementedError

    def groups(self) -> list[list[nn.Module]]:
        """The linear layers as they are now, those together that read the same input, in the order of IN to SECOND."""
        raise NotImplementedError

    def normed(self, which: int, x: torch.Tensor, tail: int = 0) -> torch.Tensor:
        """The layer's first (0) or second (1) norm."""
        norm = self.norms[which]
        return ew.norm(x, norm.weight, getattr(norm, "bias", None), self.eps, tail)

    def norm_backward(self, which: int, dx: torch.Tensor, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        norm = self.norms[which]
        return ew.norm_backward(dx, x, norm.weight, self.eps, residual, centred=hasattr(norm, "bias"))

    def queries_keys_values(self, saved: SavedActivations, context: Any) -> Qkv:
        """From IN's result to attention's inputs, each (..., heads, D)."""
        raise NotImplementedError

    def queries_keys_values_backward(
        self, grads: Qkv, saved: SavedActivations, context: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradient for IN's result with room for its adapters, and its gain's."""
        raise NotImplementedError

    def activated(self, u: torch.Tensor, context: Any, tail: int) -> torch.Tensor:
        """From FIRST's result to SECOND's input."""
        raise NotImplementedError

    def activated_backward(
        self, da: torch.Tensor, u: torch.Tensor, context: Any, again: bool, over: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The gradient for FIRST's result with room for its adapters, SECOND's input once `again`, the gain's.

        The first may be written over `u` where `over` says so.
        """
        raise NotImplementedError

    def run(self, context: LayerContext, hidden: torch.Tensor) -> torch.Tensor:
        return LayerFunction.apply(self, context, hidden, *context.parameters)

    def adapters(self, dtype: torch.dtype) -> list[Adapters | None]:
        """Those that are active now."""
        groups = self.groups()
        if [list(product.layers) for product in self.products] != groups:
            self.products = [Product(*group) for group in groups]
        return [product.use(dtype) for product in self.products]

    def product(
        self, which: int, x: torch.Tensor, saved: SavedActivations, context: LayerContext, spare: int = 0
    ) -> None:
        saved.results[which], saved.own[which] = self.products[which].forward(x, context.adapters[which], spare)

    def room(self, which: int, context: LayerContext) -> int:
        return self.products[which].room(context.adapters[which])

    def attention_half(self, saved: SavedActivations, context: LayerContext) -> torch.Tensor:
        """Fill in `saved` up to OUT; returns `middle`."""
        if saved.results[IN] is None:
            self.product(IN, self.normed(0, saved.hidden, self.room(IN, context)), saved, context)
        if saved.attended is None:
            inputs = self.queries_keys_values(saved, context)
            saved.attended, saved.state = attend(*inputs, context.layout, self.scaling)
            del inputs
        if saved.results[OUT] is None:
            self.product(OUT, joined(saved.attended), saved, context)
        return ew.add(saved.hidden, saved.result(OUT), context.gain(OUT), self.products[OUT].bias)

    def first(self, saved: SavedActivations, middle: torch.Tensor, context: LayerContext, spare: int = 0) -> None:
        self.product(FIRST, self.normed(1, middle, self.room(FIRST, context)), saved, context, spare)

    def second(self, saved: SavedActivations, context: LayerContext) -> None:
        self.product(SECOND, self.activated(saved.result(FIRST), context, self.room(SECOND, context)), saved, context)

    def forward(self, hidden: torch.Tensor, context: LayerContext) -> tuple[torch.Tensor, SavedActivations]:
        """The layer's result, and what `checkpointing` asks for."""
        saved = SavedActivations(hidden)
        middle = self.attention_half(saved, context)
        self.first(saved, middle, context)
        self.second(saved, context)
        result = ew.add(middle, saved.result(SECOND), context.gain(SECOND), self.products[SECOND].bias)
        if self.checkpointing == "full":
            return result, SavedActivations(hidden)
        if context.gain(SECOND) is None:
            saved.results[SECOND] = None  # only a gain's gradient needs it
        if self.checkpointing == "mlp":
            saved.results[FIRST] = None
        return result, saved

    def backward(
        self, saved: SavedActivations, context: LayerContext, dy: torch.Tensor, needs_input: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients for the layer's input, and for the adapters."""
        middle = self.attention_half(saved, context)
        if context.gain(OUT) is None:
            saved.results[OUT] = None  # `middle` has it
        again = saved.results[FIRST] is None
        if again:
            self.first(saved, middle, context, spare=context.tail(FIRST))
        gained = context.gain(SECOND) is not None and saved.results[SECOND] is None
        if gained or (context.adapters[SECOND] and saved.own[SECOND] is None):
            self.second(saved, context)
        dmiddle, mlp_grads = self.mlp_backward(saved, middle, context, dy, over=again)
        saved.results[FIRST] = None
        del middle
        dx, attention_grads = self.attention_half_backward(saved, context, dmiddle, needs_input)
        return dx, [*attention_grads, *mlp_grads]

    def mlp_backward(
        self, saved: SavedActivations, middle: torch.Tensor, context: LayerContext, dy: torch.Tensor, over: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        du, dgain = ew.scale_backward(dy, saved.results[SECOND], context.gain(SECOND), context.tail(SECOND))
        saved.results[SECOND] = None
        dinner = self.products[SECOND].backward(du, context.adapters[SECOND])
        again = context.adapters[SECOND] is not None
        du_first, inner, dgain_first = self.activated_backward(dinner, saved.result(FIRST), context, again, over)
        grads = self.gradients(SECOND, du, inner, saved, dgain, context)
        del du, dinner, inner
        dx = self.products[FIRST].backward(du_first, context.adapters[FIRST])
        x = self.normed(1, middle) if context.adapters[FIRST] else None
        grads = [*self.gradients(FIRST, du_first, x, saved, dgain_first, context), *grads]
        return self.norm_backward(1, dx, middle, residual=dy), grads

    def attention_half_backward(
        self, saved: SavedActivations, context: LayerContext, dy: torch.Tensor, needs_input: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        assert saved.attended is not None
        du, dgain = ew.scale_backward(dy, saved.results[OUT], context.gain(OUT), context.tail(OUT))
        dattended = self.products[OUT].backward(du, context.adapters[OUT]).view_as(saved.attended)
        out_grads = self.gradients(OUT, du, joined(saved.attended), saved, dgain, context)
        saved.results[OUT] = None
        del du
        inputs = self.queries_keys_values(saved, context)
        grads = attend_backward(dattended, *inputs, saved.attended, saved.state, context.layout, self.scaling)
        del inputs, dattended
        du, dgain = self.queries_keys_values_backward(grads, saved, context)
        del grads
        dx = None
        if needs_input:
            dx = self.products[IN].backward(du, context.adapters[IN])
            dx = self.norm_backward(0, dx, saved.hidden, residual=dy)
        else:
            self.products[IN].fill(du, context.adapters[IN])
        x = self.normed(0, saved.hidden) if context.adapters[IN] else None
        return dx, [*self.gradients(IN, du, x, saved, dgain, context), *out_grads]

    def gradients(
        self,
        which: int,
        du: torch.Tensor,
        x: torch.Tensor | None,
        saved: SavedActivations,
        dgain: torch.Tensor | None,
        context: LayerContext,
    ) -> list[torch.Tensor]:
        return self.products[which].adapter_gradients(du, x, saved.own[which], dgain, context.adapters[which])


class LayerFunction(torch.autograd.Function):
    """One `FusedLayer` for autograd."""

    @staticmethod
    def forward(
        ctx: Any, layer: FusedLayer, context: LayerContext, hidden: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            result, saved = layer.forward(hidden, context)
        ctx.layer, ctx.context, ctx.state = layer, context, saved.state
        ctx.save_for_backward(hidden, saved.attended, *saved.results, *saved.own)
        return result

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        hidden, attended, *rest = ctx.saved_tensors
        saved = SavedActivations(hidden, rest[:4], rest[4:], attended, ctx.state)
        with torch.autocast(dy.device.type, enabled=False):
            dx, grads = ctx.layer.backward(saved, ctx.context, dy.contiguous(), ctx.needs_input_grad[2])
        wanted = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[3:], strict=True))
        return None, None, dx, *wanted


def joined(x: torch.Tensor) -> torch.Tensor:
    """(..., heads, D) -> (T, H)."""
    return x.reshape(-1, x.shape[-2] * x.shape[-1])

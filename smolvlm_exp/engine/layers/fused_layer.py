"""A transformer layer as one autograd function: what the text model's and the vision tower's have in common.

    middle = hidden + out(attention(in(norm(hidden))))          `in`: queries, keys and values in one product
    result = middle + second(activation(first(norm(middle))))

What autograd would do with the layer's some forty operations is done here with about twenty kernels per pass: products
of several linear layers at once (linear.py), everything between two products in one pass over memory (ops.py), and
nothing saved for the backward pass that is cheap to compute again. `LEVELS` (footprint.py) says how much is saved.
fuse.py says what norm, attention and activation are.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from smolvlm_exp.engine.layers import ops
from smolvlm_exp.engine.layers.attention import attend, attend_backward
from smolvlm_exp.engine.layers.gpu_attention import Qkv
from smolvlm_exp.engine.layers.layout import Layout
from smolvlm_exp.engine.layers.linear import FrozenLinears, Product, active_adapter

IN, OUT, FIRST, SECOND = range(4)  # a layer's products


@dataclass
class LayerContext:
    """What a layer's forward and backward pass share besides its tensors."""

    products: list[Product]
    layout: Layout | None  # of a packed batch; None: tiles


@dataclass
class SavedActivations:
    """What a layer saves for its backward pass; None where it is to be recomputed.

    `results` (T, N) and `low_rank` (T, R) are its four products', `attended` and `state` attention's.
    """

    hidden: torch.Tensor  # (T, H) the layer's input
    results: list[torch.Tensor | None] = field(default_factory=lambda: [None] * 4)
    low_rank: list[torch.Tensor | None] = field(default_factory=lambda: [None] * 4)
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

    names: tuple[tuple[str, ...], ...]  # of the linear layers in each product, from IN to SECOND
    scaling: float  # attention's
    norms: tuple[Any, Any]
    eps: float
    gated: bool  # SwiGLU, else GELU

    def __init__(self, layer: Any, checkpointing: str) -> None:
        self.layer, self.ordinary, self.checkpointing = layer, layer.forward, checkpointing
        self.linears: list[FrozenLinears] = []

    @staticmethod
    def obstacles(layer: nn.Module, trains: bool = True) -> Iterator[str]:
        """What prevents fusing a layer, in words; not `trains`: of passes without gradients."""
        raise NotImplementedError

    def queries_keys_values(self, u: torch.Tensor, context: Any) -> Qkv:
        """From IN's result to attention's inputs, each (..., heads, D)."""
        raise NotImplementedError

    def queries_keys_values_backward(
        self, grads: Qkv, u: torch.Tensor, context: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradient for IN's result with room for its adapters, and its gain's."""
        raise NotImplementedError

    def run(self, hidden: torch.Tensor, context: LayerContext) -> torch.Tensor:
        parameters = [p for product in context.products for p in product.parameters]
        return LayerFunction.apply(self, context, hidden, *parameters)

    def products(self, dtype: torch.dtype) -> list[Product]:
        """Of the linear layers as they are now, with the adapters that are active."""
        groups = [[self.layer.get_submodule(name) for name in names] for names in self.names]
        if [linears.layers for linears in self.linears] != groups:
            self.linears = [FrozenLinears(group) for group in groups]
        return [linears.product(dtype) for linears in self.linears]

    def fresh_products(self, dtype: torch.dtype) -> list[Product]:
        """The same, put together whether or not an adapter has changed since."""
        return [linears.put_together([*map(active_adapter, linears.layers)], dtype) for linears in self.linears]

    def normed(self, which: int, x: torch.Tensor, tail: int = 0) -> torch.Tensor:
        """The layer's first (0) or second (1) norm."""
        norm = self.norms[which]
        return ops.norm(x, norm.weight, getattr(norm, "bias", None), self.eps, tail)

    def norm_backward(self, which: int, dx: torch.Tensor, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        norm = self.norms[which]
        return ops.norm_backward(dx, x, norm.weight, self.eps, residual, centred=hasattr(norm, "bias"))

    def attention_half(self, saved: SavedActivations, context: LayerContext) -> torch.Tensor:
        """Fill in `saved` up to OUT; returns `middle`."""
        into, out = context.products[IN], context.products[OUT]
        if saved.results[IN] is None:
            saved.results[IN], saved.low_rank[IN] = into.forward(self.normed(0, saved.hidden, into.room))
        if saved.attended is None:
            inputs = self.queries_keys_values(saved.result(IN), context)
            saved.attended, saved.state = attend(inputs, context.layout, self.scaling)
            del inputs
        if saved.results[OUT] is None:
            saved.results[OUT], saved.low_rank[OUT] = out.forward(joined(saved.attended))
        return ops.affine(saved.hidden, saved.result(OUT), out.gain, out.bias)

    def first(self, saved: SavedActivations, middle: torch.Tensor, product: Product, spare: int = 0) -> None:
        x = self.normed(1, middle, product.room)
        saved.results[FIRST], saved.low_rank[FIRST] = product.forward(x, spare)

    def second(self, saved: SavedActivations, context: LayerContext) -> None:
        first, second = context.products[FIRST], context.products[SECOND]
        x = ops.activation(saved.result(FIRST), first.gain, first.bias, second.room, gated=self.gated)
        saved.results[SECOND], saved.low_rank[SECOND] = second.forward(x)

    def forward(self, hidden: torch.Tensor, context: LayerContext) -> tuple[torch.Tensor, SavedActivations]:
        """The layer's result, and what `checkpointing` saves."""
        saved, second = SavedActivations(hidden), context.products[SECOND]
        middle = self.attention_half(saved, context)
        self.first(saved, middle, context.products[FIRST])
        self.second(saved, context)
        result = ops.affine(middle, saved.result(SECOND), second.gain, second.bias)
        if self.checkpointing == "full":
            return result, SavedActivations(hidden)
        if second.gain is None:
            saved.results[SECOND] = None  # only a gain's gradient needs it
        if self.checkpointing == "mlp":
            saved.results[FIRST] = None
        return result, saved

    def backward(
        self, saved: SavedActivations, context: LayerContext, dy: torch.Tensor, needs_input: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients for the layer's input, and for the adapters."""
        _, out, first, second = context.products
        middle = self.attention_half(saved, context)
        if out.gain is None:
            saved.results[OUT] = None  # `middle` has it
        recomputed = saved.results[FIRST] is None
        if recomputed:
            self.first(saved, middle, first, spare=first.tail)
        if second.tail and saved.low_rank[SECOND] is None:
            self.second(saved, context)
        dmiddle, mlp_grads = self.mlp_backward(saved, middle, context, dy, in_place=recomputed)
        saved.results[FIRST] = None
        del middle
        dx, attention_grads = self.attention_half_backward(saved, context, dmiddle, needs_input)
        return dx, [*attention_grads, *mlp_grads]

    def mlp_backward(
        self, saved: SavedActivations, middle: torch.Tensor, context: LayerContext, dy: torch.Tensor, in_place: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        first, second = context.products[FIRST], context.products[SECOND]
        du, dgain = ops.scale_backward([dy], saved.results[SECOND], second.gain, second.tail)
        saved.results[SECOND] = None
        da = second.backward(du)
        u, with_result = saved.result(FIRST), second.tail > 0
        du_first, inner, dgain_first = ops.activation_backward(
            da, u, first.gain, first.bias, first.tail, with_result, in_place, gated=self.gated
        )
        second_grads = second.adapter_gradients(du, inner, saved.low_rank[SECOND], dgain)
        del du, da, u, inner
        dx = first.backward(du_first)
        x = self.normed(1, middle) if first.tail else None
        first_grads = first.adapter_gradients(du_first, x, saved.low_rank[FIRST], dgain_first)
        return self.norm_backward(1, dx, middle, residual=dy), [*first_grads, *second_grads]

    def attention_half_backward(
        self, saved: SavedActivations, context: LayerContext, dy: torch.Tensor, needs_input: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        into, out = context.products[IN], context.products[OUT]
        assert saved.attended is not None
        du, dgain = ops.scale_backward([dy], saved.results[OUT], out.gain, out.tail)
        dattended = out.backward(du).view_as(saved.attended)
        out_grads = out.adapter_gradients(du, joined(saved.attended), saved.low_rank[OUT], dgain)
        saved.results[OUT] = None
        del du
        inputs = self.queries_keys_values(saved.result(IN), context)
        grads = attend_backward(dattended, inputs, saved.attended, saved.state, context.layout, self.scaling)
        del inputs, dattended
        du, dgain = self.queries_keys_values_backward(grads, saved.result(IN), context)
        del grads
        dx = None
        if needs_input:
            dx = self.norm_backward(0, into.backward(du), saved.hidden, residual=dy)
        else:
            into.fill(du)
        x = self.normed(0, saved.hidden) if into.tail else None
        return dx, [*into.adapter_gradients(du, x, saved.low_rank[IN], dgain), *out_grads]


class LayerFunction(torch.autograd.Function):
    """One `FusedLayer` for autograd."""

    @staticmethod
    def forward(
        ctx: Any, layer: FusedLayer, context: LayerContext, hidden: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            result, saved = layer.forward(hidden, context)
        ctx.layer, ctx.context, ctx.state = layer, context, saved.state
        ctx.save_for_backward(hidden, saved.attended, *saved.results, *saved.low_rank)
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

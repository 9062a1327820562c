"""A transformer layer as one autograd function: what the text model's and the vision tower's have in common.

    middle = hidden + out(attention(in(norm(hidden))))          `in`: queries, keys and values in one product
    result = middle + second(activation(first(norm(middle))))

What autograd would do with the layer's some forty operations is done here with about twenty kernels a pass: products of
several linear layers at once (linear.py), everything between two products in one pass over memory (ops.py), and
nothing kept for the backward pass that is cheap to make again. `LEVELS` (footprint.py) says how much is kept.
text_layer.py and vision_layer.py say what norm, attention and activation are.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from smolvlm_exp.engine.layers import ops as ew
from smolvlm_exp.engine.layers.linear import Adapters, products_of

IN, OUT, FIRST, SECOND = range(4)  # a layer's products


@dataclass
class Pass:
    """What a layer's forward and backward pass share beside its tensors: first of all its products' adapters."""

    adapters: list[Adapters | None]

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
class Kept:
    """What a layer keeps from its forward to its backward pass; None where it is to be computed again.

    `results` (T, N) and `own` (T, R) are its four products', `attended` attention's result and `state` what that keeps.
    """

    hidden: torch.Tensor  # (T, H) the layer's input
    results: list[torch.Tensor | None]
    own: list[torch.Tensor | None]
    attended: torch.Tensor | None = None
    state: tuple[Any, ...] = ()

    @classmethod
    def nothing(cls, hidden: torch.Tensor) -> "Kept":
        return cls(hidden, [None] * 4, [None] * 4)

    def result(self, product: int) -> torch.Tensor:
        found = self.results[product]
        assert found is not None
        return found


class FusedLayer:
    """Stands in for a transformers layer's `forward`; `ordinary` is what it stood in for.

    Hidden states are (T, H), gradients have their tensor's shape, and those for adapters come in the products' order.
    """

    def __init__(self, layer: Any, keep: str) -> None:
        self.layer, self.ordinary, self.keep = layer, layer.forward, keep
        self.products = products_of(self.groups())

    def groups(self) -> list[list[nn.Module]]:
        """The linear layers as they are now, those together that read the same input, in the order of IN to SECOND."""
        raise NotImplementedError

    def normed(self, which: int, x: torch.Tensor, tail: int = 0) -> torch.Tensor:
        """The layer's first (0) or second (1) norm."""
        raise NotImplementedError

    def norm_backward(self, which: int, dx: torch.Tensor, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def attend(self, kept: Kept, scene: Any) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """From IN's result to (..., heads, D), and what its backward pass wants."""
        raise NotImplementedError

    def attend_backward(
        self, dattended: torch.Tensor, kept: Kept, scene: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradient for IN's result with room for its adapters, and its gain's."""
        raise NotImplementedError

    def activated(self, u: torch.Tensor, scene: Any, tail: int) -> torch.Tensor:
        """From FIRST's result to SECOND's input."""
        raise NotImplementedError

    def activated_backward(
        self, da: torch.Tensor, u: torch.Tensor, scene: Any, again: bool, over: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The gradient for FIRST's result with room for its adapters, SECOND's input once `again`, the gain's.

        The first may be written over `u` where `over` says so.
        """
        raise NotImplementedError

    def run(self, scene: Pass, hidden: torch.Tensor) -> torch.Tensor:
        return LayerFunction.apply(self, scene, hidden, *scene.parameters)

    def adapters(self, dtype: torch.dtype) -> list[Adapters | None]:
        """Those that are active now."""
        self.products = products_of(self.groups(), self.products)
        return [product.use(dtype) for product in self.products]

    def product(self, which: int, x: torch.Tensor, kept: Kept, scene: Pass, spare: int = 0) -> None:
        kept.results[which], kept.own[which] = self.products[which].forward(x, scene.adapters[which], spare)

    def room(self, which: int, scene: Pass) -> int:
        return self.products[which].room(scene.adapters[which])

    def attention_half(self, kept: Kept, scene: Pass) -> torch.Tensor:
        """Fill in `kept` up to OUT; returns `middle`."""
        if kept.results[IN] is None:
            self.product(IN, self.normed(0, kept.hidden, self.room(IN, scene)), kept, scene)
        if kept.attended is None:
            kept.attended, kept.state = self.attend(kept, scene)
        if kept.results[OUT] is None:
            self.product(OUT, joined(kept.attended), kept, scene)
        return ew.add(kept.hidden, kept.result(OUT), scene.gain(OUT), self.products[OUT].bias)

    def first(self, kept: Kept, middle: torch.Tensor, scene: Pass, spare: int = 0) -> None:
        self.product(FIRST, self.normed(1, middle, self.room(FIRST, scene)), kept, scene, spare)

    def second(self, kept: Kept, scene: Pass) -> None:
        self.product(SECOND, self.activated(kept.result(FIRST), scene, self.room(SECOND, scene)), kept, scene)

    def forward(self, hidden: torch.Tensor, scene: Pass) -> tuple[torch.Tensor, Kept]:
        """The layer's result, and what `keep` asks for."""
        kept = Kept.nothing(hidden)
        middle = self.attention_half(kept, scene)
        self.first(kept, middle, scene)
        self.second(kept, scene)
        result = ew.add(middle, kept.result(SECOND), scene.gain(SECOND), self.products[SECOND].bias)
        if self.keep == "inputs":
            return result, Kept.nothing(hidden)
        if scene.gain(SECOND) is None:
            kept.results[SECOND] = None  # only a gain's gradient needs it
        if self.keep == "attention":
            kept.results[FIRST] = None
        return result, kept

    def backward(
        self, kept: Kept, scene: Pass, dy: torch.Tensor, needs_input: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients for the layer's input, and for the adapters."""
        middle = self.attention_half(kept, scene)
        if scene.gain(OUT) is None:
            kept.results[OUT] = None  # `middle` has it
        again = kept.results[FIRST] is None
        if again:
            self.first(kept, middle, scene, spare=scene.tail(FIRST))
        gained = scene.gain(SECOND) is not None and kept.results[SECOND] is None
        if gained or (scene.adapters[SECOND] and kept.own[SECOND] is None):
            self.second(kept, scene)
        dmiddle, mlp_grads = self.mlp_backward(kept, middle, scene, dy, over=again)
        kept.results[FIRST] = None
        del middle
        dx, attention_grads = self.attention_half_backward(kept, scene, dmiddle, needs_input)
        return dx, [*attention_grads, *mlp_grads]

    def mlp_backward(
        self, kept: Kept, middle: torch.Tensor, scene: Pass, dy: torch.Tensor, over: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        du, dgain = ew.scale_backward(dy, kept.results[SECOND], scene.gain(SECOND), scene.tail(SECOND))
        kept.results[SECOND] = None
        dinner = self.products[SECOND].backward(du, scene.adapters[SECOND])
        again = scene.adapters[SECOND] is not None
        du_first, inner, dgain_first = self.activated_backward(dinner, kept.result(FIRST), scene, again, over)
        grads = self.gradients(SECOND, du, inner, kept, dgain, scene)
        del du, dinner, inner
        dx = self.products[FIRST].backward(du_first, scene.adapters[FIRST])
        x = self.normed(1, middle) if scene.adapters[FIRST] else None
        grads = [*self.gradients(FIRST, du_first, x, kept, dgain_first, scene), *grads]
        return self.norm_backward(1, dx, middle, residual=dy), grads

    def attention_half_backward(
        self, kept: Kept, scene: Pass, dy: torch.Tensor, needs_input: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        assert kept.attended is not None
        du, dgain = ew.scale_backward(dy, kept.results[OUT], scene.gain(OUT), scene.tail(OUT))
        dattended = self.products[OUT].backward(du, scene.adapters[OUT]).view_as(kept.attended)
        out_grads = self.gradients(OUT, du, joined(kept.attended), kept, dgain, scene)
        kept.results[OUT] = None
        del du
        du, dgain = self.attend_backward(dattended, kept, scene)
        del dattended
        dx = None
        if needs_input:
            dx = self.products[IN].backward(du, scene.adapters[IN])
            dx = self.norm_backward(0, dx, kept.hidden, residual=dy)
        else:
            self.products[IN].fill(du, scene.adapters[IN])
        x = self.normed(0, kept.hidden) if scene.adapters[IN] else None
        return dx, [*self.gradients(IN, du, x, kept, dgain, scene), *out_grads]

    def gradients(
        self, which: int, du: torch.Tensor, x: torch.Tensor | None, kept: Kept, dgain: torch.Tensor | None, scene: Pass
    ) -> list[torch.Tensor]:
        return self.products[which].adapter_gradients(du, x, kept.own[which], dgain, scene.adapters[which])


class LayerFunction(torch.autograd.Function):
    """One `FusedLayer` for autograd."""

    @staticmethod
    def forward(
        ctx: Any, layer: FusedLayer, scene: Pass, hidden: torch.Tensor, *parameters: torch.Tensor
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


def joined(x: torch.Tensor) -> torch.Tensor:
    """(..., heads, D) -> (T, H)."""
    return x.reshape(-1, x.shape[-2] * x.shape[-1])


def fuse_layers(
    layers: Iterable[Any], kind: type[FusedLayer], obstacles: Callable[[nn.Module], Iterator[str]], keep: str
) -> str | None:
    """Let `layers` run as `kind`, or keep something else where they do already.

    Args:
        obstacles: what a layer of this kind does not do, in words.
        keep: one of footprint.py's `LEVELS`.

    Returns:
        None, or why they cannot be fused, in words; nothing is changed then.
    """
    layers = list(layers)
    for layer in layers:
        reason = next(obstacles(layer), None)
        if reason:
            return reason
    for layer in layers:
        if isinstance(layer.forward, kind):
            layer.forward.keep = keep
        else:
            layer.forward = kind(layer, keep)
    return None

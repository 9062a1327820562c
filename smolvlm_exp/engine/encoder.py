"""A layer of the vision tower over whole tiles as one autograd function, as decoder.py does it for the text model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from smolvlm_exp.engine import elementwise as ew
from smolvlm_exp.engine.attend import attend_tiles, attend_tiles_backward
from smolvlm_exp.engine.linear import Active, Kept, linear_obstacles, products_of

QKV, OUT, FC1, FC2 = range(4)


@dataclass
class Pass(Active):
    """What a layer's forward and backward pass share beside its tensors."""

    patches: int  # in a tile


class FusedEncoderLayer:
    """Stands in for a vision layer's `forward` whenever no patch is masked, which is always so for whole tiles."""

    def __init__(self, layer: Any, keep: str) -> None:
        self.layer, self.ordinary, self.keep = layer, layer.forward, keep
        self.products = products_of(self.groups())
        self.heads, self.scaling = layer.self_attn.num_heads, layer.self_attn.scale
        self.norms = layer.layer_norm1, layer.layer_norm2

    def groups(self) -> list[list[nn.Module]]:
        """The linear layers as they are now, those together that read the same input."""
        attention, mlp = self.layer.self_attn, self.layer.mlp
        return [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.out_proj], [mlp.fc1], [mlp.fc2]]

    def __call__(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None:
            return self.ordinary(hidden_states, attention_mask, **kwargs)
        self.products = products_of(self.groups(), self.products)
        scene = Pass([product.use(hidden_states.dtype) for product in self.products], hidden_states.shape[1])
        return EncoderFunction.apply(self, scene, hidden_states.flatten(0, 1), *scene.parameters).view_as(hidden_states)

    def product(self, which: int, x: torch.Tensor, kept: Kept, scene: Pass) -> None:
        kept.results[which], kept.own[which] = self.products[which].forward(x, scene.adapters[which])

    def normed(self, which: int, x: torch.Tensor, tail: int = 0) -> torch.Tensor:
        norm = self.norms[which]
        return ew.layer_norm(x, norm.weight, norm.bias, norm.eps, tail)

    def room(self, which: int, scene: Pass) -> int:
        return self.products[which].room(scene.adapters[which])

    def queries_keys_values(self, kept: Kept, scene: Pass) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each (n, patches, heads, D)."""
        whole = ew.scale(kept.result(QKV), scene.gain(QKV), self.products[QKV].bias)
        parts = whole.view(-1, scene.patches, 3, self.heads, whole.shape[1] // (3 * self.heads))
        return parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]

    def attention_half(self, kept: Kept, scene: Pass) -> torch.Tensor:
        """Fill in `kept` up to OUT; returns the hidden states after attention, (T, H)."""
        if kept.results[QKV] is None:
            self.product(QKV, self.normed(0, kept.hidden, self.room(QKV, scene)), kept, scene)
        if kept.attended is None:
            kept.attended, kept.state = attend_tiles(*self.queries_keys_values(kept, scene), self.scaling)
        if kept.results[OUT] is None:
            self.product(OUT, joined(kept.attended), kept, scene)
        return ew.add(kept.hidden, kept.result(OUT), scene.gain(OUT), self.products[OUT].bias)

    def fc1(self, kept: Kept, middle: torch.Tensor, scene: Pass) -> None:
        if kept.results[FC1] is None:
            self.product(FC1, self.normed(1, middle, self.room(FC1, scene)), kept, scene)

    def fc2(self, kept: Kept, scene: Pass) -> None:
        x = ew.gelu(kept.result(FC1), scene.gain(FC1), self.products[FC1].bias, self.room(FC2, scene))
        self.product(FC2, x, kept, scene)

    def forward(self, hidden: torch.Tensor, scene: Pass) -> tuple[torch.Tensor, Kept]:
        """The layer's result, (T, H), and what `keep` asks for."""
        kept = Kept.nothing(hidden)
        middle = self.attention_half(kept, scene)
        self.fc1(kept, middle, scene)
        self.fc2(kept, scene)
        result = ew.add(middle, kept.result(FC2), scene.gain(FC2), self.products[FC2].bias)
        if self.keep == "inputs":
            return result, Kept.nothing(hidden)
        if scene.gain(FC2) is None:
            kept.results[FC2] = None  # only a gain's gradient needs it
        if self.keep == "attention":
            kept.results[FC1] = None
        return result, kept

    def backward(
        self, kept: Kept, scene: Pass, dy: torch.Tensor, needs_input: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients for the layer's input (T, H), and for the adapters, in the products' order."""
        middle = self.attention_half(kept, scene)
        self.fc1(kept, middle, scene)
        gained = scene.gain(FC2) is not None and kept.results[FC2] is None
        if gained or (scene.adapters[FC2] and kept.own[FC2] is None):
            self.fc2(kept, scene)
        dmiddle, mlp_grads = self.mlp_backward(kept, middle, scene, dy)
        kept.results[FC1] = kept.results[FC2] = None
        del middle
        dx, attention_grads = self.attention_backward(kept, scene, dmiddle, needs_input)
        return dx, [*attention_grads, *mlp_grads]

    def mlp_backward(
        self, kept: Kept, middle: torch.Tensor, scene: Pass, dy: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        du, dgain = ew.scale_backward(dy, kept.results[FC2], scene.gain(FC2), scene.tail(FC2))
        dinner = self.products[FC2].backward(du, scene.adapters[FC2])
        again = scene.adapters[FC2] is not None
        du_fc1, inner, dgain_fc1 = ew.gelu_backward(
            dinner, kept.result(FC1), scene.gain(FC1), self.products[FC1].bias, scene.tail(FC1), again
        )
        grads = self.gradients(FC2, du, inner, kept, dgain, scene)
        del du, dinner, inner
        dx = self.products[FC1].backward(du_fc1, scene.adapters[FC1])
        x = self.normed(1, middle) if scene.adapters[FC1] else None
        grads = [*self.gradients(FC1, du_fc1, x, kept, dgain_fc1, scene), *grads]
        return self.norm_backward(1, dx, middle, residual=dy), grads

    def attention_backward(
        self, kept: Kept, scene: Pass, dy: torch.Tensor, needs_input: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        assert kept.attended is not None
        du, dgain = ew.scale_backward(dy, kept.result(OUT), scene.gain(OUT), scene.tail(OUT))
        dattended = self.products[OUT].backward(du, scene.adapters[OUT]).view_as(kept.attended)
        out_grads = self.gradients(OUT, du, joined(kept.attended), kept, dgain, scene)
        inputs = self.queries_keys_values(kept, scene)
        parts = attend_tiles_backward(dattended, *inputs, kept.attended, kept.state, self.scaling)
        du, dgain = ew.scale_backward_parts(parts, kept.result(QKV), scene.gain(QKV), scene.tail(QKV))
        del inputs, parts, dattended
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
        return ew.layer_norm_backward(dx, x, norm.weight, norm.eps, residual)


class EncoderFunction(torch.autograd.Function):
    """One `FusedEncoderLayer` for autograd."""

    @staticmethod
    def forward(
        ctx: Any, layer: FusedEncoderLayer, scene: Pass, hidden: torch.Tensor, *parameters: torch.Tensor
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
    """(n, patches, heads, D) -> (T, H)."""
    return x.flatten(2).flatten(0, 1)


def fuse_encoder_layers(tower: Any, keep: str) -> str | None:
    """Let the layers of the vision tower run fused.

    Args:
        keep: one of decoder.py's `KEEP`.

    Returns:
        None, or why they cannot be, in words; nothing is changed then.
    """
    for layer in tower.encoder.layers:
        reason = next(obstacles(layer), None)
        if reason:
            return reason
    for layer in tower.encoder.layers:
        if isinstance(layer.forward, FusedEncoderLayer):
            layer.forward.keep = keep
        else:
            layer.forward = FusedEncoderLayer(layer, keep)
    return None


def obstacles(layer: nn.Module) -> Iterator[str]:
    """What a fused layer does not do."""
    mlp: Any = layer.mlp
    if type(mlp.activation_fn).__name__ != "GELUTanh":
        yield f"its activation is {type(mlp.activation_fn).__name__}, not GELU's tanh form"
    yield from linear_obstacles(layer)

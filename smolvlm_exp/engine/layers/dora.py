"""Exact DoRA (arXiv 2402.09353) at about LoRA's cost, in PEFT's own layers.

DoRA divides each row of W + s B A by its norm. Written out (eq. 5's norm, squared, per row):

    ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 diag(B (A A^T) B^T)

||W||^2 never changes and W A^T is a product with r columns, so W + s B A is never formed; and as A and B change only at
an optimiser's step, the norm is computed once per step. Everything is float32, under autocast too; a fresh adapter's
magnitude is taken from the same formula: magnitude / norm is then exactly 1, and the policy starts at the reference in
bfloat16 too.

What is saved and loaded is PEFT's: an ordinary DoRA adapter.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from smolvlm_exp.engine.layers.quantized_weights import frozen_weight, product_f32


def tensor_versions(*tensors: torch.Tensor) -> tuple[Any, ...]:
    """Something that changes whenever one of `tensors` was written, or is another."""
    return tuple((id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors)


class ParameterVersion:
    """Counts optimiser steps: with the tensors' versions, what is derived from adapters is derived once per step.

    Versions alone would not do: FSDP writes into unsharded parameters without raising them.
    """

    steps = 0

    @classmethod
    def tick(cls, *_: Any) -> None:
        cls.steps += 1

    @classmethod
    def now(cls, *tensors: torch.Tensor) -> tuple[Any, ...]:
        """Something that changes whenever one of `tensors` may have."""
        return (cls.steps, *tensor_versions(*tensors))


register_optimizer_step_post_hook(ParameterVersion.tick)


def squared_norm(base: torch.Tensor, weight_a: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """||W + s B A||^2 of each row, (out,).

    Args:
        base: (out,) ||W||^2; weight_a: (out, r) W A^T; a: (r, in); b: (out, r) s B; all float32.
    """
    return base + (torch.addmm(weight_a, b, a @ a.T, beta=2) * b).sum(1)


class ExactDora:
    """Stands in for the `forward` of PEFT's DoRA layer, and knows the norm that its magnitude is divided by."""

    def __init__(self, layer: Any, name: str) -> None:
        self.layer, self.name = layer, name
        self.squares: torch.Tensor | None = None
        self.key: Any = None  # of `latest`
        self.latest: torch.Tensor

    @torch.no_grad()
    def base_squares(self) -> torch.Tensor:
        """(out,) ||W||^2, float32."""
        base = self.layer.get_base_layer()
        if self.squares is None or self.squares.device != base.weight.device:
            self.squares = torch.linalg.vector_norm(frozen_weight(base), dim=1, dtype=torch.float32).square()
        return self.squares

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """(out,) ||W + s B A||, float32, a constant for the gradients (section 4.3)."""
        a, b = self.layer.lora_A[self.name].weight, self.layer.lora_B[self.name].weight
        key = ParameterVersion.now(a, b)
        if self.key != key:
            weight, scaled = frozen_weight(self.layer.get_base_layer()), self.layer.scaling[self.name] * b.float()
            with torch.autocast(weight.device.type, enabled=False):
                weight_a = product_f32(weight, a.to(weight.dtype).T)
                squares = squared_norm(self.base_squares(), weight_a, a.float(), scaled)
            self.key, self.latest = key, squares.sqrt()
        return self.latest

    def __call__(self, x: torch.Tensor, *, base_result: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        """What is to be added to the base layer's result: (gain - 1) x W^T + gain s x A^T B^T; (..., out)."""
        layer, name, base = self.layer, self.name, self.layer.get_base_layer()
        gain = layer.lora_magnitude_vector[name].weight / self.norm()
        if base_result is None:
            base_result = F.linear(x, frozen_weight(base, x.dtype))
        elif base.bias is not None:
            base_result = base_result - base.bias
        adapted = layer.lora_B[name](layer.lora_A[name](x))
        return ((gain - 1) * base_result + gain * layer.scaling[name] * adapted).to(base_result.dtype)


def exact_dora(layer: Any, name: str) -> ExactDora:
    """The one that `use_exact_dora` has installed, else a new one: PEFT's layer stays as it is."""
    forward = layer.lora_magnitude_vector[name].forward
    return forward if isinstance(forward, ExactDora) else ExactDora(layer, name)


def use_exact_dora(model: nn.Module) -> None:
    """Let every linear DoRA layer of `model` compute by this module; fresh ones (B is still zero) start at the base."""
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        for name, dora in layer.lora_magnitude_vector.items():
            if type(dora) is DoraLinearLayer:
                exact = exact_dora(layer, name)
                dora.forward = exact  # type: ignore[method-assign]
                norm = exact.norm()
                if not layer.lora_B[name].weight.any():
                    dora.weight.data = norm.clone()

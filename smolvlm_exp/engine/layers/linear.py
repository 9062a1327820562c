"""Linear layers that read the same input (q, k, v; gate, up), with their LoRA or DoRA, as one matrix product.

The frozen weights lie under one another, W = [W1; W2; ...], and so do the adapters' A; their B stand in blocks. With
4-bit weights, unpacked into a buffer that all layers share, [x | x A^T] [W | s B]^T is every layer's result in one
product, and [du | du s B] [W; A] the input's gradient with the adapters' share in it. DoRA's gains are not applied here
but by whatever reads the result (ops.py): they cost no pass of their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from smolvlm_exp.engine.layers.dora import ParameterVersion, exact_dora, squared_norm
from smolvlm_exp.engine.layers.quantized_weights import frozen_weight, is_4bit, is_8bit, product_f32, unpack_4bit

ALIGNED = 8  # columns: rows of a product then start on 16 bytes in bfloat16
_workspaces: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def workspace(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """(rows, columns) of the one buffer into which weights are unpacked; valid until the next call."""
    key = (like.device, like.dtype)
    held = _workspaces.get(key)
    if held is None or held.numel() < rows * columns:
        held = _workspaces[key] = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
    return held[: rows * columns].view(rows, columns)


@dataclass
class Adapter:
    """One layer's active adapter."""

    name: str
    a: torch.Tensor  # (r, in)
    b: torch.Tensor  # (out, r)
    magnitude: torch.Tensor | None  # (out,), DoRA's
    scaling: float

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [p for p in (self.a, self.b, self.magnitude) if p is not None]


@dataclass
class Adapters:
    """What the active adapters of several layers come to in one product."""

    of_layer: list[Adapter | None]
    a: torch.Tensor  # (R, in): the layers' A under one another, then zeros up to a multiple of ALIGNED
    b: torch.Tensor  # (N, R): s B in blocks
    scaling: torch.Tensor | None = None  # (R,) s of each column; None where all are 1
    gain: torch.Tensor | None = None  # (N,) float32: magnitude / norm, 1 where there is no DoRA; None without any
    norm: torch.Tensor | None = None  # (N,) float32

    @property
    def tail(self) -> int:
        """R, the columns that they add to a product."""
        return self.a.shape[0]

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [p for adapter in self.of_layer if adapter for p in adapter.parameters]


class Product:
    """Frozen linear layers over one input, with their adapters.

    `use` says once a pass which adapters are active; the other methods are given what it returned.
    """

    def __init__(self, *layers: nn.Module) -> None:
        self.layers = layers
        self.bases: list[Any] = [base_of(layer) for layer in layers]
        self.rows: list[slice] = []  # each layer's share of the N columns of the result
        start = 0
        for base in self.bases:
            self.rows.append(slice(start, start + base.out_features))
            start += base.out_features
        self.width = start
        self.packed = all(is_4bit(base) for base in self.bases)
        self.used: tuple[Any, Adapters | None] = (None, None)
        self.joined: tuple[Any, torch.Tensor | None] = (None, None)  # the biases end to end

    @property
    def bias(self) -> torch.Tensor | None:
        """(N,) the layers' frozen biases, added after the gains."""
        biases = [base.bias for base in self.bases]
        if biases[0] is None or len(biases) == 1:
            return biases[0]
        now = ParameterVersion.now(*biases)
        if self.joined[0] != now:
            self.joined = (now, torch.cat(biases))
        return self.joined[1]

    def use(self, dtype: torch.dtype) -> Adapters | None:
        """The adapters that are active now; None where none is."""
        active = [active_adapter(layer) for layer in self.layers]
        parameters = [p for adapter in active if adapter for p in adapter.parameters]
        key = (dtype, *ParameterVersion.now(*parameters))
        if self.used[0] != key:
            self.used = (key, self.put_together(active, dtype) if parameters else None)
        return self.used[1]

    @torch.no_grad()
    def put_together(self, active: list[Adapter | None], dtype: torch.dtype) -> Adapters:
        used = next(filter(None, active))
        parts = [adapter or absent(base, used.a) for adapter, base in zip(active, self.bases, strict=True)]
        scaling = [s for part in parts for s in [part.scaling] * part.a.shape[0]]
        spare = -len(scaling) % ALIGNED
        a = torch.cat([*(part.a for part in parts), used.a.new_zeros(spare, used.a.shape[1])])
        b = torch.block_diag(*(part.scaling * part.b for part in parts), used.b.new_zeros(0, spare))
        adapters = Adapters(active, a.to(dtype), b.to(dtype))
        if any(s != 1 for s in scaling):
            adapters.scaling = torch.tensor([*scaling, *[1.0] * spare]).to(a.device, non_blocking=True)
        if used.magnitude is not None:  # DoRA, and so are the others
            magnitudes: list[Any] = [part.magnitude for part in parts]
            squares = [
                exact_dora(layer, adapter.name).base_squares() if adapter else one
                for layer, adapter, one in zip(self.layers, active, magnitudes, strict=True)
            ]
            with torch.autocast(a.device.type, enabled=False):
                adapters.norm = squared_norm(torch.cat(squares), self.times(adapters.a), a.float(), b.float()).sqrt()
            adapters.gain = torch.cat(magnitudes) / adapters.norm
        return adapters

    def times(self, a: torch.Tensor) -> torch.Tensor:
        """W A^T (N, R), float32."""
        if self.packed:
            weight = workspace(self.width, a.shape[1], a)
            self.unpack_into(weight)
            return product_f32(weight, a.T)
        return torch.cat([product_f32(frozen_weight(base, a.dtype), a.T) for base in self.bases])

    def room(self, adapters: Adapters | None) -> int:
        """Columns that an input should have to spare, so that its product with A can stand beside it."""
        return adapters.tail if adapters and self.packed else 0

    def forward(
        self, x: torch.Tensor, adapters: Adapters | None, spare: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layers' results (T, N), without bias and before their gains, and x A^T (T, R) for `adapter_gradients`.

        Args:
            x: (T, in), or (T, in + room): then [x | x A^T] [W | s B]^T is one product.
            spare: columns to allocate beside the results.
        """
        columns = self.bases[0].in_features
        own = x[:, :columns] @ adapters.a.T if adapters else None
        result = x.new_empty(x.shape[0], self.width + spare)[:, : self.width]
        if not self.packed:
            for base, rows in zip(self.bases, self.rows, strict=True):
                result[:, rows] = plain_product(base, x)
        else:
            weight = workspace(self.width, x.shape[1], x)
            self.unpack_into(weight[:, :columns])
            if adapters and own is not None and x.shape[1] > columns:
                x[:, columns:] = own
                weight[:, columns:] = adapters.b
                return torch.mm(x, weight.T, out=result), own
            torch.mm(x, weight.T, out=result)
        if adapters and own is not None:
            result.addmm_(own, adapters.b.T)
        return result, own

    def unpack_into(self, weight: torch.Tensor) -> None:
        """Write [W1; W2; ...] of 4-bit layers into the first N rows."""
        for base, rows in zip(self.bases, self.rows, strict=True):
            unpack_4bit(base, weight[rows])

    def backward(self, du: torch.Tensor, adapters: Adapters | None) -> torch.Tensor:
        """The gradient for the input, (T, in).

        Args:
            du: (T, N + R), the result's gradient, gains applied; its last R columns are filled here.
        """
        self.fill(du, adapters)
        if self.packed:
            weight = workspace(du.shape[1], self.bases[0].in_features, du)
            if adapters:
                weight[self.width :] = adapters.a
            self.unpack_into(weight)
            return du @ weight
        dx = du[:, self.width :] @ adapters.a if adapters else None
        for base, rows in zip(self.bases, self.rows, strict=True):
            weight = frozen_weight(base, du.dtype)
            dx = du[:, rows] @ weight if dx is None else dx.addmm_(du[:, rows], weight)
        assert dx is not None
        return dx

    def fill(self, du: torch.Tensor, adapters: Adapters | None) -> None:
        """The gradient of x A^T, into the last R columns of `du`."""
        if adapters:
            torch.mm(du[:, : self.width], adapters.b, out=du[:, self.width :])

    def adapter_gradients(
        self,
        du: torch.Tensor,
        x: torch.Tensor | None,
        own: torch.Tensor | None,
        dgain: torch.Tensor | None,
        adapters: Adapters | None,
    ) -> list[torch.Tensor]:
        """Gradients for `adapters.parameters`, float32.

        Args:
            du: (T, N + R) as `backward` or `fill` left it; x: (T, in) the input.
            own: (T, R) x A^T, as `forward` gave it; dgain: (N,) as ops.py gives it.
        """
        if not adapters:
            return []
        assert x is not None
        assert own is not None
        da = product_f32(du[:, self.width :].T, x)
        db = product_f32(du[:, : self.width].T, own)
        if adapters.scaling is not None:
            db *= adapters.scaling
        dmagnitude = dgain / adapters.norm if dgain is not None and adapters.norm is not None else None
        grads, start = [], 0
        for adapter, rows in zip(adapters.of_layer, self.rows, strict=True):
            if adapter:
                rank = slice(start, start := start + adapter.a.shape[0])
                grads += [da[rank], db[rows, rank]]
                if adapter.magnitude is not None:
                    assert dmagnitude is not None
                    grads.append(dmagnitude[rows])
        return grads


def base_of(layer: nn.Module) -> nn.Module:
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def active_adapter(layer: Any) -> Adapter | None:
    """The adapter that `layer` would use if it were called now."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return None
    (name,) = names
    lora: Any = layer
    a, b, magnitudes = lora.lora_A[name].weight, lora.lora_B[name].weight, lora.lora_magnitude_vector
    return Adapter(name, a, b, magnitudes[name].weight if name in magnitudes else None, layer.scaling[name])


def absent(base: Any, like: torch.Tensor) -> Adapter:
    """For a layer that has none: nothing is added, and its gain is 1."""
    out = base.out_features
    return Adapter("", like.new_zeros(0, base.in_features), like.new_zeros(out, 0), like.new_ones(out), 1.0)


def linear_obstacles(layer: nn.Module) -> Iterator[str]:
    """What `Product` does not do, in words, for the linear layers in `layer`."""
    for name, module in layer.named_modules():
        if isinstance(module, LoraLayer):
            if module.merged:
                yield f"{name}'s adapter is merged into its weight"
            if any(isinstance(d, nn.Dropout) and d.p > 0 for d in module.lora_dropout.values()):
                yield f"{name}'s adapter has dropout"
            if any(module.lora_bias.values()):
                yield f"{name}'s adapter has a bias"
            if any(type(v).__name__ != "DoraLinearVariant" for v in module.lora_variant.values()):
                yield f"{name}'s adapter is neither LoRA nor DoRA"
            if len(module.active_adapters) > 1:
                yield f"{name} has {len(module.active_adapters)} active adapters"
        own = isinstance(module, nn.Linear) and ".lora_" not in f".{name}"
        if own and any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            yield f"{name} itself is trained"


def plain_product(base: Any, x: torch.Tensor) -> torch.Tensor:
    """x W^T of one frozen layer, without its bias; 8-bit layers quantise x too, as they always do."""
    if is_8bit(base):
        result = base(x)
        return result if base.bias is None else result - base.bias
    return x @ frozen_weight(base, x.dtype).T

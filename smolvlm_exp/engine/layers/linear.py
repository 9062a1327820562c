"""Linear layers that read the same input (q, k, v; gate, up), with their LoRA or DoRA, as one matrix product.

The frozen weights lie under one another, W = [W1; W2; ...], and so do the adapters' A; their B stand in blocks. With
4-bit weights, unpacked into a buffer that all layers share, [x | x A^T] [W | s B]^T is every layer's result in one
product, and [du | du s B] [W; A] the input's gradient with the adapters' share in it. DoRA's gains are not applied here
but by whatever reads the result (ops.py): they cost no pass of their own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from smolvlm_exp.engine.layers.dora import ParameterVersion, exact_dora, squared_norm, tensor_versions
from smolvlm_exp.engine.layers.quantized_weights import frozen_weight, is_4bit, is_8bit, product_f32, unpack_4bit
from smolvlm_exp.engine.memory.footprint import ALIGNED

KEPT = 2**20  # bytes of a product's weights that a CPU keeps unpacked: unpacking took a tenth of a small model's step

_workspaces: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def workspaces() -> list[torch.Tensor]:
    """Those that there are now."""
    return list(_workspaces.values())


def workspace(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """(rows, columns) of the one buffer into which weights are unpacked; valid until the next call."""
    key = (like.device, like.dtype)
    buffer = _workspaces.get(key)
    if buffer is None or buffer.numel() < rows * columns:
        buffer = _workspaces[key] = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
    return buffer[: rows * columns].view(rows, columns)


@dataclass
class Adapter:
    """One layer's active adapter; `absent` where it has none."""

    name: str
    a: torch.Tensor  # (r, in)
    b: torch.Tensor  # (out, r)
    scaling: float
    magnitude: torch.Tensor | None  # (out,), DoRA's

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [p for p in (self.a, self.b, self.magnitude) if p is not None]


class FrozenLinears:
    """The frozen layers of one product, and the `Product` that their active adapters make of them."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.bases: list[Any] = [base_of(layer) for layer in layers]
        ends = list(accumulate(base.out_features for base in self.bases))
        self.columns, self.width = self.bases[0].in_features, ends[-1]  # of the input; N of the result
        self.rows = [slice(end - base.out_features, end) for base, end in zip(self.bases, ends, strict=True)]
        self.packed = all(is_4bit(base) for base in self.bases)
        self.key: Any = None  # of `latest`
        self.latest: Product
        self.scalings: dict[Any, torch.Tensor] = {}
        self.kept_key: Any = None  # of `kept`
        self.kept: torch.Tensor

    def product(self, dtype: torch.dtype) -> "Product":
        """With the adapters that are active now."""
        adapters = [active_adapter(layer) for layer in self.layers]
        parameters = [p for adapter in adapters if adapter for p in adapter.parameters]
        key = (dtype, *ParameterVersion.now(*self.biases, *parameters))
        if self.key != key:
            self.key, self.latest = key, self.put_together(adapters, dtype)
        return self.latest

    @property
    def biases(self) -> list[torch.Tensor]:
        return [base.bias for base in self.bases if base.bias is not None]

    @torch.no_grad()
    def put_together(self, active: list[Adapter | None], dtype: torch.dtype) -> "Product":
        biases = self.biases
        adapters = [adapter or absent(base) for adapter, base in zip(active, self.bases, strict=True)]
        scaling = [s for adapter in adapters for s in [adapter.scaling] * len(adapter.a)]
        spare = -len(scaling) % ALIGNED
        a = torch.cat([*(adapter.a for adapter in adapters), adapters[0].a.new_zeros(spare, self.columns)])
        b = torch.block_diag(*(adapter.scaling * adapter.b for adapter in adapters), a.new_zeros(0, spare))
        product = Product(self, adapters, a.to(dtype), b.to(dtype), torch.cat(biases) if biases else None)
        if any(s != 1 for s in scaling):
            product.scaling = self.on_device((*scaling, *[1.0] * spare), a.device)
        if any(adapter and adapter.magnitude is not None for adapter in active):  # DoRA, and so are the others
            magnitudes: list[Any] = [adapter.magnitude for adapter in adapters]
            squares = [
                exact_dora(layer, adapter.name).base_squares() if adapter.name else one
                for layer, adapter, one in zip(self.layers, adapters, magnitudes, strict=True)
            ]
            with torch.autocast(a.device.type, enabled=False):
                weight_a = self.times(product.a)
                product.norm = squared_norm(torch.cat(squares), weight_a, a.float(), b.float()).sqrt()
            product.gain = torch.cat(magnitudes) / product.norm
        return product

    def on_device(self, scaling: tuple[float, ...], device: torch.device) -> torch.Tensor:
        """Copied once: a CUDA graph has no host to copy from."""
        if scaling not in self.scalings:
            self.scalings[scaling] = torch.tensor(scaling).to(device, non_blocking=True)
        return self.scalings[scaling]

    def times(self, a: torch.Tensor) -> torch.Tensor:
        """W A^T (N, R), float32."""
        if self.packed:
            weight = workspace(self.width, self.columns, a)
            self.unpack_into(weight)
            return product_f32(weight, a.T)
        return torch.cat([product_f32(frozen_weight(base, a.dtype), a.T) for base in self.bases])

    def unpack_into(self, weight: torch.Tensor) -> None:
        """Write [W1; W2; ...] of 4-bit layers into the first N rows."""
        if weight.device.type == "cpu" and self.width * self.columns * weight.element_size() <= KEPT:
            weight[: self.width] = self.unpacked(weight.dtype)
            return
        for base, rows in zip(self.bases, self.rows, strict=True):
            unpack_4bit(base, weight[rows])

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """[W1; W2; ...] (N, in), worked out anew when one of them has changed."""
        key = (dtype, *tensor_versions(*(base.weight for base in self.bases)))
        if self.kept_key != key:
            self.kept_key, self.kept = key, torch.cat([frozen_weight(base, dtype) for base in self.bases])
        return self.kept


@dataclass
class Product:
    """`frozen` in one forward and backward pass, with the adapters that were active when it began."""

    frozen: FrozenLinears
    adapters: list[Adapter]
    a: torch.Tensor  # (R, in): the layers' A under one another, then zeros up to a multiple of ALIGNED
    b: torch.Tensor  # (N, R): s B in blocks
    bias: torch.Tensor | None  # (N,) the layers' frozen biases, added after the gains
    scaling: torch.Tensor | None = None  # (R,) s of each column; None where all are 1
    gain: torch.Tensor | None = None  # (N,) float32: magnitude / norm, 1 where there is no DoRA; None without any
    norm: torch.Tensor | None = None  # (N,) float32

    @property
    def tail(self) -> int:
        """R, the columns that the adapters add."""
        return len(self.a)

    @property
    def room(self) -> int:
        """Columns that an input should have to spare, so that its product with A can stand next to it."""
        return self.tail if self.frozen.packed else 0

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [p for adapter in self.adapters if adapter.name for p in adapter.parameters]

    def forward(self, x: torch.Tensor, spare: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layers' results (T, N), without bias and before their gains, and x A^T (T, R) for `adapter_gradients`.

        Args:
            x: (T, in), or (T, in + room): then [x | x A^T] [W | s B]^T is one product.
            spare: columns to allocate next to the results.
        """
        columns, width = self.frozen.columns, self.frozen.width
        low_rank = x[:, :columns] @ self.a.T if self.tail else None
        result = x.new_empty(len(x), width + spare)[:, :width]
        if not self.frozen.packed:
            for base, rows in zip(self.frozen.bases, self.frozen.rows, strict=True):
                result[:, rows] = plain_product(base, x)
        else:
            weight = workspace(width, x.shape[1], x)
            self.frozen.unpack_into(weight[:, :columns])
            if low_rank is not None and x.shape[1] > columns:
                x[:, columns:] = low_rank
                weight[:, columns:] = self.b
                return torch.mm(x, weight.T, out=result), low_rank
            torch.mm(x, weight.T, out=result)
        if low_rank is not None:
            result.addmm_(low_rank, self.b.T)
        return result, low_rank

    def backward(self, du: torch.Tensor) -> torch.Tensor:
        """The gradient for the input, (T, in).

        Args:
            du: (T, N + R), the result's gradient, gains applied; its last R columns are filled here.
        """
        self.fill(du)
        width = self.frozen.width
        if self.frozen.packed:
            weight = workspace(du.shape[1], self.frozen.columns, du)
            weight[width:] = self.a
            self.frozen.unpack_into(weight)
            return du @ weight
        dx = du[:, width:] @ self.a if self.tail else None
        for base, rows in zip(self.frozen.bases, self.frozen.rows, strict=True):
            weight = frozen_weight(base, du.dtype)
            dx = du[:, rows] @ weight if dx is None else dx.addmm_(du[:, rows], weight)
        assert dx is not None
        return dx

    def fill(self, du: torch.Tensor) -> None:
        """The gradient of x A^T, into the last R columns of `du`."""
        if self.tail:
            width = self.frozen.width
            torch.mm(du[:, :width], self.b, out=du[:, width:])

    def adapter_gradients(
        self, du: torch.Tensor, x: torch.Tensor | None, low_rank: torch.Tensor | None, dgain: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Gradients for `parameters`, float32.

        Args:
            du: (T, N + R) as `backward` or `fill` left it; x: (T, in) the input, needed only with adapters.
            low_rank: (T, R) x A^T, as `forward` gave it; dgain: (N,) as ops.py gives it.
        """
        if x is None or low_rank is None:
            return []
        width = self.frozen.width
        da, db = product_f32(du[:, width:].T, x), product_f32(du[:, :width].T, low_rank)
        if self.scaling is not None:
            db *= self.scaling
        dmagnitude = None if dgain is None or self.norm is None else dgain / self.norm
        grads, start = [], 0
        for adapter, rows in zip(self.adapters, self.frozen.rows, strict=True):
            rank = slice(start, start := start + len(adapter.a))
            if adapter.name:
                grads += [da[rank], db[rows, rank]]
                if dmagnitude is not None:
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
    return Adapter(name, a, b, layer.scaling[name], magnitudes[name].weight if name in magnitudes else None)


def absent(base: Any) -> Adapter:
    """For a layer that has none: nothing is added, and its gain is 1."""
    out, device = base.out_features, base.weight.device
    a, b = torch.zeros(0, base.in_features, device=device), torch.zeros(out, 0, device=device)
    return Adapter("", a, b, 1.0, torch.ones(out, device=device))


def adapter_obstacles(layer: nn.Module) -> Iterator[str]:
    """What `Product` does not do, in words, with the adapters in `layer`."""
    for name, module in layer.named_modules():
        if isinstance(module, LoraLayer):
            if any(module.lora_bias.values()):
                yield f"{name}'s adapter has a bias"
            if any(type(v).__name__ != "DoraLinearVariant" for v in module.lora_variant.values()):
                yield f"{name}'s adapter is neither LoRA nor DoRA"
            if len(module.active_adapters) > 1:
                yield f"{name} has {len(module.active_adapters)} active adapters"


def linear_obstacles(layer: nn.Module, trains: bool = True) -> Iterator[str]:
    """What `Product` does not do, in words, for the linear layers in `layer`; not `trains`: without gradients."""
    yield from adapter_obstacles(layer)
    if not trains:
        return
    for name, module in layer.named_modules():
        if isinstance(module, LoraLayer):
            if module.merged:
                yield f"{name}'s adapter is merged into its weight"
            if any(isinstance(d, nn.Dropout) and d.p > 0 for d in module.lora_dropout.values()):
                yield f"{name}'s adapter has dropout"
        is_base = isinstance(module, nn.Linear) and ".lora_" not in f".{name}"
        if is_base and any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            yield f"{name} itself is trained"


def plain_product(base: Any, x: torch.Tensor) -> torch.Tensor:
    """x W^T of one frozen layer, without its bias; 8-bit layers quantise x too, as they always do."""
    if is_8bit(base):
        result = base(x)
        return result if base.bias is None else result - base.bias
    return x @ frozen_weight(base, x.dtype).T

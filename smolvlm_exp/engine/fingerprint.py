"""What a model computes with, as one hash: two models with the same hash give the same numbers.

Every tensor is hashed on its own device, so that a model on a GPU is read at memory speed: 64-bit words are mixed with
their positions (MurmurHash3's finaliser) and summed, in integers: the same on every device, in any order.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from smolvlm_exp.engine.model_parts import base_of
from smolvlm_exp.utils.distributed import full_tensor

WORDS = 2**20  # 8-byte words under one sum
FACTORS = (0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64)  # MurmurHash3's, as signed numbers
IGNORED_KEYS = ("transformers_version", "architectures", "dtype", "use_cache")  # a config's keys that decide no number


def weights_key(model: nn.Module, adapter: str | None = None) -> str:
    """A hash of all that a model, or a part of one, computes with: parameters, buffers, dtypes, quantisation, config.

    The same on every device and in every process. All processes gather sharded weights together.

    Args:
        adapter: the one that counts; None for the model with its adapters off.
    """
    model = base_of(model)
    names, tensors = [], []
    for name, value in named_contents(model, adapter):
        if isinstance(value, torch.Tensor):
            names.append([name, str(value.dtype), list(value.shape)])
            tensors.append(value)
        else:
            names.append([name, str(value)])
    config: Any = getattr(model, "config", None)
    contents = [type(model).__name__, canonical_config(config.to_dict() if config else {}), names]
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode())
    digest.update(content_hash(tensors).numpy().tobytes())
    return digest.hexdigest()


def base_digests(model: nn.Module) -> dict[str, str]:
    """Hashes of a base's matrices, with or without an adapter on it: of its `linear` layers, and of the `rest`.

    They are taken in bfloat16, so that they are the same for a base that was loaded in float32. Linear layers that are
    quantised have none, nor has a model in float16.
    """
    base = base_of(model)
    modules = ((name, module) for name, module in base.named_modules() if isinstance(module, nn.Linear))
    linear = {f"{name.removesuffix('.base_layer')}.weight" for name, module in modules if ".lora_" not in name}
    digests: dict[str, Any] = {"linear": hashlib.sha256(), "rest": hashlib.sha256()}
    for name, value in named_contents(base, None):
        part = "linear" if name in linear else "rest"
        if name in linear and not value.is_floating_point():
            digests.pop(part, None)
        if not isinstance(value, torch.Tensor) or value.ndim < 2 or not value.is_floating_point():
            continue
        if value.dtype == torch.float16:
            return {}
        if part in digests:
            digests[part].update(f"{name} {tuple(value.shape)}".encode())
            digests[part].update(content_hash([value.detach().to(torch.bfloat16)]).numpy().tobytes())
    return {part: digest.hexdigest() for part, digest in digests.items()}


def named_contents(module: nn.Module, adapter: str | None, path: str = "") -> Iterator[tuple[str, Any]]:
    """(name, tensor or value) of everything in a module that takes part, named as if there were no adapters."""
    for name, tensor in chain(module._parameters.items(), module._buffers.items()):
        if tensor is not None:
            yield path + name, tensor
            yield from ((f"{path}{name}.{key}", value) for key, value in quantisation(tensor, module))
    adapted = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    scaling: Any = getattr(module, "scaling", {}) if adapted else {}
    if adapter in scaling:
        yield f"{path}scaling", scaling[adapter]
    child: Any
    for name, child in module._modules.items():
        if child is None:
            continue
        if adapted and hasattr(child, "keys"):  # a dictionary with one entry per adapter
            part = dict(child.items()).get(adapter)
            if isinstance(part, torch.Tensor):
                yield f"{path}{name}", part
            elif part is not None:
                yield from named_contents(part, adapter, f"{path}{name}.")
        else:
            inner = adapted and name in ("base_layer", "original_module")
            yield from named_contents(child, adapter, path if inner else f"{path}{name}.")


def quantisation(tensor: Any, module: Any) -> Iterator[tuple[str, Any]]:
    """What bitsandbytes stores with a quantised weight's codes."""
    state = getattr(tensor, "quant_state", None)
    if state is not None:  # 4 bits
        yield "how", (state.quant_type, state.blocksize, state.dtype, tuple(state.shape))
        yield from (("absmax", state.absmax), ("code", state.code))
        if state.nested:
            yield "nested", state.state2.blocksize
            yield from (("offset", state.offset), ("absmax2", state.state2.absmax), ("code2", state.state2.code))
    if hasattr(tensor, "SCB"):  # 8 bits; the first forward moves it from the weight to the layer
        yield "scales", tensor.SCB if tensor.SCB is not None else module.state.SCB


@torch.no_grad()
def content_hash(tensors: list[Any]) -> torch.Tensor:
    """One int64 per `WORDS` words of the tensors' bytes, on the CPU.

    Small tensors are concatenated first: one by one they would take a dozen kernel launches each.
    """
    hashes: list[torch.Tensor] = []
    waiting: list[torch.Tensor] = []
    size = 0  # of `waiting`, in words
    for tensor in tensors:
        words = words_of(tensor)
        waiting.append(words.to(waiting[0].device) if waiting else words)
        size += len(words)
        if size >= 8 * WORDS:
            hashes.append(sums(waiting))
            waiting, size = [], 0
    if waiting:
        hashes.append(sums(waiting))
    return torch.cat([torch.empty(0, dtype=torch.int64), *hashes])


def words_of(tensor: Any) -> torch.Tensor:
    """A tensor's bytes as int64, padded with zeros."""
    data = full_tensor(tensor).detach().reshape(-1).contiguous().view(torch.uint8)
    if len(data) % 8 or data.storage_offset() % 8:
        data = F.pad(data, (0, -len(data) % 8)).clone()
    return data.view(torch.int64)


def sums(parts: list[torch.Tensor]) -> torch.Tensor:
    """One int64 per `WORDS` words of the concatenated parts, on the CPU."""
    words = torch.cat(parts) if len(parts) > 1 else parts[0]
    return torch.stack([mixed(words[i : i + WORDS]) for i in range(0, max(len(words), 1), WORDS)]).cpu()


def mixed(words: torch.Tensor) -> torch.Tensor:
    """sum_i mix(words_i + places_i) modulo 2^64, 0-dim: one changed bit, or two words swapped, change it."""
    x = words + places(words.device)[: len(words)]
    for factor in FACTORS:
        x.bitwise_xor_((x >> 33).bitwise_and_(0x7FFFFFFF)).mul_(factor)
    return x.bitwise_xor_((x >> 33).bitwise_and_(0x7FFFFFFF)).sum()


@cache
def places(device: torch.device) -> torch.Tensor:
    """(WORDS,) a number per position, far from those of its neighbours (SplitMix64's steps)."""
    return torch.arange(1, WORDS + 1, device=device).mul_(0x9E3779B97F4A7C15 - 2**64)


def canonical_config(value: Any) -> Any:
    """A config as JSON, without what decides no number: folder names, versions, ids of stop tokens."""
    if isinstance(value, dict):
        items = ((str(key), item) for key, item in value.items())
        return {
            key: canonical_config(item)
            for key, item in items
            if key not in IGNORED_KEYS and not key.startswith("_") and not key.endswith("_token_id")
        }
    if isinstance(value, list | tuple):
        return [canonical_config(item) for item in value]
    return value if isinstance(value, str | int | float | None) else str(value)

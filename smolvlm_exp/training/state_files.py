"""State of optimizers, schedules and random generators as one safetensors file: tensors, and JSON for the rest.

Reading one runs no code; types and numbers come back exactly.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

KEY = "tree"  # in the file's metadata


def save_state(path: Path, tree: Any) -> None:
    """
    Args:
        tree: dictionaries, lists, tuples, strings, numbers, booleans, None, tensors and NumPy arrays.

    Raises:
        TypeError: it holds something else.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(tree, tensors))
    save_file(tensors, path, metadata={KEY: text})


def load_state(path: Path) -> Any:
    """What `save_state` wrote, on the CPU."""
    with safe_open(path, framework="pt") as file:
        # Copies: what stays mapped is lost, and the process with it, when somebody cuts the file.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dictionary
        return decode(json.loads(file.metadata()[KEY]), tensors)


def encode(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The tree as JSON; its tensors go to `tensors`, by number."""
    if isinstance(tree, dict):
        return {"dict": [[encode(key, tensors), encode(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return {type(tree).__name__: [encode(item, tensors) for item in tree]}
    if isinstance(tree, torch.Tensor | np.ndarray):
        kind, tensor = ("tensor", tree) if isinstance(tree, torch.Tensor) else ("array", torch.from_numpy(tree))
        name = str(len(tensors))
        tensors[name] = tensor.detach().cpu().clone().contiguous()  # safetensors takes no shared memory
        return {kind: name}
    if tree is None or isinstance(tree, str | int | float):
        return tree
    raise TypeError(f"a checkpoint cannot hold {type(tree).__name__}")


def decode(encoded: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `encode`."""
    if not isinstance(encoded, dict):
        return encoded
    ((kind, content),) = encoded.items()
    if kind == "dict":
        return {decode(key, tensors): decode(value, tensors) for key, value in content}
    if kind in ("tensor", "array"):
        return tensors[content] if kind == "tensor" else tensors[content].numpy()
    items = (decode(item, tensors) for item in content)
    return list(items) if kind == "list" else tuple(items)

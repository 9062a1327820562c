"""What optimizers, schedules and random generators hold, as one safetensors file: tensors, and JSON for all the rest.

Reading one runs no code, and what was written comes back as it was: its types, every bit of its numbers.
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
    told = json.dumps(encode(tree, tensors))
    save_file(tensors, path, metadata={KEY: told})


def load_state(path: Path) -> Any:
    """What `save_tree` wrote, its tensors on the CPU."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
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
        tensors[name] = tensor.detach().cpu().clone().contiguous()  # one's own memory: safetensors shares none
        return {kind: name}
    if tree is None or isinstance(tree, str | int | float):
        return tree
    raise TypeError(f"a checkpoint cannot hold {type(tree).__name__}")


def decode(told: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Undoes `packed`."""
    if not isinstance(told, dict):
        return told
    ((kind, content),) = told.items()
    if kind == "dict":
        return {decode(key, tensors): decode(value, tensors) for key, value in content}
    if kind in ("tensor", "array"):
        return tensors[content] if kind == "tensor" else tensors[content].numpy()
    items = (decode(item, tensors) for item in content)
    return list(items) if kind == "list" else tuple(items)

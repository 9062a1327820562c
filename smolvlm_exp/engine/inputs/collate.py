"""Batches of pairs on their way: from row numbers to a device, into parts of a batch and together again."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
import torch.nn.functional as F

Batch = dict[str, Any]  # packing.collate's


def index_dataset(rows: int) -> datasets.Dataset:
    """What transformers and TRL take for the data: row numbers, and a column that says there are images."""
    return datasets.Dataset.from_dict({"row": range(rows), "images": [[]] * rows})


def to_device(value: Any, device: torch.device) -> Any:
    """Without waiting for the copies, where the memory is pinned."""
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def slice_pairs(tensors: Mapping[str, Any], part: slice, pairs: int) -> Any:
    """Some pairs of a batch's tensors, each (pairs, ...), or (2 pairs, ...) with the chosen answers first."""
    if part == slice(0, pairs):
        return tensors
    cut = {name: value.unflatten(0, (-1, pairs))[:, part].flatten(0, 1) for name, value in tensors.items()}
    return type(tensors)(**cut)


def concat_pairs(parts: Sequence[Mapping[str, Any]], pairs: Sequence[int]) -> Any:
    """Batches' tensors together, padded on the right to one length: undoes `slice_pairs`.

    Args:
        pairs: how many each has.
    """
    if len(parts) == 1:
        return parts[0]
    together = {}
    for name in parts[0]:
        sides = [part[name].unflatten(0, (-1, count)) for part, count in zip(parts, pairs, strict=True)]
        if sides[0].dim() == 3:  # (sides, pairs, length)
            longest = max(side.shape[2] for side in sides)
            fill = -100 if name == "labels" else 0
            sides = [F.pad(side, (0, longest - side.shape[2]), value=fill) for side in sides]
        together[name] = torch.cat(sides, 1).flatten(0, 1)
    return type(parts[0])(**together)

"""TRL's loss code reads a dozen numbers off the device for its metrics, and each read waits for the device.

Under `DeferredMetrics` they stay there as 0-dim tensors, and `flush_metrics` reads them when they are logged. The loss
is unchanged.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class DeferredMetrics(TorchFunctionMode):
    """Within it `.item()` gives the tensor itself, `if tensor:` is true, and `tensor[mask]` has a sum and a mean.

    TRL's only `if` on a tensor is whether there are tokens to divide by. There are: packing.pack refuses empty answers.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.item:
            return args[0].detach()
        if func is torch.Tensor.__bool__:
            return True
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].dtype is torch.bool:
            return MaskedValues(*args)
        return func(*args, **(kwargs or {}))


class MaskedValues:
    """The elements of `values` where `mask` is true; only the device knows how many."""

    def __init__(self, values: torch.Tensor, mask: torch.Tensor) -> None:
        self.values, self.mask = values, mask

    def sum(self) -> torch.Tensor:
        return (self.values * self.mask).sum()

    def mean(self) -> torch.Tensor:
        return self.sum() / self.mask.sum()


def flush_metrics(metrics: dict[str, list[Any]], shares: Sequence[float]) -> None:
    """Replace tensors by numbers, and several by their weighted mean.

    Args:
        metrics: TRL's, name -> one value per call of its loss code; a running total has a single value.
        shares: how much each call counts.
    """
    for name, values in metrics.items():
        numbers = torch.stack([torch.as_tensor(value) for value in values]).tolist()
        if len(numbers) == len(shares):
            numbers = [sum(n * share for n, share in zip(numbers, shares, strict=True)) / sum(shares)]
        metrics[name] = numbers

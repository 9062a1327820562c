"""The parts of a combined loss, each in a metric of its own: `loss/dpo` and `loss/sft` of trainer=rpo.

TRL multiplies each part by its weight and adds it to the sum, and keeps no part. A weight that notes what it is
multiplied with leaves its code as it is.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAMES = {"sigmoid": "dpo"}  # where TRL's name of a loss is not the field's


class NotingWeight:
    """A factor that calls `note` with the tensor that it is multiplied with."""

    def __init__(self, value: float, note: Callable[["torch.Tensor"], None]) -> None:
        self.value, self.note = value, note

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        part, weight = args
        weight.note(part.detach())
        return func(part, weight.value)


def log_loss_parts(trainer: Any, deferred: bool) -> None:
    """Put a trainer's parts among its metrics, unweighted, where its loss has several.

    Args:
        deferred: the trainer reads its metrics off the device when they are logged.
    """
    if len(trainer.loss_types) < 2:
        return

    def noting(name: str) -> Callable[["torch.Tensor"], None]:
        def note(part: "torch.Tensor") -> None:
            mean = trainer.accelerator.gather(part).mean()
            mode = "train" if trainer.model.training else "eval"
            trainer._metrics[mode][f"loss/{NAMES.get(name, name)}"].append(mean if deferred else mean.item())

        return note

    pairs = zip(trainer.loss_weights, trainer.loss_types, strict=True)
    trainer.loss_weights = [NotingWeight(weight, noting(name)) for weight, name in pairs]

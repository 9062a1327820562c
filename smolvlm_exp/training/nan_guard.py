"""A loss or gradient that is no number never reaches weights or optimizer state; several in a row end the run.

The judgement stays on the device: torch's fused Adam leaves everything as it is where `found_inf` says so, and the
verdict comes back to the host beside the work, read when it has arrived. Other optimizers on a GPU wait for it.
"""

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from smolvlm_exp.utils.errors import RunError

log = logging.getLogger(__name__)


NAMED = 16  # rows that a message names


class NanGuard:
    """Judges every optimiser step before it is taken.

    Attributes:
        left_out: steps whose update was left out, in order.
    """

    def __init__(self, limit: int, rows_of: Callable[[int], list[int]]) -> None:
        """
        Args:
            limit: steps in a row that end the run.
            rows_of: the row numbers of a step, which counts from 1.
        """
        self.limit, self.rows_of = limit, rows_of
        self.left_out: list[int] = []
        self.waiting: deque[tuple[int, torch.Tensor, Any]] = deque()  # step, its verdict on the host, when it is there

    def mask_update(self, step: int, finite: torch.Tensor, model: nn.Module, optimizer: Any) -> None:
        """Before `optimizer.step()`: let it do nothing where `finite` is false.

        Args:
            finite: 0-dim bool on the model's device.
        """
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if finite.is_cuda and all(group.get("fused") for group in inner.param_groups):
            inner.found_inf = (~finite).float()
        elif not finite:
            model.zero_grad(set_to_none=True)  # a parameter without a gradient is passed over, its state too
        arrived = None
        if finite.is_cuda:
            finite = finite.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.waiting.append((step, finite, arrived))
        self.poll(wait=False)

    def poll(self, wait: bool) -> None:
        """Tell of the steps whose verdicts have arrived.

        Args:
            wait: for all of them.

        Raises:
            RunError: `limit` steps in a row were left out.
        """
        while self.waiting and (wait or self.waiting[0][2] is None or self.waiting[0][2].query()):
            step, finite, arrived = self.waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            if finite:
                continue
            self.left_out.append(step)
            log.warning(f"step {step}: its loss or gradient is not finite, so it changes nothing; {self.rows(step)}")
            last = self.left_out[-self.limit :]
            if len(last) == self.limit and last[0] == step - self.limit + 1:
                self.stop(last)

    def rows(self, step: int) -> str:
        rows = sorted(self.rows_of(step))
        more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
        return f"train rows {', '.join(map(str, rows[:NAMED]))}{more}"

    def stop(self, steps: list[int]) -> None:
        raise RunError(
            f"steps {steps[0]} to {steps[-1]}, {len(steps)} in a row, had a loss or gradient that is not finite: the "
            f"run is stopped.\nStep {steps[-1]}: {self.rows(steps[-1])}. The weights are as after step "
            f"{steps[0] - 1}, and every checkpoint is from before.\n"
            "Look at these rows; a lower trainer.learning_rate, a longer trainer.warmup_steps or model.dtype=float32 "
            "help where the rows are fine. trainer.not_finite_limit says how many in a row are borne."
        )

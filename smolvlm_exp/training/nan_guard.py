"""A loss or gradient that is not finite never reaches weights or optimizer state; several in a row end the run.

The decision stays on the device: torch's fused Adam skips its update where `found_inf` is set, and the flag is copied
to the host asynchronously. Other optimizers on a GPU wait for it.
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
    """Checks every optimizer step before it is taken."""

    def __init__(self, limit: int, rows_of: Callable[[int], list[int]]) -> None:
        """`limit` steps in a row end the run; `rows_of` a step, which counts from 1, are its row numbers."""
        self.limit, self.rows_of = limit, rows_of
        self.skipped: list[int] = []  # steps whose update was skipped, in order
        self.pending: deque[tuple[int, torch.Tensor, Any]] = deque()  # step, its flag on the host, when it is there

    def mask_update(self, step: int, finite: torch.Tensor, model: nn.Module, optimizer: Any) -> None:
        """Before `optimizer.step()`: make it skip its update where `finite` is false.

        Args:
            finite: 0-dim bool on the model's device.
        """
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if finite.is_cuda and all(group.get("fused") for group in inner.param_groups):
            inner.found_inf = (~finite).float()
        elif not finite:
            model.zero_grad(set_to_none=True)  # a parameter without a gradient is skipped, its state too
        arrived = None
        if finite.is_cuda:
            finite = finite.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.pending.append((step, finite, arrived))
        self.poll(wait=False)

    def poll(self, wait: bool) -> None:
        """Report the steps whose flags have arrived, or wait for all of them.

        Raises:
            RunError: `limit` steps in a row were skipped.
        """
        while self.pending and (wait or self.pending[0][2] is None or self.pending[0][2].query()):
            step, finite, arrived = self.pending.popleft()
            if arrived is not None:
                arrived.synchronize()
            if finite:
                continue
            self.skipped.append(step)
            log.warning(f"step {step}: loss or gradient is not finite, update skipped; {self.rows(step)}")
            last = self.skipped[-self.limit :]
            if len(last) == self.limit and last[0] == step - self.limit + 1:
                raise RunError(
                    f"stopped: loss or gradient not finite in {len(last)} steps in a row ({last[0]} to {step}).\n"
                    f"Step {step}: {self.rows(step)}. The weights are those after step {last[0] - 1}, and every "
                    "checkpoint is from before.\n"
                    "Check these rows. If they are fine, try a lower trainer.learning_rate, a longer "
                    "trainer.warmup_steps or model.dtype=float32; trainer.not_finite_limit sets how many such steps in "
                    "a row are tolerated."
                )

    def rows(self, step: int) -> str:
        rows = sorted(set(self.rows_of(step)))  # a row with several answers is there several times
        more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
        return f"train rows {', '.join(map(str, rows[:NAMED]))}{more}"

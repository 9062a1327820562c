"""The checkpoint of the best evaluation on held-out rows, and training that stops where there is none any more."""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger(__name__)


class BestCheckpoint(TrainerCallback):
    """Saves at every evaluation that is the best so far; stops after `patience` in a row that are not (None: never).

    transformers' EarlyStoppingCallback counts in memory, so that a resumed run would begin to count again.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """A run that was killed after it had stopped takes no further step."""
        return self.stopped(args, state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if args.load_best_model_at_end and self.since(args, state) == 0:
            control.should_save = True
        return self.stopped(args, state, control)

    def stopped(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> TrainerControl:
        since = self.since(args, state)
        if self.patience is not None and since >= self.patience:
            metric = args.metric_for_best_model
            log.info(f"stopping at step {state.global_step}: {since} evaluations without a better eval_{metric}")
            control.should_training_stop = True
        return control

    @staticmethod
    def since(args: TrainingArguments, state: TrainerState) -> int:
        """How many evaluations during training followed the best one."""
        metric = f"eval_{args.metric_for_best_model}"
        values = [event[metric] for event in state.log_history if metric in event and event["step"]]
        return since_best(values, bool(args.greater_is_better))


def since_best(values: Sequence[float], greater_is_better: bool) -> int:
    """How many values follow the first of the best ones; all of them where none is a number."""
    sign = -1 if greater_is_better else 1
    best, since = float("inf"), 0
    for value in values:
        since += 1
        if sign * value < best:  # never of nan
            best, since = sign * value, 0
    return since

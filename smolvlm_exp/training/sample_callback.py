"""Sample answers during training: the first held-out rows, answered every trainer.sample_steps steps."""

import math
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState

from smolvlm_exp.evaluation.generate import generate_answers
from smolvlm_exp.runs.event_log import append_event, truncate_after
from smolvlm_exp.training.callbacks import MetricsCallback

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from smolvlm_exp.data.preferences import Preferences

ROWS = 4  # held-out rows
MAX_TOKENS = 128  # of an answer: training waits
FILE = "samples.jsonl"  # in the run folder: {"step": 20, "answers": [...]} a line


class SamplesCallback(TrainerCallback):
    """To `samples.jsonl` and the tracker; random state and the model's modes are left as they were."""

    def __init__(
        self,
        every: float,
        processor: "ProcessorMixin",
        preferences: "Preferences",
        start: list[str],
        metrics: MetricsCallback,
    ) -> None:
        """Every so many steps (below 1: a fraction of all; 0: never); `start` are the answers before the first."""
        self.every, self.processor, self.metrics = every, processor, metrics
        self.rows = [preferences.test[i] for i in range(min(ROWS, len(preferences.test)))] if every else []
        self.start, self.path = start, metrics.path.with_name(FILE)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        truncate_after(self.path, state.global_step)
        if self.rows and state.global_step == 0:
            self.record(state, self.start[: len(self.rows)])

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        steps = math.ceil(self.every * state.max_steps) if self.every < 1 else int(self.every)
        if not self.rows or state.global_step % steps:
            return
        model = kwargs["model"]
        modes = [(module, module.training) for module in model.modules()]
        answers = generate_answers(model, self.processor, self.rows, len(self.rows), MAX_TOKENS)
        for module, training in modes:
            module.training = training
        self.record(state, answers)
        self.metrics.exclude_time()

    def record(self, state: TrainerState, answers: list[str]) -> None:
        append_event(self.path, {"step": state.global_step, "answers": answers})
        self.metrics.tracker.show_samples(self.rows, answers, state.global_step)

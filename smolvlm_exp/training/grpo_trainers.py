"""GRPO's trainers, on the engine or stock: checkpoints from which sampling goes on, a log of what was sampled."""

from pathlib import Path
from typing import Any

import torch
from trl import GRPOTrainer

from smolvlm_exp.data.messages import text_of
from smolvlm_exp.engine.grpo_trainer import SharedPrefixGRPOTrainer
from smolvlm_exp.reporting.sampled_answers import COMPLETIONS
from smolvlm_exp.rewards.completions import texts
from smolvlm_exp.runs.checkpoint import disk_error_as_run_error
from smolvlm_exp.runs.event_log import append_event
from smolvlm_exp.training.trainers import CheckpointMixin, on_device

COLUMNS = ["prompt", "truth"]  # of a row, that reward functions are given
ON_CPU = ("rows", "generation")  # of answers
ENTROPY = ("entropy_coef", "_last_world_entropy")  # what TRL adapts the bonus by, on the stock engine


class GRPOMixin(CheckpointMixin):
    """Comes first among a trainer's bases.

    Its checkpoints hold how often the trainer was called, which is all that answers' seeds depend on, and the answers
    that further steps will use. Every logged step adds the group of answers with the most different rewards to
    `completions.jsonl`, where any were sampled since the last one.
    """

    _step: int  # TRL's
    _buffered_inputs: Any
    num_iterations: int
    reward_func_names: list[str]
    reward_weights: torch.Tensor

    def __init__(self, model: Any, **kwargs: Any) -> None:
        """As CheckpointMixin."""
        self.group: dict[str, Any] | None = None  # of this generation, for the log
        super().__init__(model, **kwargs)

    def sampling_state(self) -> dict[str, Any]:
        again = self._step % (self.args.steps_per_generation * self.num_iterations)  # type: ignore[attr-defined]
        answers = self._buffered_inputs if again else None
        entropy = {name: getattr(self, name, None) for name in ENTROPY}
        return {"calls": self._step, "answers": answers, "group": self.group, "entropy": entropy}

    def load_sampling_state(self, counters: dict[str, Any]) -> None:
        self._step, units, self.group = counters["calls"], counters["answers"], counters["group"]
        vars(self).update(counters["entropy"])
        self._buffered_inputs = units and [
            {name: value if name in ON_CPU else on_device(value, self.args.device) for name, value in unit.items()}
            for unit in units
        ]

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        """(answers of all processes, rewards), nan where a reward says nothing; TRL's."""
        rewards = super()._calculate_rewards(  # type: ignore[misc]
            inputs, prompts, completions, completion_ids_list
        )
        if self.model.training and self.args.process_index == 0:  # type: ignore[union-attr]
            own, size = rewards[: len(inputs)].cpu(), self.args.num_generations  # type: ignore[attr-defined]
            totals = (own * self.reward_weights).nansum(1)
            spread = totals.view(-1, size).std(1)
            first = int(spread.argmax()) * size
            places = range(first, first + size)
            self.group = {
                "row": inputs[first]["row"],
                "question": text_of(prompts[first]),
                "answers": [
                    {"text": text, "reward": totals[i].item(), "rewards": self.named(own[i])}
                    for i, text in zip(places, texts([completions[i] for i in places]), strict=True)
                ],
            }
        return rewards

    def named(self, rewards: torch.Tensor) -> dict[str, float]:
        """An answer's rewards by name, without those that say nothing."""
        values = zip(self.reward_func_names, rewards.tolist(), strict=True)
        return {name: value for name, value in values if value == value}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.group and "loss" in logs:
            path = Path(self.args.output_dir or "").with_name(COMPLETIONS)
            with disk_error_as_run_error(path.parent):
                append_event(path, {"step": self.state.global_step, **self.group})
            self.group = None


class EngineGRPOTrainer(GRPOMixin, SharedPrefixGRPOTrainer):
    """trainer.engine=shared"""


class StockGRPOTrainer(GRPOMixin, GRPOTrainer):
    """trainer.engine=stock"""

    _signature_columns: Any

    def _set_signature_columns_if_needed(self) -> None:
        """With what rewards and the log need, which transformers would remove."""
        self._signature_columns = ["images", *COLUMNS, "row"]

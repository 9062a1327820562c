"""While a model learns from answers that it samples: signs that it does not learn what it should, as soon as they show.

What they are is in reporting/on_policy.py; `advise` says them again when the run has ended.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from smolvlm_exp.reporting.on_policy import on_policy_signs
from smolvlm_exp.reporting.sampled_answers import COMPLETIONS
from smolvlm_exp.runs.event_log import truncate_after
from smolvlm_exp.training.arguments import TrainerConfig

log = logging.getLogger(__name__)

NORMAL = (
    "GRPO: a loss of about 0 is normal, from the start on: a group's advantages sum to 0, and the ratios of new to old "
    "probabilities are 1 at first. Watch `reward`."
)


class OnPolicyCallback(TrainerCallback):
    """Warns of each sign once, and keeps completions.jsonl from holding a step twice."""

    def __init__(self, config: TrainerConfig, folder: Path) -> None:
        """`folder`: the run's."""
        self.settings, self.path = asdict(config), folder / COMPLETIONS
        self.warned: set[str] = set()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            truncate_after(self.path, state.global_step)
            log.info(NORMAL)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "reward" not in (logs or {}) or state.global_step >= state.max_steps:  # the last step's are in the advice
            return
        for sign, text in on_policy_signs(self.settings, state.log_history):
            if sign not in self.warned and state.is_world_process_zero:
                self.warned.add(sign)
                log.warning(f"step {state.global_step}: {text}")

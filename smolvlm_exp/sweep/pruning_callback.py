"""A trial's evaluations while it trains, reported to its study, which may end it."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from smolvlm_exp.sweep.optuna_study import open_storage, pruner, require_optuna
from smolvlm_exp.utils.errors import Pruned, RequestError
from smolvlm_exp.utils.files import read_json


def pruning_callbacks(folder: Path) -> list[TrainerCallback]:
    """The callback of a job that is a trial which may be pruned; none for any other job."""
    told = read_json(folder / "trial.json")
    return [PruningCallback(folder, told)] if told else []


class PruningCallback(TrainerCallback):
    """Reports `prune` at every evaluation; the median pruner decides."""

    def __init__(self, folder: Path, told: dict[str, Any]) -> None:
        require_optuna()
        import optuna

        self.key = told["prune"]
        storage = open_storage(folder.parent, told["storage"])
        judge = pruner(told["n_startup_trials"], told["n_warmup_steps"])
        study = optuna.load_study(study_name=told["study"], storage=storage, pruner=judge)
        better_when_less = "loss" in self.key
        self.sign = 1 if better_when_less == (study.direction.name == "MINIMIZE") else -1
        self.trial = optuna.trial.Trial(study, told["trial"])

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Raises:
        Pruned: the others were better at this step.
        """
        if self.key not in (metrics or {}):
            raise RequestError(f"hydra.sweeper.prune={self.key}: not evaluated. Known: {', '.join(metrics or {})}.")
        value = (metrics or {})[self.key]
        self.trial.report(self.sign * value, state.global_step)
        if state.global_step < state.max_steps and self.trial.should_prune():
            raise Pruned(f"{self.key} {value:.4f} at step {state.global_step} is below the other trials' median")

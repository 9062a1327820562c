"""Reports a trial's evaluations to its Optuna study while it trains, and ends the trial where the study says so."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from smolvlm_exp.sweep.optuna_study import open_storage, require_optuna
from smolvlm_exp.utils.errors import Pruned, RequestError
from smolvlm_exp.utils.files import read_json


def pruning_callbacks(folder: Path) -> list[TrainerCallback]:
    """The callback of a job that is a trial which may be pruned; none for any other job."""
    trial = read_json(folder / "trial.json")
    return [PruningCallback(folder, trial)] if trial else []


class PruningCallback(TrainerCallback):
    def __init__(self, folder: Path, saved: dict[str, Any]) -> None:
        require_optuna()
        import optuna

        self.key = saved["prune"]
        storage = open_storage(folder.parent, saved["storage"])
        pruner = optuna.pruners.MedianPruner(saved["n_startup_trials"], saved["n_warmup_steps"])
        study = optuna.load_study(study_name=saved["study"], storage=storage, pruner=pruner)
        less_is_better = "loss" in self.key
        self.sign = 1 if less_is_better == (study.direction.name == "MINIMIZE") else -1
        self.trial = optuna.trial.Trial(study, saved["trial"])

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Report the evaluation; raises `Pruned` where the other trials' median is better at this step."""
        if self.key not in metrics:
            raise RequestError(f"hydra.sweeper.prune={self.key}: not evaluated. Known: {', '.join(metrics)}.")
        value = metrics[self.key]
        self.trial.report(self.sign * value, state.global_step)
        if state.global_step < state.max_steps and self.trial.should_prune():
            raise Pruned(f"{self.key} {value:.4f} at step {state.global_step} is worse than the other trials' median")

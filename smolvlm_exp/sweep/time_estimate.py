"""How long a sweep's jobs will take, from finished runs of the same model, data and trainer."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from smolvlm_exp.config.schema import Config
from smolvlm_exp.runs.find import JOBS, PLACES, newest_first, saved_hydra, summary_of
from smolvlm_exp.utils.paths import relative_to_cwd

MAX_RUNS = 50  # earlier runs to search


def estimate_time(sweep: Path, left: Sequence[Config]) -> tuple[float, str] | None:
    """(seconds of the jobs that are left, one after the other; what the estimate is from); None where nothing is known.

    An earlier run gives its time outside training, and its speed for the pairs that a job trains on.
    """
    own = [summary["seconds"] for folder in sweep.glob("*/") if (summary := finished(folder))]
    if own:
        return median(own) * len(left), f"the {len(own)} that are done"
    total, source = 0.0, ""
    for config in left:
        run = next((run for run in earlier_runs() if same_workload(config, run)), None)
        if run is None:
            return None
        summary, source, trainer = summary_of(run), str(relative_to_cwd(run)), config.trainer
        if trainer.max_steps > 0:
            pairs = trainer.max_steps * trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
        else:
            pairs = trainer.num_train_epochs * summary["data"]["train"]["rows"]
        outside_training = summary["seconds"] - summary["train"]["seconds"]
        total += outside_training + pairs / summary["train"]["pairs_per_second"]
    return (total, f"{source}, the latest run of this model and data") if left else None


def finished(folder: Path) -> dict[str, Any]:
    """The summary of a run that is done and says how long it took; else nothing."""
    summary = summary_of(folder)
    return summary if summary.get("status") == "done" and "seconds" in summary else {}


@cache
def earlier_runs() -> list[Path]:
    """Finished runs whose time is known, the newest first."""
    newest = newest_first((*PLACES, JOBS), "summary.json")
    return [path.parent for path in newest[:MAX_RUNS] if finished(path.parent)]


@cache
def saved_config(run: Path) -> Any:
    return saved_hydra(run, "config")


def same_workload(config: Config, run: Path) -> bool:
    """The same model, data, algorithm and engine, whatever the adapter, learning rate and batch."""
    saved, trainer = saved_config(run), config.trainer
    if saved.get("model") != asdict(config.model) or saved.get("data") != asdict(config.data):
        return False
    return all(saved["trainer"].get(key) == getattr(trainer, key) for key in ("algorithm", "engine"))

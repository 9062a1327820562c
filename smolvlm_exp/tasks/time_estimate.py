"""How long a run, or a sweep's jobs, will take: from finished runs of the same model, data and trainer."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from smolvlm_exp.config.schema import Config
from smolvlm_exp.runs.find import JOBS, PLACES, newest_first, saved_hydra, summary_of
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.formatting import as_finite
from smolvlm_exp.utils.paths import relative_to_cwd

MAX_RUNS = 50  # earlier runs to search


def estimate_time(sweep: Path, left: Sequence[Config]) -> tuple[float, str] | None:
    """(seconds of the jobs that are left, one after the other; what the estimate is from); None where nothing is known.

    An earlier run gives its time outside training, and its speed for the pairs that a job trains on.
    """
    own = [summary["seconds"] for folder in sweep.glob("*/") if (summary := finished(folder))]
    if own:
        return median(own) * len(left), f"the {len(own)} that are done"
    folders = [path.parent for path in newest_first((*PLACES, JOBS), "summary.json")[:MAX_RUNS]]
    earlier = [(folder, summary, settings_of(folder)) for folder in folders if (summary := finished(folder))]
    total, source = 0.0, Path()
    for config in left:
        known = next(((run, summary) for run, summary, saved in earlier if same_workload(config, saved)), None)
        if known is None:
            return None
        source, summary = known
        trainer, train = config.trainer, summary["train"]
        if trainer.max_steps > 0:
            pairs = trainer.max_steps * trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
        else:
            pairs = trainer.num_train_epochs * summary.get("data", {}).get("train", {}).get("rows", 0)
        total += summary["seconds"] - train["seconds"] + pairs / train["pairs_per_second"]
    return total, f"{relative_to_cwd(source)}, the latest run of this model and data"


def finished(folder: Path) -> dict[str, Any]:
    """The summary of a run that is done and says how long all of it and its training took; else nothing."""
    summary = summary_of(folder)
    measured = summary.get("seconds"), *map(summary.get("train", {}).get, ("seconds", "pairs_per_second"))
    return summary if summary.get("status") == "done" and all(map(as_finite, measured)) else {}


def settings_of(folder: Path) -> dict[str, Any]:
    """Of an earlier run; nothing where they are damaged, which is no fault of the run that begins."""
    try:
        saved: dict[str, Any] = saved_hydra(folder, "config")
        return saved
    except RequestError:
        return {}


def same_workload(config: Config, saved: dict[str, Any]) -> bool:
    """The same model, data, algorithm and engine, whatever the adapter, learning rate and batch."""
    if saved.get("model") != asdict(config.model) or saved.get("data") != asdict(config.data):
        return False
    return all(saved.get("trainer", {}).get(key) == getattr(config.trainer, key) for key in ("algorithm", "engine"))

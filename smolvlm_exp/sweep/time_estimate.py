"""How long a sweep's jobs will take, from runs that were measured; where there are none, nothing is said."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from smolvlm_exp.config.schema import Config
from smolvlm_exp.runs.find import JOBS, PLACES, newest_first, summary_of
from smolvlm_exp.utils.paths import OUTPUTS, relative_to_cwd

LATEST = 50  # earlier runs that are looked at


def estimate_time(sweep: Path, left: Sequence[Config]) -> tuple[float, str] | None:
    """(seconds for the jobs that are left, one after the other; what that is drawn from), or None: nothing is known."""
    own = [seconds for folder in sweep.glob("*/") if (seconds := seconds_of(folder)) is not None]
    if own:
        return median(own) * len(left), f"the {len(own)} that are done"
    total, source = 0.0, None
    for config in left:
        run = next((run for run in earlier_runs() if same_workload(config, run)), None)
        if run is None:
            return None
        summary, source = summary_of(run), run
        around = summary["seconds"] - summary["train"]["seconds"]  # loading, evaluating, writing
        total += around + pair_count(config, summary) / summary["train"]["pairs_per_second"]
    return (total, f"{relative_to_cwd(source)}, the latest run of this model and data") if source else None


def seconds_of(folder: Path) -> float | None:
    """All that a finished run took."""
    summary = summary_of(folder)
    return summary.get("seconds") if summary.get("status") == "done" else None


@cache
def earlier_runs() -> list[Path]:
    """Finished runs whose time is known, the newest first."""
    newest = newest_first(OUTPUTS, "summary.json", places=(*PLACES, JOBS))
    return [path.parent for path in newest[:LATEST] if seconds_of(path.parent)]


@cache
def saved_config(run: Path) -> dict[str, Any]:
    path = run / ".hydra" / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def same_workload(config: Config, run: Path) -> bool:
    """The same model on the same data by the same trainer, whatever the adapter, rate and batch."""
    saved, trainer = saved_config(run), config.trainer
    if saved.get("model") != asdict(config.model) or saved.get("data") != asdict(config.data):
        return False
    return all(saved["trainer"].get(key) == getattr(trainer, key) for key in ("algorithm", "engine"))


def pair_count(config: Config, summary: dict[str, Any]) -> float:
    """Pairs that a job trains on; the rows of its data as an earlier run counted them."""
    trainer = config.trainer
    if trainer.max_steps > 0:
        return trainer.max_steps * trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
    return trainer.num_train_epochs * summary["data"]["train"]["rows"]

"""task=runs: the runs under outputs/, from their folders alone, the newest last."""

from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.table import Table

from smolvlm_exp.config.schema import Config
from smolvlm_exp.evaluation.metrics import deciding_metric, is_share, metric_of, summary_value
from smolvlm_exp.evaluation.verdict import verdict
from smolvlm_exp.reporting.results import wide_console
from smolvlm_exp.runs.checkpoint import checkpoints, step_of
from smolvlm_exp.runs.find import JOBS, PLACES, choices, newest_first, saved_hydra, summary_of
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.formatting import number, percent
from smolvlm_exp.utils.paths import OUTPUTS

SUMMARIZED = ("train", "evaluate", "mine")  # tasks that write summary.json


def runs(config: Config, folder: Path) -> list[dict[str, str]]:
    """Print a row per run; returns them."""
    folders = [path.parents[1] for path in newest_first((*PLACES, JOBS), ".hydra/config.yaml")]
    rows = [run_row(folder, config.metric) for folder in reversed(folders)]
    if not rows:
        print(f"no run under {OUTPUTS}/ yet")
        return rows
    table = Table(*rows[0])
    table.columns[0].no_wrap = True  # to be copied
    for row in rows:
        table.add_row(*row.values())
    wide_console().print(table)
    return rows


def run_row(folder: Path, metric: str | None) -> dict[str, str]:
    """A damaged folder is a row too."""
    try:
        chosen, task = choices(folder), saved_hydra(folder, "config").get("task", {}).get("name", "")
    except RequestError:
        return {
            "run": str(folder),
            "task": "",
            "model": "",
            "data": "",
            "trained": "",
            "result": "",
            "state": "damaged",
        }
    summary = summary_of(folder)
    trained = (
        " ".join(str(chosen.get(group) or "") for group in ("quant", "adapter", "trainer")) if task == "train" else ""
    )
    return {
        "run": str(folder),
        "task": str(task),
        "model": str(chosen.get("model") or ""),
        "data": str(chosen.get("data") or ""),
        "trained": trained,
        "result": result_of(summary, metric),
        "state": state_of(folder, str(task), summary),
    }


def result_of(summary: dict[str, Any], asked: str | None) -> str:
    """`Preference accuracy: 68.3 % → 95.4 % on 240 rows`, and what that does not allow to say."""
    metric = deciding_metric(asked, [summary])
    part, _, key = metric.partition(".")
    values = [summary_value(summary, f"before.{key}") if part == "after" else None, summary_value(summary, metric)]
    known = [percent(value, 1) if is_share(metric) else number(value) for value in values if value is not None]
    if not known:
        return ""
    rows = f" on {summary['held_out_rows']:,} rows" if "held_out_rows" in summary else ""
    said = verdict(summary, [key])
    label = metric_of(key).label if part == "after" else metric
    return f"{label}: {' → '.join(known)}{rows}" + (f" ({said.rpartition(': ')[2]})" if said else "")


def state_of(folder: Path, task: str, summary: dict[str, Any]) -> str:
    """done, stopped, failed, running, or that it was killed; with the step to resume from where there is one.

    Other tasks than those in `SUMMARIZED` leave no word of how they ended: they are running, or ended.
    """
    silent = "running" if is_locked(folder) else "killed" if task in SUMMARIZED else "ended"
    state = str(summary.get("status") or silent)
    saved = checkpoints(folder)
    return f"{state} at step {step_of(saved[-1])}" if saved and state in ("stopped", "killed", "failed") else state


def is_locked(folder: Path) -> bool:
    """Whether a process is writing there."""
    file = folder / ".lock"
    if not file.is_file():
        return False
    try:
        with FileLock(file.absolute(), timeout=0):
            return False
    except (Timeout, OSError):
        return True

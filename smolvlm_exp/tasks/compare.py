"""task=compare: finished runs beside each other, from their folders alone: what differs, what came of it, what is luck.

Runs that differ in their seed alone are one line. What a difference has to exceed is in comparison.py.
"""

import logging
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from smolvlm_exp.config.renamed import rename_settings
from smolvlm_exp.config.schema import Config
from smolvlm_exp.evaluation.comparison import Comparison, Run, comparison
from smolvlm_exp.evaluation.per_row import load_per_row
from smolvlm_exp.reporting.comparison_page import COSTS, document, show
from smolvlm_exp.reporting.tracker import track_table
from smolvlm_exp.runs.find import NON_IDENTITY_KEYS, summary_of
from smolvlm_exp.runs.sweep_record import find_sweep
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.paths import relative_to_cwd

log = logging.getLogger(__name__)


def compare(config: Config, folder: Path) -> Comparison:
    """Print the table and write compare.csv and compare.html into `folder`.

    Raises:
        RequestError: fewer than two finished runs were named.
    """
    import pandas

    found = comparison([read(path) for path in folders(config.runs)], config.metric)
    rows = flat(found)
    pandas.DataFrame(rows, dtype=object).to_csv(folder / "compare.csv", index=False)  # object: whole numbers stay so
    (folder / "compare.html").write_text(document(found, folder), encoding="utf-8")
    show(found)
    track_table(
        config.tracker, folder, "compare", f"compare {folder.parent.name} {folder.name}", rows, {"runs": len(rows)}
    )
    log.info(f"{relative_to_cwd(folder)}/compare.html")
    return found


def folders(named: Sequence[str]) -> list[Path]:
    """The finished runs that folders, sweeps' folders, patterns and `last` (the newest sweep) name.

    Raises:
        RequestError: one of them names nothing, or all together fewer than two.
    """
    found: dict[Path, None] = {}
    for name in named:
        paths = [find_sweep("last")] if name == "last" else matching(name) or [Path(name)]
        runs = [run for path in paths for run in (path, *sorted(path.glob("*"))) if ended(run)]
        if not runs:
            raise RequestError(f"runs: {name} names no finished run (status done in its summary.json).")
        found |= dict.fromkeys(run.resolve() for run in runs)  # one run, however often it is named
    if len(found) < 2:
        raise RequestError("task=compare needs two finished runs or more: runs=[outputs/a,outputs/b], or runs=[last].")
    return list(found)


def matching(pattern: str) -> list[Path]:
    return [Path(found) for found in sorted(glob(str(Path(pattern).expanduser())))]


def ended(folder: Path) -> bool:
    return summary_of(folder).get("status") == "done" and (folder / ".hydra" / "config.yaml").is_file()


def read(folder: Path) -> Run:
    composed = OmegaConf.create(yaml.safe_load((folder / ".hydra" / "config.yaml").read_text(encoding="utf-8")))
    rename_settings(composed)
    config = OmegaConf.to_container(composed)
    settings = {key: str(value) for key, value in flattened(config) if key.partition(".")[0] not in NON_IDENTITY_KEYS}
    return Run(folder, settings, summary_of(folder), load_per_row(folder))


def flattened(node: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        return [pair for key, value in node.items() for pair in flattened(value, f"{path}.{key}" if path else str(key))]
    return [(path, OmegaConf.to_container(OmegaConf.create(node)) if isinstance(node, list) else node)]


def flat(found: Comparison) -> list[dict[str, Any]]:
    """A row a run, for compare.csv and W&B's table; of its group the mean and half of the 95 % interval."""
    return [
        {
            "run": str(relative_to_cwd(run.folder)),
            **group.settings,
            "seed": run.summary.get("seed"),
            **{path: run.value(path) for path in (*found.metrics, *COSTS)},
            "verdict": found.verdict(group),
            "delta_to_best": found.gaps[number].difference,
            "delta_ci95": found.gaps[number].noise if number else None,
            **{f"group_mean.{path}": group.value(path) for path in found.metrics},
            **{f"group_ci95.{path}": group.error(path) for path in found.metrics},
        }
        for number, group in enumerate(found.groups)
        for run in group.runs
    ]

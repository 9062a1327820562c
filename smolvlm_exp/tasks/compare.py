"""task=compare: finished runs side by side, from their folders alone: what differs, the metrics, what is only noise.

Runs that differ only in their seed are one line. What a difference has to exceed is in evaluation/comparison.py.
"""

import logging
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from smolvlm_exp.config.renamed import rename_settings
from smolvlm_exp.config.schema import Config
from smolvlm_exp.evaluation.comparison import Comparison, Run, compare_runs, load_per_row
from smolvlm_exp.reporting.comparison_page import COSTS, comparison_page, print_comparison
from smolvlm_exp.reporting.trackers.wandb import track_table
from smolvlm_exp.runs.find import NON_IDENTITY_KEYS, PAIRED, saved_hydra, summary_of
from smolvlm_exp.runs.overrides import flatten
from smolvlm_exp.runs.sweep_record import find_sweep
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import write_text
from smolvlm_exp.utils.paths import relative_to_cwd

log = logging.getLogger(__name__)


def compare(config: Config, folder: Path) -> Comparison:
    """Print the table and write compare.csv and compare.html into `folder`.

    Raises:
        RequestError: `runs` names fewer than two finished runs.
    """
    import pandas

    result = compare_runs([read_run(path) for path in find_runs(config.runs)], config.metric)
    rows = table_rows(result)
    table = pandas.DataFrame(rows, dtype=object)  # object: integers stay integers
    write_text(folder / "compare.csv", table.to_csv(index=False))
    write_text(folder / "compare.html", comparison_page(result, folder))
    print_comparison(result)
    name = f"compare {folder.parent.name} {folder.name}"
    track_table(config.tracker, folder, "compare", name, rows, {"runs": len(rows)})
    log.info(f"{relative_to_cwd(folder)}/compare.html")
    return result


def find_runs(names: Sequence[str]) -> list[Path]:
    """The finished runs named by folders, sweep folders, patterns and `last` (the newest sweep).

    Raises:
        RequestError: a name matches no finished run, or all names together fewer than two.
    """
    runs: dict[Path, None] = {}
    for name in names:
        matches = sorted(map(Path, glob(str(Path(name).expanduser())))) or [Path(name)]
        paths = [find_sweep("last")] if name == "last" else matches
        if name == "last":
            log.info(f"runs: last is {relative_to_cwd(paths[0])}")
        folders = [folder for path in paths for folder in (path, *sorted(path.glob("*")))]
        configured = [folder for folder in folders if (folder / ".hydra" / "config.yaml").is_file()]
        finished = [folder for folder in configured if summary_of(folder).get("status") == "done"]
        if not finished:
            raise RequestError(f"runs: {name} matches no finished run (status done in its summary.json).")
        runs |= dict.fromkeys(run.resolve() for run in finished)  # a run counts once, however often it is named
    if len(runs) < 2:
        raise RequestError("task=compare needs at least two finished runs: runs=[outputs/a,outputs/b], or runs=[last].")
    return list(runs)


def read_run(folder: Path) -> Run:
    composed = OmegaConf.create(saved_hydra(folder, "config"))
    rename_settings(composed)
    flat = flatten(OmegaConf.to_container(composed))
    free = (*NON_IDENTITY_KEYS, *(("reward",) if flat.get("trainer.algorithm") in PAIRED else ()))
    settings = {key: str(value) for key, value in flat.items() if key.partition(".")[0] not in free}
    return Run(folder, settings, summary_of(folder), load_per_row(folder))


def table_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A row per run, for compare.csv and W&B's table, with its group's means and halves of 95 % intervals."""
    return [
        {
            "run": str(relative_to_cwd(run.folder)),
            **group.settings,
            "seed": run.summary.get("seed"),
            **{path: run.value(path) for path in (*comparison.metrics, *COSTS)},
            "verdict": comparison.verdict(group),
            "delta_to_best": comparison.gaps[number].difference,
            "delta_ci95": comparison.gaps[number].noise if number else None,
            **{f"group_mean.{path}": group.value(path) for path in comparison.metrics},
            **{f"group_ci95.{path}": group.error(path) for path in comparison.metrics},
        }
        for number, group in enumerate(comparison.groups)
        for run in group.runs
    ]

"""The sweepers, in the only namespace where Hydra looks for plugins. What they do is in `smolvlm_exp/sweep`."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore

from smolvlm_exp.runs.checkpoint import disk_error_as_run_error
from smolvlm_exp.runs.folder import check_unused_sweep, lock_run_folder
from smolvlm_exp.sweep.optuna_study import SearchConf
from smolvlm_exp.utils.errors import RequestError, RunError, exit_with_error


@dataclass
class GridConf(BasicSweeperConf):
    _target_: str = "hydra_plugins.smolvlm_exp.Grid"


class Grid(BasicSweeper):
    """Every combination of values, each in a process of its own, for task=train; other tasks get Hydra's sweeper."""

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None
        if self.config.task.name != "train":
            return self.sweep_other_task(arguments)
        from smolvlm_exp.sweep.grid import sweep_grid

        return exit_with_code_of(sweep_grid, self, arguments)

    def sweep_other_task(self, arguments: list[str]) -> Any:
        """By Hydra's sweeper, in this process."""
        assert self.config is not None
        folder = Path(self.config.hydra.sweep.dir)
        with ExitStack() as held:
            try:
                held.enter_context(lock_run_folder(folder))
                check_unused_sweep(folder, self.config)
            except RequestError as error:
                exit_with_error(error)
            try:
                with disk_error_as_run_error(folder):
                    return super().sweep(arguments)
            except RunError as error:  # of the disk, or of a job
                exit_with_error(error)


class Search(BasicSweeper):
    """Optuna's trials as jobs, handed to Hydra's launcher as a grid's are."""

    def __init__(self, **options: Any) -> None:
        self.options = SearchConf(**options)

    def sweep(self, arguments: list[str]) -> Any:
        from smolvlm_exp.sweep.search import sweep_search

        exit_with_code_of(sweep_search, self, arguments)


def exit_with_code_of(sweep: Callable[[Any, list[str]], int], sweeper: BasicSweeper, arguments: list[str]) -> None:
    try:
        with disk_error_as_run_error(Path(sweeper.config.hydra.sweep.dir)):
            code = sweep(sweeper, arguments)
    except (RequestError, RunError) as error:
        exit_with_error(error)
    sys.exit(code)


# Ours replaces Hydra's `basic`, the default of -m: had conf/config.yaml chosen it, no experiment could choose another.
ConfigStore.instance().store(group="hydra/sweeper", name="basic", node=GridConf, provider="smolvlm_exp")
ConfigStore.instance().store(group="hydra/sweeper", name="search", node=SearchConf, provider="smolvlm_exp")

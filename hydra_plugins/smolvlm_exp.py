"""The sweepers, where Hydra looks for plugins: in this namespace alone. What they do is in `smolvlm_exp/sweep`."""

import sys
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from smolvlm_exp.utils.errors import RequestError, exit_with_error


@dataclass
class GridConf(BasicSweeperConf):
    _target_: str = "hydra_plugins.smolvlm_exp.Grid"


class Grid(BasicSweeper):
    """Every combination, each in a process of its own; `sweep=FOLDER` goes on. Tasks but train go Hydra's plain way."""

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None
        if self.config.task.name != "train":
            return super().sweep(arguments)
        from smolvlm_exp.sweep.grid import sweep_grid

        try:
            code = sweep_grid(self, arguments)
        except RequestError as error:
            exit_with_error(error)
        sys.exit(code)


@dataclass
class SearchConf:
    """hydra/sweeper=search. Names are Optuna's own."""

    _target_: str = "hydra_plugins.smolvlm_exp.Search"
    params: dict[str, str] | None = (
        None  # the space: key -> choice(4,8), range(1,9), interval(0,1), tag(log,interval(...))
    )
    n_trials: int = 20  # in all: with sweep=FOLDER, what is left of them
    n_jobs: int = 1  # trials that the launcher gets at once
    storage: str | None = None  # null: Optuna's journal in the sweep's folder; or sqlite:///outputs/study.db
    seed: int | None = None  # of the sampler, where a study begins
    prune: str | None = None  # evaluated while training, as eval_rewards/accuracies; null: every trial runs to its end
    n_startup_trials: int = 5  # trials at random, and before any is pruned
    n_warmup_steps: int = 0  # training steps before which none is pruned


class Search(Sweeper):
    """Optuna's trials as jobs, handed to Hydra's launcher as a grid's are."""

    def __init__(self, params: DictConfig | None, **options: Any) -> None:
        self.params, self.options = dict(params or {}), options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from smolvlm_exp.sweep.search import sweep_search

        try:
            code = sweep_search(self, arguments)
        except RequestError as error:
            exit_with_error(error)
        sys.exit(code)


# In the place of Hydra's own, which -m means where nothing else is said: an experiment could not override our choice.
ConfigStore.instance().store(group="hydra/sweeper", name="basic", node=GridConf, provider="smolvlm_exp")
ConfigStore.instance().store(group="hydra/sweeper", name="search", node=SearchConf, provider="smolvlm_exp")

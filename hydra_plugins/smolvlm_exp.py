"""The sweepers, where Hydra looks for plugins: in this namespace alone. What they do is in `smolvlm_exp/sweep`."""

import sys
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from smolvlm_exp.errors import RequestError, refuse


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
            refuse(error)
        sys.exit(code)

"""The jobs of a command, as lists of Hydra overrides, and which of them somebody typed."""

from collections.abc import Callable
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig, OmegaConf

from smolvlm_exp.config.security import TYPED
from smolvlm_exp.config.typed import parsed, values_of
from smolvlm_exp.utils.errors import RequestError

Composer = Callable[[tuple[str, ...]], DictConfig]  # overrides -> what they compose
NEEDED = ("run", "sweep", "launcher", "sweeper", "job", "runtime", "callbacks")  # of Hydra's own settings


def jobs(compose: Composer, overrides: list[Override], multirun: bool) -> list[list[str]]:
    """The override lists of a command's jobs; for a search, lists in which each value comes once."""
    plain = [o.input_line or "" for o in overrides if not o.is_sweep_override()]
    own_settings = compose(tuple(plain)).hydra
    lost = next((part for part in NEEDED if not OmegaConf.is_dict(own_settings.get(part))), None)
    if lost:
        raise RequestError(f"hydra.{lost}: required by Hydra.")
    sweeper = own_settings.sweeper
    params = sweeper.get("params") or {}
    if not hasattr(params, "items"):  # an interpolation may resolve to anything
        raise RequestError("hydra.sweeper.params must map settings to their values.")
    own = parsed([f"{key}={value}" for key, value in params.items()])
    given = {o.key_or_group for o in overrides}
    if not multirun:
        if own_settings.mode == hydra.types.RunMode.MULTIRUN:
            raise RequestError("hydra.mode=MULTIRUN: a sweep is started by -m.")
        lacking = [o.key_or_group for o in own if o.key_or_group not in given]
        if lacking:
            raise RequestError(f"this experiment is a sweep over {', '.join(lacking)}: add -m, or give each one value.")
        return [plain]
    both = [*own, *overrides]
    if "n_trials" in sweeper:
        return samples(both)
    interval = next((o for o in both if isinstance(o.value(), IntervalSweep)), None)
    if interval:
        raise RequestError(f"{interval.input_line}: a grid takes values; intervals are for hydra/sweeper=search.")
    return combinations(both)


def combinations(overrides: list[Override]) -> list[list[str]]:
    """The override lists of a grid's jobs, in the basic sweeper's order; one list where nothing is swept."""
    return BasicSweeper.split_arguments(overrides, None)[0]


def samples(overrides: list[Override]) -> list[list[str]]:
    """Override lists in which each value that a search may take comes once, of an interval its ends."""
    values: dict[str, list[str]] = {}
    for override in overrides:
        swept: Any = override.value()
        if isinstance(swept, IntervalSweep):
            options = [str(swept.start), str(swept.end)]
        elif override.is_sweep_override():
            options = list(override.sweep_string_iterator())
        else:
            options = [override.get_value_element_as_str()]
        values[override.get_key_element()] = options
    longest = max(map(len, values.values()), default=1)
    return [[f"{key}={options[min(i, len(options) - 1)]}" for key, options in values.items()] for i in range(longest)]


def typed_values(overrides: list[Override]) -> dict[str, list[Any]]:
    """The values that a command gives the settings of `TYPED`, of a sweep all of them."""
    values: dict[str, list[Any]] = {}
    for override in overrides:
        if override.key_or_group in TYPED and not override.is_delete():
            values.setdefault(override.key_or_group, []).extend(values_of(override))
    return values

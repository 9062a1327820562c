"""The root schema, and the strict parsing of a composed configuration into plain dataclasses."""

import math
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from importlib import import_module
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from smolvlm_exp.config.aliases import setting_meant
from smolvlm_exp.config.renamed import rename_settings
from smolvlm_exp.config.security import check_setting
from smolvlm_exp.config.tasks import TASKS, readers
from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.deploy.options import ExportConfig, ServeConfig, SessionConfig
from smolvlm_exp.evaluation.metrics import GOALS
from smolvlm_exp.models.adapter import ADAPTER_ELSEWHERE, AdapterConfig
from smolvlm_exp.models.model import MODEL_ELSEWHERE, ModelConfig
from smolvlm_exp.models.quant import QuantConfig
from smolvlm_exp.reporting.trackers.config import TrackerConfig, check_tracker
from smolvlm_exp.rewards.config import RewardConfig
from smolvlm_exp.training.arguments import TRAINER_ELSEWHERE, TrainerConfig
from smolvlm_exp.utils.errors import RequestError, suggestion
from smolvlm_exp.utils.fields import at_least, check_extra, one_of
from smolvlm_exp.utils.paths import PACKAGE

SELECTORS = {"task": "name", "data": "source", "trainer": "algorithm"}  # group -> the key that selects its schema
EXTENSIBLE = {  # group with `extra` -> upstream's arguments that other settings are
    "model": MODEL_ELSEWHERE, "adapter": ADAPTER_ELSEWHERE, "trainer": TRAINER_ELSEWHERE,
}  # fmt: skip
FOLDERS = {"data": "data/sources", "trainer": "training"}  # of the modules with a `Config`


@dataclass
class Config:
    """Everything about a run. `task`, `data` and `trainer` are the chosen option's own `Config`."""

    task: Any  # config/tasks.py
    model: ModelConfig
    quant: QuantConfig
    adapter: AdapterConfig
    data: DataConfig
    trainer: TrainerConfig
    tracker: TrackerConfig
    reward: RewardConfig = field(default_factory=RewardConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    seed: int = at_least(0, 0, most=2**32 - 1)  # of adapter initialisation, data order and sampling
    name: str | None = None  # the run's name; null: the settings that differ from the defaults
    resume: str | None = None  # a run folder, or `last`: resume a run that stopped
    resume_allow: list[str] = field(default_factory=list)  # settings that may change on resume, as [trainer.max_steps]
    run: str | None = None  # a run folder, or `last`: what a task other than train works on
    runs: list[str] = field(default_factory=list)  # what task=compare compares: run or sweep folders, patterns, `last`
    sweep: str | None = None  # with -m: a sweep folder, or `last`: run the jobs it lacks
    keep_checkpoints: str = one_of("best", "last", "all")  # after a sweep: of the best job, the newest of each, or all
    strict_checks: bool = False  # exit with code 1 where a check of the result failed
    metric: str | None = one_of(None, *GOALS)  # runs are compared by it; null: preference accuracy, without it reward


def groups() -> Iterator[tuple[str, str, Any]]:
    """(name, option, type) of every field of `Config`; of task, data and trainer one for each option, else `""`."""
    for name, kind in typing.get_type_hints(Config).items():
        if name in SELECTORS:
            yield from ((name, option, own_config(name, option)) for option in own_configs(name))
        else:
            yield name, "", kind


def chosen_types(composed: DictConfig) -> dict[str, Any]:
    """Field of `Config` -> its type: of task, data and trainer, the chosen option's own `Config`."""
    types = typing.get_type_hints(Config)
    for group, key in SELECTORS.items():
        name = OmegaConf.select(composed, f"{group}.{key}")
        known = own_configs(group)
        if name not in known:
            raise RequestError(f"{group}.{key}={name}: no such module. {suggestion(str(name), known)}")
        types[group] = own_config(group, name)
    return types


@cache
def own_configs(group: str) -> list[str]:
    """The options of a group that have a schema: for a source or a trainer, the modules with a `Config`."""
    if group == "task":
        return list(TASKS)
    files = sorted((PACKAGE / FOLDERS[group]).glob("*.py"))
    return [file.stem for file in files if "\nclass Config(" in file.read_text(encoding="utf-8")]


def own_config(group: str, name: str) -> type:
    if group == "task":
        return TASKS[name]
    config: type = import_module(f"smolvlm_exp.{FOLDERS[group].replace('/', '.')}.{name}").Config
    return config


def parse(composed: DictConfig) -> Config:
    """Read a composed configuration strictly.

    Raises:
        RequestError: an unknown key, a wrong type, a value outside a closed list or below a bound, a missing value.
    """
    composed = composed.copy()
    rename_settings(composed)
    types = chosen_types(composed)
    own = {setting.name for setting in fields(types["task"])}
    with open_dict(composed):
        composed.pop("hydra", None)
        for key in [key for key in composed.task if readers(f"task.{key}") and key not in own]:
            composed.task.pop(key)  # a run of an earlier release saved those of all tasks
    known = list(key_types(types))
    for key in unknown_keys(OmegaConf.to_container(composed), known):
        raise RequestError(f"{key}: no such setting. {setting_meant(key, known)}".rstrip())
    try:
        merged = OmegaConf.merge(schema_of(*types.items()), composed)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise RequestError(f"{missing[0]} has no value yet: give it one, as {missing[0]}=...")
        config = typing.cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise RequestError(f"{error.full_key}: {(error.msg or str(error)).splitlines()[0]}.") from error
    for key, setting, value in settings(config):
        check_setting(key, value)
        check_value(key, setting, value)
    for group, elsewhere in EXTENSIBLE.items():
        check_extra(group, getattr(config, group), elsewhere)
    check_tracker(config.tracker)
    return config


@cache
def schema_of(*types: tuple[str, Any]) -> DictConfig:
    """A structured configuration of these groups' types; making one takes a quarter of `parse`'s time."""
    schema = OmegaConf.structured(Config)
    for name, kind in types:
        if is_dataclass(kind):
            schema[name] = OmegaConf.structured(kind)
    return schema


def dataclass_of(kind: Any) -> type | None:
    """The dataclass of a group of settings, also of an optional one; None for the type of a single setting."""
    parts = (kind, *typing.get_args(kind))
    return next((part for part in parts if isinstance(part, type) and is_dataclass(part)), None)


def key_types(types: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Every setting's full name, as `adapter.r`, and its type, by the types of a group's settings."""
    keys: dict[str, Any] = {}
    for name, kind in types.items():
        group = dataclass_of(kind)
        keys |= key_types(typing.get_type_hints(group), f"{path}{name}.") if group else {f"{path}{name}": kind}
    return keys


def every_key() -> list[str]:
    """The full names of all settings, whichever source and trainer are chosen."""
    return sorted({key for name, _, kind in groups() for key in key_types({name: kind})})


def unknown_keys(node: Any, known: list[str], path: str = "") -> Iterator[str]:
    """Keys of nested dicts that are no settings. Below a setting that is a plain dict (`extra`) any key is known."""
    for key, value in node.items():
        name = f"{path}{key}"
        if name in known:
            continue
        if not any(setting.startswith(f"{name}.") for setting in known):
            yield name
        elif isinstance(value, dict):
            yield from unknown_keys(value, known, f"{name}.")


def default_of(setting: Field[Any]) -> Any:
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def settings(config: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(full name, dataclass field, value) of every setting."""
    for setting in fields(config):
        value = getattr(config, setting.name)
        if is_dataclass(value):
            yield from settings(value, f"{path}{setting.name}.")
        else:
            yield f"{path}{setting.name}", setting, value


def check_value(key: str, setting: Any, value: Any) -> None:
    """Check a value against its field's choices and bounds (utils/fields.py); no number may be infinite or NaN."""
    choices, low, floor, most = (setting.metadata.get(name) for name in ("choices", "low", "above", "most"))
    check_finite(key, value)
    for item in value if isinstance(value, list) else [value]:
        if choices and item not in choices:
            raise RequestError(f"{key}={item}: {suggestion(str(item), [str(choice) for choice in choices])}")
    if low is not None and value is not None and value < low:
        raise RequestError(f"{key}={value} is too small: {low} is the least.")
    if floor is not None and value is not None and not value > floor:
        raise RequestError(f"{key}={value}: it must be greater than {floor}.")
    if most is not None and value is not None and value > most:
        raise RequestError(f"{key}={value} is too large: {most} is the most.")


def check_finite(key: str, value: Any) -> None:
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            check_finite(f"{key}.{name}", item)
    if isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"{key}={value}: it must be a finite number.")

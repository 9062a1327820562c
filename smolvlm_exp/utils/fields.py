"""Dataclass fields with the values they take, so that a wrong one is refused before any work starts."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields, replace
from typing import Any

from smolvlm_exp.utils.errors import RequestError, first_line


def one_of(default: str | None, *others: str) -> Any:
    """A setting with a closed list of values."""
    return field(default=default, metadata={"choices": (default, *others)})


def some_of(default: str, *others: str) -> Any:
    """A list of values, each out of a closed list."""
    return field(default_factory=lambda: [default], metadata={"choices": (default, *others)})


def none_of(*choices: str) -> Any:
    """A list of values out of a closed list, empty by default."""
    return field(default_factory=list, metadata={"choices": choices})


def at_least(low: float, default: Any, most: float | None = None) -> Any:
    """A number from `low` upwards, to `most`."""
    return field(default=default, metadata={"low": low, "most": most})


def above(low: float, default: Any, most: float | None = None) -> Any:
    """A number greater than `low`, up to `most`."""
    return field(default=default, metadata={"above": low, "most": most})


def check_extra(group: str, config: Any, elsewhere: Mapping[str, str]) -> None:
    """Refuse in `config.extra` what a setting of ours already says: the one in `extra` would win without a word.

    Args:
        elsewhere: upstream's name -> our setting, where that is no field of `config` by the same name.
    """
    own = {**{setting.name: f"{group}.{setting.name}" for setting in fields(config)}, **elsewhere}
    for key in config.extra:
        if key in own:
            raise RequestError(f"{group}.extra.{key}: set {own[key]} instead.")


def upstream_refuses(group: str, config: Any, build: Callable[[Any], object], error: Exception) -> RequestError:
    """What upstream said of `config`, beginning with the setting to blame: without it `build` works, or says otherwise.

    Args:
        group: of the setting's full name; build: what raised `error`, on a configuration of the same class.
    """
    blamed: list[str] = []
    named_first = sorted(changes(config), key=lambda change: change[0].rpartition(".")[2] not in str(error))
    for name, value, without in named_first:
        try:
            build(without)
        except Exception as other:
            if str(other) != str(error):  # another setting is wrong too
                blamed.append(f"{group}.{name}={value}")
        else:
            blamed.insert(0, f"{group}.{name}={value}")
            break
    return RequestError(f"{blamed[0] if blamed else group}: {first_line(error)}")


def changes(config: Any) -> list[tuple[str, Any, Any]]:
    """(name, value, config without it) of every setting that is not its default, those in `extra` first."""
    changed = []
    for key, value in config.extra.items():
        extra = {name: other for name, other in config.extra.items() if name != key}
        changed.append((f"extra.{key}", value, replace(config, extra=extra)))
    for setting in fields(config):
        default = setting.default if setting.default_factory is MISSING else setting.default_factory()
        value = getattr(config, setting.name)
        if setting.name != "extra" and default != "???" and value != default:
            changed.append((setting.name, value, replace(config, **{setting.name: default})))
    return changed

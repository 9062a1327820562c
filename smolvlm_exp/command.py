"""A command, read to the end before Hydra runs it: every job composed and checked, mistakes told in a line or three."""

import itertools
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from smolvlm_exp.config import CONF, Config, key_paths, parse, schema, suggestion, unknown_keys
from smolvlm_exp.errors import RequestError


def check_command(args: Any) -> list[Config]:
    """Compose and read strictly every job that a command line asks for.

    Args:
        args: Hydra's parsed command line (`overrides`, `config_path`, `config_name`, `config_dir`).

    Raises:
        RequestError: naming the key or the file, and the fix.
    """
    folder = Path(args.config_path).resolve() if args.config_path else CONF
    if not folder.is_dir():
        raise RequestError(f"--config-path {args.config_path}: there is no such folder.")
    name = args.config_name or "config"
    extra = [f"hydra.searchpath=[file://{Path(args.config_dir).resolve()}]"] if args.config_dir else []
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            overrides = OverridesParser.create().parse_overrides([*extra, *args.overrides])
            groups = [o for o in overrides if is_group(o)]
            for override in groups:
                check_option(override)
            check_keys(name, groups, [o for o in overrides if not is_group(o)])
            return [parse(compose(name, overrides=job)) for job in jobs(overrides)]
    except (HydraException, OmegaConfBaseException) as error:
        said = [str(e).strip() for e in (error, error.__cause__) if e is not None and str(e).strip()]
        raise RequestError("\n".join(line for text in said for line in text.splitlines()[:2])) from error


def jobs(overrides: list[Override]) -> list[list[str]]:
    """The override lists of a command's jobs, in the basic sweeper's order; one list where nothing is swept."""
    choices = []
    for override in overrides:
        line = override.input_line or ""
        if override.is_sweep_override():
            key = line.split("=", 1)[0]
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([line])
    return [list(job) for job in itertools.product(*choices)]


def is_group(override: Override) -> bool:
    return GlobalHydra.instance().config_loader().get_group_options(override.key_or_group) != []


def check_option(override: Override) -> None:
    """Every option that is asked for must be in its group."""
    known = GlobalHydra.instance().config_loader().get_group_options(override.key_or_group)
    value = override.value()
    asked = override.sweep_string_iterator() if override.is_sweep_override() else [value]
    for option in asked:
        if option is not None and str(option) not in known and str(option) != "null":
            raise RequestError(f"{override.key_or_group}={option}: no such option. {suggestion(str(option), known)}")


def check_keys(name: str, groups: list[Override], values: list[Override]) -> None:
    """Unknown keys in the files that the command chooses, then on the command line itself."""
    composed = compose(name, overrides=jobs(groups)[0], return_hydra_config=True)
    expected = schema(composed)
    known = list(key_paths(expected))
    plain = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
    for key in unknown_keys(plain, expected):
        raise RequestError(f"{file_of(key, composed)}: {key}: no such setting. {suggestion(key, known)}")
    for override in values:
        key = override.key_or_group
        free = ".extra." in key or key.startswith("hydra.")
        if not free and not any(path == key or path.startswith(f"{key}.") for path in known):
            raise RequestError(f"{key}: no such setting. {suggestion(key, known)}")
        adds = override.is_add() or override.is_force_add()
        if ".extra." in key and not adds and OmegaConf.select(composed, key) is None:
            raise RequestError(f"{key}: further arguments are added with a plus: +{override.input_line}")


def file_of(key: str, composed: DictConfig) -> str:
    """The YAML file that set `key`, for an error message."""
    choices = composed.hydra.runtime.choices
    files = {f"experiment/{choices.get('experiment')}.yaml": "", "config.yaml": ""}
    files |= {f"{group}/{option}.yaml": group for group, option in choices.items() if not group.startswith("hydra")}
    for file, package in files.items():
        path = CONF / file
        inside = key.removeprefix(f"{package}.") if package else key
        if path.is_file() and OmegaConf.select(OmegaConf.create(yaml.safe_load(path.read_text()) or {}), inside) is not None:
            return f"conf/{file}"
    return "the configuration"

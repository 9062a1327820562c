"""Compose and check every job of a command before Hydra runs it, and explain mistakes in short."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, get_type_hints

import hydra
import yaml
from hydra import version
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from smolvlm_exp.config.aliases import setting_meant
from smolvlm_exp.config.jobs import Composer, combinations, jobs, typed_values
from smolvlm_exp.config.renamed import KEYS, check_renamed, rename_settings
from smolvlm_exp.config.schema import (
    Config,
    chosen_types,
    default_of,
    every_key,
    groups,
    key_types,
    own_config,
    own_configs,
    parse,
    settings,
    unknown_keys,
)
from smolvlm_exp.config.security import check_hydra, check_search_path, check_setting, check_typed
from smolvlm_exp.config.tasks import misplaced, readers
from smolvlm_exp.config.typed import check_kind, parsed
from smolvlm_exp.runs.overrides import key_of
from smolvlm_exp.utils.errors import RequestError, suggestion
from smolvlm_exp.utils.hub import is_hub_id
from smolvlm_exp.utils.paths import CONF


def check_command(args: Any) -> list[Config]:
    """Compose and read strictly every job of a command line that Hydra's parser has read.

    Raises:
        RequestError: naming the key or the file, and the fix.
    """
    name = args.config_name or "config"
    try:
        with search_path(args.config_path, args.config_dir) as folder:
            main = folder / f"{name.removesuffix('.yaml')}.yaml"
            if main.is_file():
                check_search_path(main.read_text(encoding="utf-8", errors="replace"))
            overrides = parsed(args.overrides)
            for override in overrides:
                given = (override.input_line or "").partition("=")[2]
                check_setting(override.key_or_group, given)
                check_search_path(given)
                check_renamed(override.key_or_group, given)
            compose: Composer = cache(partial(compose_job, name))  # each time takes a tenth of a second
            check_keys(compose, overrides, args.multirun)
            override_lists = jobs(compose, overrides, args.multirun)
            configs = [read(compose(tuple(job)), job, replay=folder != CONF) for job in override_lists]
            typed = typed_values(overrides)
            for config in configs:
                for key, _, value in settings(config):
                    if not misplaced(key, config.task.name):
                        check_typed(key, value, typed.get(key, ()))
            return configs
    except (HydraException, OmegaConfBaseException) as error:
        raise RequestError(explain(error)) from error


def read(composed: DictConfig, job: list[str], replay: bool) -> Config:
    """One job's settings.

    Args:
        replay: a saved file has a value for every setting, so only those of `job` were given.
    """
    config = parse(composed)
    given = {key_of(override) for override in job}
    if config.model.weights == "pretrained":
        check_shape(composed, given)
    for key, setting, value in settings(config):
        problem = misplaced(key, config.task.name)
        default = value in (default_of(setting), option_default(key))
        if problem and not default and (key in given or not replay):
            raise RequestError(problem)
    return config


@cache
def option_default(key: str) -> Any:
    """What conf/reward/truth.yaml, the option of every command, sets: no sign that somebody wants rewards."""
    group, _, name = key.partition(".")
    own = yaml.safe_load((CONF / "reward" / "truth.yaml").read_text(encoding="utf-8")) if group == "reward" else {}
    return own.get(name)


def check_shape(composed: DictConfig, given: set[str]) -> None:
    """Refuse dimensions for pretrained weights, which have their own: nothing would read them but the plan."""
    fix = "model.weights=pretrained has the checkpoint's own dimensions. Leave it out, or add model.weights=random."
    key = next((key for key in sorted(given) if key.startswith("model.shape.")), None)
    if key:
        raise RequestError(f"{key}: {fix}")
    chosen = composed.hydra.runtime.choices.get("experiment")
    if chosen and (file := file_of("model.shape", composed)).startswith("conf/experiment/"):
        raise RequestError(f"{file}: model.shape: {fix}")


def compose_job(name: str, overrides: tuple[str, ...]) -> DictConfig:
    """The composed configuration, with Hydra's own settings, which are checked."""
    try:
        composed = hydra.compose(name, overrides=list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException):
        raise
    except (ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:  # also from Hydra
        given = " ".join(overrides)
        raise RequestError(f"{given}: no such setting, or no such value ({str(error).splitlines()[0]}).") from error
    check_hydra(OmegaConf.to_container(composed.hydra, resolve=False))
    return composed


def check_names(folder: Path) -> None:
    """Refuse a folder of a person's own options if one of them has the name of ours, which Hydra would take."""
    own = (file for group in CONF.iterdir() if group.is_dir() for file in (folder / group.name).glob("*.yaml"))
    taken = next((file for file in own if (CONF / file.relative_to(folder)).is_file()), None)
    if taken:
        raise RequestError(
            f"--config-dir: {taken} has the name of an option that comes with this program, and Hydra would take that "
            f"one. Give it another name, as {taken.parent.name}/my_{taken.name}."
        )


class Sources(ConfigRepository):
    """Where Hydra finds options. For each compose it exchanges a copy's list of sources, and would copy all in them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sources":
        return copy(self)


@contextmanager
def search_path(config_path: str | None = None, config_dir: str | None = None) -> Iterator[Path]:
    """Hydra set up as its command line does it; gives the folder that `--config-path` means, by default conf/."""
    for option, given in (("--config-path", config_path), ("--config-dir", config_dir)):
        if given and not Path(given).is_dir():
            raise RequestError(f"{option} {given}: there is no such folder.")
    folder = Path(config_path).resolve() if config_path else CONF
    path = create_config_search_path(str(folder))
    if config_dir:
        check_names(Path(config_dir))
        path.prepend("command-line", f"file://{Path(config_dir).resolve()}", anchor=SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    version.setbase("1.3")
    loader = Hydra.create_main_hydra2(task_name="smolvlm_exp", config_search_path=path).config_loader
    loader.repository = Sources(path)  # type: ignore[attr-defined]
    try:
        yield folder
    finally:
        GlobalHydra.instance().clear()


def register_schemas() -> None:
    """Tell Hydra every setting's default and type.

    conf/config.yaml starts from `schema`; a file in conf/task, conf/data or conf/trainer starts from its own, as
    `/schema/data@_here_: shapes`.
    """
    store = ConfigStore.instance()
    root = {setting.name: default_of(setting) for setting in fields(Config)}
    for group, option, kind in groups():
        if option:
            root[group] = {}
            store.store(group=f"schema/{group}", name=option, node=kind)
        elif is_dataclass(kind):
            root[group] = kind
    store.store(name="schema", node=root)


def explain(error: Exception) -> str:
    """Hydra's and OmegaConf's complaint in a line or three, with a guess at what was meant."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OmegaConfBaseException):
        inner = inner.__cause__ or inner.__context__
    file = re.match(r"In '([\w/]+)'", str(error))
    where = f"conf/{file.group(1)}.yaml: " if file else ""
    if isinstance(inner, ConfigKeyError | ConfigAttributeError) and inner.full_key:
        key = inner.full_key
        if key.split(".")[0] not in get_type_hints(Config) and file:
            key = f"{file.group(1).split('/')[0]}.{key}"
        return f"{where}{unknown(key, every_key())}"
    if isinstance(inner, OmegaConfBaseException) and inner.full_key:
        return f"{where}{inner.full_key}: {str(inner.msg or inner).splitlines()[0].rstrip('.')}."
    if plugin := re.search(r"Could not (?:find|load) 'hydra/launcher/(joblib|submitit|ray)", str(error)):
        extra = {"joblib": "parallel", "submitit": "slurm", "ray": "ray"}[plugin[1]]
        return f"hydra/launcher needs hydra-{plugin[1]}-launcher: pip install 'smolvlm-exp[{extra}]'"
    lines = [line for text in (str(error), str(error.__cause__ or "")) for line in text.strip().splitlines()[:2]]
    return "\n".join(lines)


def check_option(override: Override) -> bool:
    """Whether it chooses an option of a group, which must have it."""
    group = override.key_or_group
    if not group or "." in group:  # looking it up would take milliseconds
        return False
    known = GlobalHydra.instance().config_loader().get_group_options(group)
    value = list(override.sweep_string_iterator()) if override.is_sweep_override() else override.value()
    if isinstance(value, list) and known and group != "tracker" and not override.is_sweep_override():
        raise RequestError(f"{override.input_line}: one option of {group}, of {', '.join(known)}.")
    chosen = value if isinstance(value, list) else [value]
    for option in chosen if known else ():
        if str(option) not in known and not (option is None and override.is_delete()):
            guess = named_instead(group, str(option)) or suggestion(str(option), known)
            raise RequestError(f"{group}={option}: no such option. {guess}")
    return bool(known)


def named_instead(group: str, option: str) -> str:
    """How a folder, or a name of the Hub, is typed that stands where an option belongs; empty for anything else."""
    own = {"model": "model=smolvlm model.id=", "data": "data=files data.folder="}
    hub = {**own, "data": "data=hub data.id="}
    if group in own and Path(option).is_dir():
        return f"A folder is typed as {own[group]}{option}."
    if group in hub and is_hub_id(option):
        return f"A name of the Hub is typed as {hub[group]}{option}."
    return ""


def check_keys(compose: Composer, overrides: list[Override], multirun: bool) -> None:
    """Unknown options, then unknown keys on the command line and in the files that it chooses, and wrong values."""
    options = [override for override in overrides if check_option(override)]
    try:
        composed = compose(tuple(override.input_line or "" for override in overrides))  # what will run
    except (HydraException, OmegaConfBaseException, RequestError):  # or is a sweep, or has one of these mistakes
        composed = compose(tuple(combinations(options)[0]))
    rename_settings(composed)
    types = key_types(chosen_types(composed))
    known = list(types)
    for override in (o for o in overrides if o not in options):
        key = override.key_or_group
        added = ".extra." in key or key.startswith("reward.weights.")  # names that no schema lists
        if (
            not added
            and not key.startswith("hydra.")
            and not any(path == key or path.startswith(f"{key}.") for path in known)
        ):
            names = [*GlobalHydra.instance().config_loader().list_groups(""), *known]
            raise RequestError(misplaced(key, composed.task.name) or unknown(key, names))
        adds = override.is_add() or override.is_force_add()
        if added and not adds and not override.is_delete() and OmegaConf.select(composed, key) is None:
            what = "rewards" if key.startswith("reward.") else "arguments"
            raise RequestError(f"{key}: further {what} are added with a plus: +{override.input_line}")
    for override in overrides:
        check_kind(override, types.get(override.key_or_group), multirun)
    for key in unknown_keys(OmegaConf.to_container(composed), [*known, "hydra"]):
        if not readers(key):  # else a saved run's, of another task
            raise RequestError(f"{file_of(key, composed)}: {unknown(key, known)}")


def unknown(key: str, known: list[str]) -> str:
    """The error message for an unknown setting."""
    if key in KEYS:
        return f"{key} is now {KEYS[key]}."
    if key.startswith("task.") and readers(key):
        return f"{key} belongs to task={'|'.join(readers(key))}."
    if options := options_with(key):
        group = key.partition(".")[0]
        return f"{key} belongs to {group}={'|'.join(options)}."
    return f"{key}: no such setting. {setting_meant(key, known)}".rstrip()


def options_with(key: str) -> list[str]:
    """The data sources, or algorithms of trainers, that have this setting."""
    group, _, name = key.partition(".")
    if group not in ("data", "trainer"):
        return []
    options = own_configs(group)
    having = [option for option in options if name in {setting.name for setting in fields(own_config(group, option))}]
    return having if len(having) < len(options) else []


def file_of(key: str, composed: DictConfig) -> str:
    """The YAML file that set `key`, for an error message."""
    choices = composed.hydra.runtime.choices
    files = {f"experiment/{choices.get('experiment')}.yaml": "", "config.yaml": ""}
    files |= {f"{group}/{option}.yaml": group for group, option in choices.items() if not group.startswith("hydra")}
    for file, package in files.items():
        content = yaml.safe_load((CONF / file).read_text()) if (CONF / file).is_file() else None
        if OmegaConf.select(OmegaConf.create(content or {}), key.removeprefix(f"{package}.")) is not None:
            return f"conf/{file}"
    return "the configuration"

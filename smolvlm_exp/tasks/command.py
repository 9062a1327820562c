"""A command from its overrides to its task: completed, checked, composed by Hydra into a folder that is its own."""

import logging
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from smolvlm_exp.config.compose import check_command, search_path
from smolvlm_exp.config.inputs import WITHOUT_MODEL, check_inputs
from smolvlm_exp.config.previous_run import complete_overrides
from smolvlm_exp.config.schema import Config
from smolvlm_exp.runs.checkpoint import disk_error_as_run_error, fsync_all
from smolvlm_exp.runs.folder import check_unused, lock_run_folder, missing, remove_if_refused
from smolvlm_exp.tasks.opening import WITHOUT_FOLDER, announce
from smolvlm_exp.utils.errors import unusable_path_as_request_error
from smolvlm_exp.utils.phases import clock
from smolvlm_exp.utils.startup import fast_imports, silence_upstream
from smolvlm_exp.utils.versions import check_torchvision

log = logging.getLogger(__name__)


def complete_and_check(args: Namespace) -> list[Config]:
    """Complete a parsed command line, in place, by the settings of the run that it names, and check all of it.

    Returns:
        its configuration, or those of a sweep.
    """
    with unusable_path_as_request_error():
        args.overrides = complete_overrides(args.overrides, args.multirun)
        configs = check_command(args)
        for config in {repr((c.task, c.data, c.model)): c for c in configs}.values():  # of a sweep, what differs
            check_inputs(config)
        return configs


def run_once(args: Namespace, task: Callable[[DictConfig], Any]) -> Any:
    """What `task` returns for the configuration that a checked command composes, in its output folder.

    As Hydra's own `run`, but the folder is this process's before anything is written into it, `.hydra` included.

    Raises:
        RequestError: the folder holds another run, is in use, or cannot be written.
        RunError: the disk is full.
    """
    name = args.config_name or "config"
    with search_path(args.config_path, args.config_dir):
        runner = GlobalHydra.instance().hydra
        assert runner is not None
        composed = runner.compose_config(
            config_name=name, overrides=args.overrides, run_mode=RunMode.RUN, with_log_configuration=False
        )
        composed.hydra.mode = RunMode.RUN
        HydraConfig.instance().set_config(composed)  # hydra.run.dir may name others of Hydra's settings
        folder = Path(composed.hydra.run.dir)
        callbacks = Callbacks(composed)

        def saved(composed: DictConfig) -> Any:
            sync_saved_config(folder)
            return task(composed)

        writes, made = composed.task.name not in WITHOUT_FOLDER, missing(folder)
        with (
            lock_run_folder(folder) if writes else nullcontext(),
            remove_if_refused(folder, made) if writes else nullcontext(),
            disk_error_as_run_error(folder),
        ):
            if writes and not composed.resume:
                check_unused(folder, composed.task.name)
            callbacks.on_run_start(config=composed, config_name=name)
            context = HydraContext(runner.config_loader, callbacks)
            done = run_job(saved, composed, "hydra.run.dir", None, context, configure_logging=False)
            callbacks.on_run_end(config=composed, config_name=name, job_return=done)
            return done.return_value


def sync_saved_config(folder: Path) -> None:
    """Hydra does not, and without it no checkpoint can be resumed and no result compared."""
    if (folder / ".hydra").is_dir():
        fsync_all(folder / ".hydra")


def output_folder() -> Path:
    return Path(HydraConfig.get().runtime.output_dir)


def execute(config: Config, folder: Path) -> Any:
    """Do the task of a configuration; returns what its function returns."""
    name = config.task.name
    announce(config, folder, HydraConfig.get().runtime.choices)
    with fast_imports():
        if name not in WITHOUT_MODEL:
            check_torchvision()
            silence_upstream()
        task = getattr(import_module(f"smolvlm_exp.tasks.{name}"), name)
    if name not in WITHOUT_MODEL:
        from smolvlm_exp.models.model import describe_device

        log.info(f"device: {describe_device(config.model.dtype)}")
    try:
        with unusable_path_as_request_error():
            return task(config, folder)
    finally:
        clock.restart()  # another job may follow in this process

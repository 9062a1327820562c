"""The command line, and the same from Python: compose with Hydra, check everything, do the task.

    python -m smolvlm_exp [group=option] [group.key=value] [-m]

Exit codes: 0 done; 1 failed, or a job of a sweep did; 2 the request was wrong and nothing was started; 75 stopped after
saving, resume with resume=last or, with -m, sweep=last; 130 stopped, and there is nothing to resume from.
"""

import atexit
import logging
import os
import shlex
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.callbacks import Callbacks
from hydra._internal.utils import get_args_parser, run_and_report
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from smolvlm_exp import __version__
from smolvlm_exp.config.completion import BASH
from smolvlm_exp.config.compose import check_command, register_schemas, search_path
from smolvlm_exp.config.describe import group_help
from smolvlm_exp.config.flags import check_flags, help_wanted, refuse_flags
from smolvlm_exp.config.inputs import WITHOUT_MODEL, check_inputs
from smolvlm_exp.config.previous_run import complete_overrides
from smolvlm_exp.config.schema import Config, parse
from smolvlm_exp.evaluation.metrics import deciding_metric, summary_value
from smolvlm_exp.runs.checkpoint import checkpoints, disk_full_as_run_error, fsync_all
from smolvlm_exp.runs.folder import check_unused, lock_run_folder, missing, remove_if_refused
from smolvlm_exp.runs.overrides import as_override
from smolvlm_exp.tasks.opening import WITHOUT_FOLDER, announce
from smolvlm_exp.utils.errors import RequestError, RunError, exit_with_error, unusable_path_as_request_error
from smolvlm_exp.utils.paths import CONF, relative_to_cwd
from smolvlm_exp.utils.phases import clock
from smolvlm_exp.utils.signals import INTERRUPTED, STOPPED, sigterm_as_interrupt
from smolvlm_exp.utils.startup import configure_logging, fast_imports, silence_upstream
from smolvlm_exp.utils.versions import check_torchvision

log = logging.getLogger(__name__)


@dataclass
class Run:
    """What `train` and `evaluate` return."""

    folder: Path
    summary: dict[str, Any]  # as in summary.json


def train(overrides: Sequence[str] = ()) -> Run:
    """Fine-tune, as `python -m smolvlm_exp OVERRIDES` does.

    Args:
        overrides: as typed on the command line: ["model=tiny", "trainer.max_steps=5"].

    Raises:
        RequestError: the request is wrong; the message says what to change. Nothing was started.
        RunError: the run failed; the message says how to resume.
    """
    return run_task("train", overrides)


def evaluate(overrides: Sequence[str] = ()) -> Run:
    """Evaluate, as `python -m smolvlm_exp task=evaluate OVERRIDES` does: ["run=last", "data=photos"].

    Raises:
        RequestError: the request is wrong; the message says what to change.
    """
    return run_task("evaluate", overrides)


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration that `python -m smolvlm_exp OVERRIDES` would run, for what takes its groups one by one.

    Raises:
        RequestError: the request is wrong; the message says what to change.
    """
    register_schemas()
    return check_command(get_args_parser().parse_args(["--", *overrides]))[0]


def run_task(task: str, overrides: Sequence[str]) -> Run:
    clock.restart()
    configure_logging()
    register_schemas()
    args = get_args_parser().parse_args(["--", f"task={task}", *overrides])
    complete_and_check(args)
    run: Run = run_once(args, lambda composed: Run(output_folder(), execute(parse(composed), output_folder())))
    return run


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
            if (folder / ".hydra").is_dir():  # without which a checkpoint cannot be resumed
                fsync_all(folder / ".hydra")
            return task(composed)

        writes, made = composed.task.name not in WITHOUT_FOLDER, missing(folder)
        with (
            lock_run_folder(folder) if writes else nullcontext(),
            remove_if_refused(folder, made) if writes else nullcontext(),
            disk_full_as_run_error(folder),
        ):
            if writes and not composed.resume:
                check_unused(folder, composed.task.name)
            callbacks.on_run_start(config=composed, config_name=name)
            context = HydraContext(runner.config_loader, callbacks)
            done = run_job(saved, composed, "hydra.run.dir", None, context, configure_logging=False)
            callbacks.on_run_end(config=composed, config_name=name, job_return=done)
            return done.return_value


def complete_and_check(args: Namespace) -> None:
    """Complete a parsed command line, in place, by the settings of the run that it names, and check all of it."""
    with unusable_path_as_request_error():
        args.overrides = complete_overrides(args.overrides, args.multirun)
        configs = check_command(args)
        for config in {repr((c.task, c.data, c.model)): c for c in configs}.values():  # of a sweep, what differs
            check_inputs(config)


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


def job(composed: DictConfig) -> float | None:
    """One run, or one job of a sweep, which returns its `metric` to the sweeper."""
    configure_logging()
    config, folder = parse(composed), output_folder()
    own = HydraConfig.get()
    many = own.mode == hydra.types.RunMode.MULTIRUN
    try:
        if many and (folder.parent / "sweep.json").is_file():  # ours; other sweepers' jobs run in this process
            from smolvlm_exp.sweep.job_process import run_job

            return run_job(config, folder, Path(own.runtime.cwd), own.launcher.get("n_jobs", 1))
        with lock_run_folder(folder) if many else nullcontext():  # a single run holds its lock already
            summary = execute(config, folder)
        if config.strict_checks and isinstance(summary, dict) and summary.get("checks_passed") is False:
            failed = ", ".join(check["id"] for check in summary["checks"] if check["verdict"] == "fail")
            raise RunError(f"strict_checks=true: {failed} failed.")
    except (RequestError, RunError) as error:
        if many:
            raise  # the other jobs continue, and Hydra reports this one
        exit_with_error(error)
    except KeyboardInterrupt:  # where no step is finished first
        exit_stopped(config.task.name, folder)
    if isinstance(summary, dict) and summary.get("status") == "stopped":
        exit_stopped(config.task.name, folder)
    if config.task.name not in ("train", "mine"):
        return None
    if config.task.name == "mine":
        return None
    return summary_value(summary, deciding_metric(config.metric, [summary]))


def exit_stopped(task: str, folder: Path) -> NoReturn:
    """After a signal: say what there is to resume from."""
    saved = {"train": bool(checkpoints(folder)), "mine": any(folder.rglob("answers.jsonl"))}
    if saved.get(task):
        resume = shlex.join(["python", "-m", "smolvlm_exp", f"resume={relative_to_cwd(folder)}"])
        print(f"\nstopped; what was done is saved. Resume: {resume}", file=sys.stderr)
        sys.exit(STOPPED)
    print("\nstopped" + (" before the first step; nothing was saved" if task == "train" else ""), file=sys.stderr)
    sys.exit(INTERRUPTED)


def main() -> None:
    """The console script: refuse what cannot work, then let Hydra run the job or jobs."""
    sigterm_as_interrupt()
    try:
        run_command_line()
    except KeyboardInterrupt:  # before a run has a folder
        print("\nstopped", file=sys.stderr)
        sys.exit(INTERRUPTED)


def run_command_line() -> None:
    if sys.argv[1:] in (["--help"], ["-h"]):  # Hydra would first list every group of every plugin: seconds
        print(OmegaConf.load(CONF / "config.yaml").hydra.help.template)
        return
    if sys.argv[1:] in (["-sc", "install=bash"], ["--shell-completion", "install=bash"]):
        print(BASH)
        return
    if sys.argv[1:] == ["--version"]:
        print(f"smolvlm_exp {__version__}")
        return
    configure_logging()
    register_schemas()
    parser = get_args_parser()
    parser.error = refuse_flags  # type: ignore[method-assign]
    try:
        if group := help_wanted(sys.argv[1:]):
            print(group_help(group.partition("=")[0], compose([group] if "=" in group else [])))
            return
        check_flags(sys.argv[1:], parser)
        args = parser.parse_intermixed_args()
    except RequestError as error:
        exit_with_error(error)
    asked = args.help or args.hydra_help or args.shell_completion
    if not asked:
        flags = [argument for argument in sys.argv[1:] if argument not in args.overrides]
        if args.config_path:  # relative to where the command is typed; Hydra takes it relative to this file
            flags = [flag.replace(args.config_path, str(Path(args.config_path).resolve())) for flag in flags]
        try:
            if args.experimental_rerun:
                raise RequestError(
                    "--experimental-rerun reads a pickle, which may run any code: --config-path FOLDER/.hydra "
                    "--config-name config runs FOLDER again."
                )
            complete_and_check(args)
            own = join_group(args) if is_distributed() else []
        except RequestError as error:
            exit_with_error(error)
        args.overrides += own
        sys.argv[1:] = [*args.overrides, *flags]
    if asked or args.multirun or args.cfg or args.info:
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    else:
        run_and_report(lambda: run_command(args))
    if is_distributed():
        from smolvlm_exp.utils.distributed import destroy_distributed

        destroy_distributed()


def run_command(args: Namespace) -> None:
    try:
        run_once(args, job)
    except (RequestError, RunError) as error:  # of the folder or the disk: `job` has reported its own
        exit_with_error(error)


def is_distributed() -> bool:
    """Whether accelerate launch or torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join_group(args: Namespace) -> list[str]:
    """Form the group; returns the overrides by which rank 0 alone prints and writes the run.

    All ranks run the same pipeline. What the others write, the same numbers again, goes to temporary folders, so no
    other code asks which rank it is.
    """
    if args.multirun:
        raise RequestError(
            "-m under accelerate launch or torchrun: a sweep starts its own processes. Type it without the launcher; "
            "hydra/launcher=parallel gives each job a GPU."
        )
    from smolvlm_exp.utils.distributed import init_distributed, rank_world

    init_distributed()
    if rank_world()[0] == 0:
        return []
    scratch = tempfile.TemporaryDirectory(prefix="smolvlm_exp-")
    atexit.register(scratch.cleanup)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for as long as the process lives
    return [as_override("hydra.run.dir", scratch.name), "hydra.output_subdir=.hydra", "tracker=none"]

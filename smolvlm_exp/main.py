"""The command line, and the same from Python: compose with Hydra, check everything, do the task.

    python -m smolvlm_exp [group=option] [group.key=value] [-m]

Exit codes: 0 done; 1 failed, or a job of a sweep did; 2 the request was wrong and nothing was started; 75 stopped after
saving, resume with resume=last or, with -m, sweep=last.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from smolvlm_exp.config import launch
from smolvlm_exp.config.compose import check_command, register_schemas, search_path
from smolvlm_exp.config.previous_run import resume_command, run_command, sweep_command
from smolvlm_exp.config.schema import parse
from smolvlm_exp.runs.folder import check_unused, lock_run_folder
from smolvlm_exp.runs.overrides import given_value
from smolvlm_exp.utils.errors import RequestError, RunError, exit_with_error
from smolvlm_exp.utils.log import configure_logging
from smolvlm_exp.utils.paths import CONF, relative_to_cwd
from smolvlm_exp.utils.startup import fast_imports, silence_upstream
from smolvlm_exp.utils.versions import check_torchvision

WITHOUT_MODEL = ("doctor", "plan", "compare")  # tasks that work also where torch does not


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


def run_task(task: str, overrides: Sequence[str]) -> Run:
    configure_logging()
    register_schemas()
    argv = [f"task={task}", *overrides]
    for completed in (resume_command, run_command):
        argv = completed(argv, command_of(argv))
    check_command(command_of(argv))
    check_folder(command_of(argv))
    with search_path(CONF, None):
        runner = GlobalHydra.instance().hydra
        assert runner is not None
        done = runner.run(
            "config", lambda composed: Run(output_folder(), execute(composed)), argv, with_log_configuration=False
        )
    run: Run = done.return_value
    return run


def command_of(overrides: list[str]) -> Any:
    """A command line of overrides alone, as Hydra parses it."""
    return SimpleNamespace(overrides=overrides, multirun=False, config_path=None, config_name=None, config_dir=None)


def output_folder() -> Path:
    return Path(HydraConfig.get().runtime.output_dir)


def execute(composed: DictConfig) -> Any:
    """Do the task of a checked configuration; returns what its function returns."""
    config, folder = parse(composed), output_folder()
    name = config.task.name
    with fast_imports():
        if name not in WITHOUT_MODEL:
            check_torchvision()
            silence_upstream()
        task = getattr(import_module(f"smolvlm_exp.tasks.{name}"), name)
    with lock_run_folder(folder) if name == "train" else nullcontext():
        return task(config, folder)


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def job(composed: DictConfig) -> float | None:
    """One run, or one job of a sweep, which returns its `metric` to the sweeper."""
    configure_logging()
    config, folder = parse(composed), output_folder()
    many = HydraConfig.get().mode == hydra.types.RunMode.MULTIRUN
    try:
        if many and (folder.parent / "sweep.json").is_file():  # a sweep of ours; others run their jobs right here
            from smolvlm_exp.sweep.job_process import run_job

            own = HydraConfig.get()
            return run_job(config, folder, Path(own.runtime.cwd), own.launcher.get("n_jobs", 1))
        summary = execute(composed)
    except (RequestError, RunError) as error:
        if many:
            raise  # the other jobs continue, and Hydra reports this one
        exit_with_error(error)
    except KeyboardInterrupt:  # while the model or the data was loaded; once a run has begun, it saves first
        print("\nstopped before training began", file=sys.stderr)
        sys.exit(130)
    if config.task.name != "train":
        return None
    if summary["status"] == "stopped":
        print(f"stopped after saving; resume: python -m smolvlm_exp resume={relative_to_cwd(folder)}", file=sys.stderr)
        sys.exit(75)
    part, _, key = config.metric.partition(".")
    metric: float | None = summary[part].get(key)
    return metric


def main() -> None:
    """The console script: refuse what cannot work, then let Hydra run the job or jobs."""
    if sys.argv[1:] in (["--help"], ["-h"]):  # Hydra would first list every group of every plugin: seconds
        print(OmegaConf.load(CONF / "config.yaml").hydra.help.template)
        return
    configure_logging()
    register_schemas()
    args = get_args_parser().parse_args()
    if not (args.help or args.hydra_help or args.shell_completion):
        try:
            argv = sys.argv[1:]
            if args.config_path:  # from where the command is typed; Hydra would take it from where this file lies
                argv = [a.replace(args.config_path, str(Path(args.config_path).resolve())) for a in argv]
            for completed in (resume_command, run_command, sweep_command):
                argv = completed(argv, args)
            sys.argv[1:] = argv
            args = get_args_parser().parse_args()
            check_command(args)
            check_folder(args)
            if launch.is_distributed():
                sys.argv[1:] = launch.join(argv, args)
        except RequestError as error:
            exit_with_error(error)
    job()
    if launch.is_distributed():
        from smolvlm_exp.utils.distributed import destroy_distributed

        destroy_distributed()


def check_folder(args: Any) -> None:
    """
    Raises:
        RequestError: the folder that a new run is to write has a run in it already.
    """
    named = given_value(args, "hydra.run.dir", "")
    if named and not given_value(args, "resume", "") and given_value(args, "task", "train") == "train":
        check_unused(Path(named))

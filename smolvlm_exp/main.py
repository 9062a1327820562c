"""The command line: compose with Hydra, check everything, do the task.

    python -m smolvlm_exp [group=option] [group.key=value] [-m]

Exit codes: 0 done; 1 failed, or a job of a sweep did; 2 the request was wrong and nothing was started; 75 stopped after
saving, resume with resume=last or, with -m, sweep=last; 130 stopped, and there is nothing to resume from.
"""

import shlex
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser, run_and_report
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from smolvlm_exp import __version__
from smolvlm_exp.config.completion import BASH
from smolvlm_exp.config.compose import register_schemas
from smolvlm_exp.config.describe import group_help
from smolvlm_exp.config.flags import check_flags, help_wanted, refuse_flags
from smolvlm_exp.config.schema import parse
from smolvlm_exp.evaluation.metrics import deciding_metric, summary_value
from smolvlm_exp.runs.checkpoint import checkpoints
from smolvlm_exp.runs.folder import lock_run_folder
from smolvlm_exp.tasks.command import complete_and_check, execute, output_folder, run_once, sync_saved_config
from smolvlm_exp.tasks.notebook import compose
from smolvlm_exp.tasks.ranks import is_distributed, join_group
from smolvlm_exp.utils.errors import RequestError, RunError, exit_with_error
from smolvlm_exp.utils.paths import CONF, relative_to_cwd
from smolvlm_exp.utils.signals import INTERRUPTED, STOPPED, end_as_interrupt
from smolvlm_exp.utils.startup import configure_logging, keep_printing


def job(composed: DictConfig) -> float | None:
    """One run, or one job of a sweep, which returns its `metric` to the sweeper."""
    configure_logging()
    config, folder = parse(composed), output_folder()
    own = HydraConfig.get()
    many = own.mode == hydra.types.RunMode.MULTIRUN
    try:
        if many:
            sync_saved_config(folder)
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
    if config.task.name != "train":
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
    end_as_interrupt()
    keep_printing()
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
    if sys.flags.optimize:
        exit_with_error(
            RequestError("python -O and PYTHONOPTIMIZE leave out checks that this program and Hydra need: unset it.")
        )
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

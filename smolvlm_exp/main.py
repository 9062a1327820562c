"""The command line: compose with Hydra, check everything, do the task.

    python -m smolvlm_exp [group=option] [group.key=value] [-m]

Exit codes: 0 done; 1 failed, or a job of a sweep did; 2 the request was wrong and nothing was started; 75 stopped after
saving, go on with resume=last or, with -m, sweep=last.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from smolvlm_exp.config import launch
from smolvlm_exp.config.compose import check_command, register_schemas
from smolvlm_exp.config.previous_run import resume_command, run_command, sweep_command
from smolvlm_exp.config.schema import parse
from smolvlm_exp.runs.find import find_ended_run
from smolvlm_exp.runs.folder import check_unused, lock_run_folder
from smolvlm_exp.runs.overrides import given_value
from smolvlm_exp.utils.errors import RequestError, RunError, exit_with_error
from smolvlm_exp.utils.log import configure_logging
from smolvlm_exp.utils.paths import CONF, relative_to_cwd
from smolvlm_exp.utils.startup import fast_imports, silence_upstream
from smolvlm_exp.utils.versions import check_torchvision


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def job(composed: DictConfig) -> float | None:
    """One run, or one job of a sweep, which returns its `metric` to the sweeper."""
    configure_logging()
    config = parse(composed)
    folder = Path(HydraConfig.get().runtime.output_dir)
    many = HydraConfig.get().mode == hydra.types.RunMode.MULTIRUN
    try:
        if config.task.name == "doctor":
            from smolvlm_exp.reporting.advice import print_advice
            from smolvlm_exp.tasks.doctor import doctor

            sys.exit(print_advice(find_ended_run(config.run)) if config.run else doctor(Path("outputs")))
        if config.task.name == "plan":
            from smolvlm_exp.tasks.plan import plan

            sys.exit(plan(config))
        if many and (folder.parent / "sweep.json").is_file():  # a sweep of ours; others run their jobs right here
            from smolvlm_exp.sweep.run_job import run_job

            own = HydraConfig.get()
            return run_job(config, folder, Path(own.runtime.cwd), own.launcher.get("n_jobs", 1))
        check_torchvision()
        with fast_imports():
            silence_upstream()
            module = import_module(f"smolvlm_exp.tasks.{config.task.name}")
        if config.task.name != "train":
            getattr(module, config.task.name)(config, folder)
            return None
        with lock_run_folder(folder):
            summary = module.train(config, folder)
    except (RequestError, RunError) as error:
        if many:
            raise  # the other jobs go on, and Hydra reports this one
        exit_with_error(error)
    except KeyboardInterrupt:  # while the model or the rows were loaded; once a run has begun, it saves first
        print("\nstopped before anything was trained", file=sys.stderr)
        sys.exit(130)
    if summary["status"] == "stopped":
        print(
            f"stopped after saving; go on with: python -m smolvlm_exp resume={relative_to_cwd(folder)}", file=sys.stderr
        )
        sys.exit(75)
    part, _, key = config.metric.partition(".")
    return summary[part].get(key)


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
            argv = absolute(sys.argv[1:], args)
            for completed in (resume_command, run_command, sweep_command):
                argv = completed(argv, args)
            sys.argv[1:] = argv
            args = get_args_parser().parse_args()
            check_command(args)
            typed = given_value(args, "hydra.run.dir", "")
            if typed and not given_value(args, "resume", "") and given_value(args, "task", "train") == "train":
                check_unused(Path(typed))
            if launch.is_distributed():
                sys.argv[1:] = launch.join(argv, args)
        except RequestError as error:
            exit_with_error(error)
    job()
    if launch.is_distributed():
        from smolvlm_exp.utils.distributed import destroy_distributed

        destroy_distributed()


def absolute(argv: list[str], args: Any) -> list[str]:
    """--config-path from where the command is typed; Hydra would take it from where this file lies."""
    if not args.config_path:
        return argv
    return [a.replace(args.config_path, str(Path(args.config_path).resolve())) for a in argv]

"""The command line: compose with Hydra, check everything, do the task.

    python -m smolvlm_exp [group=option] [group.key=value] [-m]

Exit codes: 0 done; 1 failed; 2 the request was wrong and nothing was started; 75 stopped after saving, go on with
resume=last.
"""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from smolvlm_exp.command import check_command, register_schemas
from smolvlm_exp.config import CONF, parse
from smolvlm_exp.errors import RequestError
from smolvlm_exp.runs import as_typed, resume_command


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def job(composed: DictConfig) -> float | None:
    """One run. Returns its objective (held-out preference accuracy) for sweepers."""
    config = parse(composed)
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        if config.task.name == "doctor":
            from smolvlm_exp.doctor import doctor

            sys.exit(doctor(Path("outputs")))
        if config.task.name == "plan":
            from smolvlm_exp.plan import plan

            sys.exit(plan(config))
        hush()
        from smolvlm_exp.pipeline import train

        summary = train(config, folder)
    except RequestError as error:
        if HydraConfig.get().mode == hydra.types.RunMode.MULTIRUN:
            raise  # the other jobs go on, and Hydra reports this one
        refuse(error)
    if summary["status"] == "stopped":
        print(f"stopped after saving; go on with: python -m smolvlm_exp resume={as_typed(folder)}", file=sys.stderr)
        sys.exit(75)
    return summary["after"].get("preference_accuracy")


def main() -> None:
    """The console script: refuse what cannot work, then let Hydra run the job or jobs."""
    register_schemas()
    args = get_args_parser().parse_args()
    if not (args.help or args.hydra_help or args.shell_completion):
        try:
            sys.argv[1:] = resume_command(absolute(sys.argv[1:], args), args)
            check_command(get_args_parser().parse_args())
        except RequestError as error:
            refuse(error)
    job()


def absolute(argv: list[str], args: Any) -> list[str]:
    """--config-path from where the command is typed; Hydra would take it from where this file lies."""
    if not args.config_path:
        return argv
    return [a.replace(args.config_path, str(Path(args.config_path).resolve())) for a in argv]


def refuse(error: RequestError) -> NoReturn:
    print(f"smolvlm_exp: {error}", file=sys.stderr)
    sys.exit(2)


def hush() -> None:
    """Silence upstream's notes to its own developers; errors and our own lines stay."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()

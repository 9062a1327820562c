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
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

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
from smolvlm_exp.data.memory import Rows, save_rows
from smolvlm_exp.evaluation.metrics import deciding_metric, summary_value
from smolvlm_exp.runs.checkpoint import checkpoints, disk_error_as_run_error, fsync_all
from smolvlm_exp.runs.folder import check_unused, lock_run_folder, missing, remove_if_refused
from smolvlm_exp.runs.overrides import as_override, quoted
from smolvlm_exp.tasks.opening import WITHOUT_FOLDER, announce
from smolvlm_exp.utils.errors import RequestError, RunError, exit_with_error, unusable_path_as_request_error
from smolvlm_exp.utils.paths import CONF, OUTPUTS, relative_to_cwd
from smolvlm_exp.utils.phases import clock
from smolvlm_exp.utils.signals import INTERRUPTED, STOPPED, end_as_interrupt
from smolvlm_exp.utils.startup import configure_logging, fast_imports, keep_printing, silence_upstream
from smolvlm_exp.utils.versions import check_torchvision

if TYPE_CHECKING:
    from PIL.Image import Image

    from smolvlm_exp.deploy.session.session import SmolVLMSession

log = logging.getLogger(__name__)


@dataclass
class Run:
    """What `train` and `evaluate` return.

    Attributes:
        summary: as in summary.json; its status is `stopped` after an interrupt, and train([f"resume={run.folder}"])
            goes on.
    """

    folder: Path
    summary: dict[str, Any]

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @cached_property
    def session(self) -> "SmolVLMSession":
        """The tuned model, for conversations; loaded on first use."""
        from smolvlm_exp.tasks.chat import load_session

        return load_session(compose(["task=chat", as_override("run", str(self.folder))]))

    def generate(self, image: "Image | str | Path", question: str = "Describe the picture.", **sampling: Any) -> str:
        """The tuned model's answer.

        Args:
            image: a PIL image, or its file.
            sampling: as `Sampling` has it: max_new_tokens, temperature, seed ...
        """
        from smolvlm_exp.data.memory import read_image
        from smolvlm_exp.engine.generation.sampling import Sampling

        return self.session.conversation().say(question, [read_image(image)], Sampling(**sampling)).finish()


def train(overrides: Sequence[str] = (), rows: "Rows | None" = None, test_rows: "Rows | None" = None) -> Run:
    """Fine-tune, as `python -m smolvlm_exp OVERRIDES` does.

    Args:
        overrides: as typed on the command line: ["model=tiny", "trainer.max_steps=5"].
        rows: to train on, in place of `data=...`: a `datasets.Dataset`, or dictionaries with the columns of
            `data=files` and PIL images or their files. They are written below `outputs/rows/`: `data.folder`.
        test_rows: to evaluate on; None: some of `rows` are held out, by image.

    Raises:
        RequestError: the request is wrong; the message says what to change. Nothing was started.
        RunError: the run failed; the message says how to resume.
    """
    return run_task("train", [*with_rows(rows, test_rows), *overrides])


def evaluate(overrides: Sequence[str] = (), rows: "Rows | None" = None) -> Run:
    """Evaluate, as `python -m smolvlm_exp task=evaluate OVERRIDES` does: ["run=last", "data=photos"].

    Args:
        rows: to evaluate on, as of `train`.

    Raises:
        RequestError: the request is wrong; the message says what to change.
    """
    return run_task("evaluate", [*with_rows(None, rows), *overrides])


def compare(runs: Sequence[Run | str | Path], overrides: Sequence[str] = ()) -> Run:
    """Compare finished runs, as `python -m smolvlm_exp task=compare runs=[...]` does; the table is printed.

    Returns:
        its `folder` has compare.csv and compare.html.

    Raises:
        RequestError: fewer than two of them are finished runs.
    """
    folders = [str(run.folder if isinstance(run, Run) else run) for run in runs]
    return run_task("compare", [f"runs=[{','.join(map(quoted, folders))}]", *overrides])


def with_rows(train: "Rows | None", test: "Rows | None") -> list[str]:
    """The overrides by which rows in memory are read."""
    if train is None and test is None:
        return []
    with disk_error_as_run_error(OUTPUTS):
        return ["data=files", as_override("data.folder", str(save_rows(train, test)))]


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration that `python -m smolvlm_exp OVERRIDES` would run, for what takes its groups one by one.

    Raises:
        RequestError: the request is wrong; the message says what to change.
    """
    register_schemas()
    return complete_and_check(get_args_parser().parse_args(["--", *overrides]))[0]


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

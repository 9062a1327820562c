"""The commands as functions, for notebooks and scripts: `from smolvlm_exp import train, evaluate, compare`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.utils import get_args_parser

from smolvlm_exp.config.compose import register_schemas
from smolvlm_exp.config.schema import Config, parse
from smolvlm_exp.data.memory import Rows, save_rows
from smolvlm_exp.runs.checkpoint import disk_error_as_run_error
from smolvlm_exp.runs.overrides import as_override, quoted
from smolvlm_exp.tasks.command import complete_and_check, execute, output_folder, run_once
from smolvlm_exp.utils.paths import OUTPUTS
from smolvlm_exp.utils.phases import clock
from smolvlm_exp.utils.startup import configure_logging

if TYPE_CHECKING:
    from PIL.Image import Image

    from smolvlm_exp.deploy.session.session import SmolVLMSession


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

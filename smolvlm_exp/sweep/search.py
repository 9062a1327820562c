"""Optuna instead of a grid: python -m smolvlm_exp -m experiment=search_rank_lr_beta

A trial is a job like any other: apart, on whichever launcher, with its folder and its state. `sweep=last` goes on to
`n_trials` in all; the same with the sweep's folder from a second terminal works on the same study at the same time.
"""

import uuid
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from smolvlm_exp.config.compose import parsed
from smolvlm_exp.config.schema import Config
from smolvlm_exp.evaluation.metrics import GOALS
from smolvlm_exp.runs.find import summary_of
from smolvlm_exp.runs.sweep_record import Job, is_display_key, job_state, write_jobs
from smolvlm_exp.sweep.console import announce, report_results
from smolvlm_exp.sweep.grid import compose
from smolvlm_exp.sweep.job_process import STOPPED
from smolvlm_exp.sweep.launcher import Stop, launch
from smolvlm_exp.sweep.optuna_study import (
    WORKER,
    Options,
    distribution,
    is_abandoned,
    job_of,
    open_study,
    require_optuna,
)
from smolvlm_exp.sweep.results import JobResult
from smolvlm_exp.sweep.sweep_page import study_sections
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import write_json

if TYPE_CHECKING:
    from optuna import Study


def sweep_search(sweeper: Any, arguments: list[str]) -> int:
    """What the search sweeper does with a command's overrides; returns the command's exit code.

    Raises:
        RequestError: Optuna is missing, there is nothing to search, or the folder has another search.
    """
    require_optuna()
    options = Options(**sweeper.options)
    asked = parsed([*(f"{key}={value}" for key, value in sweeper.params.items()), *arguments])
    last = {override.get_key_element(): override for override in asked}  # the command's own over the experiment's
    space = {key: override for key, override in last.items() if override.is_sweep_override()}
    fixed = [override.input_line or "" for override in last.values() if not override.is_sweep_override()]
    if not space:
        raise RequestError("hydra/sweeper=search needs something to search: hydra.sweeper.params, or key=choice(4,8).")
    config = compose(sweeper, Job(0, tuple(fixed)))
    if options.prune and config.trainer.eval_strategy == "no":
        raise RequestError("hydra.sweeper.prune compares trials while they train: add trainer.eval_strategy=steps.")
    folder = Path(sweeper.config.hydra.sweep.dir)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(sweeper.config, folder / "multirun.yaml")
    command = [
        f"metric={config.metric}",
        *(o.input_line or "" for o in last.values() if not is_display_key(o.input_line or "")),
    ]
    study = open_study(folder, options, GOALS[config.metric], command)
    with Stop(folder) as stop:
        Search(folder, study, options, space, fixed, config).run(sweeper.launcher, stop)
    report_results(folder, config, stop.asked, study_sections(study, config.metric))
    if stop.asked:
        return STOPPED
    return 1 if any(trial.state.name == "FAIL" for trial in study.get_trials(deepcopy=False)) else 0


class Search:
    """One command's work on a study that it may share with others."""

    def __init__(
        self,
        folder: Path,
        study: "Study",
        options: Options,
        space: dict[str, Override],
        fixed: list[str],
        config: Config,
    ) -> None:
        self.folder, self.study, self.options, self.space = folder, study, options, space
        self.distributions = {key: distribution(override) for key, override in space.items()}
        self.fixed, self.config = fixed, config
        self.worker = f".worker-{uuid.uuid4().hex}"

    def run(self, launcher: Any, stop: Stop) -> None:
        """Trials until there are as many as asked for, those of commands that are gone included."""
        with FileLock(self.folder / self.worker):
            self.announce()
            launched = True
            while launched and not stop.asked and (jobs := self.take()):
                launched = launch(launcher, self.folder, jobs, stop)
                for job in jobs:
                    self.tell(job)
        (self.folder / self.worker).unlink(missing_ok=True)

    def announce(self) -> None:
        trials = self.study.trials
        ended = [trial for trial in trials if trial.state.is_finished()]
        left = [self.config] * max(self.options.n_trials - len(ended), 0)
        states = [job_state(self.folder / str(trial.number)) for trial in trials]
        spoken = {key: (o.input_line or "").partition("=")[2] for key, o in self.space.items()}
        announce(self.folder, f"search of {self.options.n_trials} trials", spoken, states, left)

    def take(self) -> list[Job]:
        """The next trials: first what other commands left behind, then new ones, `n_jobs` at most."""
        with FileLock(self.folder / ".search"):
            left = [
                trial.number
                for trial in self.study.trials
                if trial.state.name == "RUNNING" and is_abandoned(self.folder, trial)
            ][: self.options.n_jobs]
            while len(left) < self.options.n_jobs and len(self.study.trials) < self.options.n_trials:
                left.append(self.study.ask(self.distributions).number)
            for number in left:
                self.claim(number)
            jobs = [job_of(trial, self.fixed) for trial in self.study.trials]
            write_jobs(self.folder, jobs, list(self.space))
        return [jobs[number] for number in left]

    def claim(self, number: int) -> None:
        """Write this command's name on a trial, and into its folder what its job needs to report and to be pruned."""
        from optuna.trial import Trial

        trial_id = self.study.trials[number]._trial_id
        Trial(self.study, trial_id).set_user_attr(WORKER, self.worker)
        folder = self.folder / str(number)
        folder.mkdir(exist_ok=True)
        if self.options.prune:
            told = {"study": self.study.study_name, "trial": trial_id, **asdict(self.options)}
            write_json(folder / "trial.json", told)

    def tell(self, job: Job) -> None:
        """The trial's end to Optuna; one that was stopped stays open, for sweep=FOLDER."""
        from optuna.trial import TrialState

        folder = self.folder / str(job.number)
        row = JobResult(job, job_state(folder), summary_of(folder))
        value = row.value(self.config.metric)
        if row.status == "done" and value is not None:
            self.study.tell(job.number, value, skip_if_finished=True)
        elif row.status in ("done", "failed"):
            self.study.tell(job.number, state=TrialState.FAIL, skip_if_finished=True)
        elif row.status == "pruned":
            self.study.tell(job.number, state=TrialState.PRUNED, skip_if_finished=True)

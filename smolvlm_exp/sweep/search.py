"""Optuna instead of a grid: python -m smolvlm_exp -m experiment=search_rank_lr_beta

A trial is a job like any other: its own process, any launcher, its folder and status. `sweep=last` resumes up to
`n_trials` in all; the same with the sweep's folder from a second terminal works on the same study at the same time.
"""

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from smolvlm_exp.config.schema import Config, check_value, settings
from smolvlm_exp.config.typed import parsed
from smolvlm_exp.evaluation.metrics import BY_DEFAULT, GOALS, deciding_metric
from smolvlm_exp.runs.checkpoint import is_disk_error
from smolvlm_exp.runs.folder import MULTIRUN, check_unused_sweep, lock_run_folder
from smolvlm_exp.runs.overrides import key_of
from smolvlm_exp.runs.sweep_record import DISPLAY_KEYS, Job, job_state, write_jobs
from smolvlm_exp.sweep.console import announce, report_results
from smolvlm_exp.sweep.grid import compose
from smolvlm_exp.sweep.launcher import SweepStop, launch
from smolvlm_exp.sweep.optuna_study import WORKER, SearchConf, distribution, is_abandoned, open_study, require_optuna
from smolvlm_exp.sweep.results import read_result
from smolvlm_exp.utils.errors import RequestError, RunError
from smolvlm_exp.utils.files import write_json, write_text
from smolvlm_exp.utils.signals import STOPPED

if TYPE_CHECKING:
    from optuna import Study


def sweep_search(sweeper: Any, arguments: list[str]) -> int:
    """Run a command's search; returns the exit code."""
    require_optuna()
    options: SearchConf = sweeper.options
    for key, setting, value in settings(options, "hydra.sweeper."):
        check_value(key, setting, value)
    from_config = [f"{key}={value}" for key, value in (options.params or {}).items()]
    overrides = {o.get_key_element(): o for o in parsed([*from_config, *arguments])}  # the command's replace the YAML's
    space = {key: override for key, override in overrides.items() if override.is_sweep_override()}
    fixed = [override.input_line or "" for override in overrides.values() if not override.is_sweep_override()]
    if not space:
        raise RequestError("hydra/sweeper=search needs something to search: hydra.sweeper.params, or key=choice(4,8).")
    config = compose(sweeper, Job(0, tuple(fixed)))
    if options.prune and config.trainer.eval_strategy == "no":
        raise RequestError("hydra.sweeper.prune compares trials during training: add trainer.eval_strategy=steps.")
    folder = Path(sweeper.config.hydra.sweep.dir)
    lines = [override.input_line or "" for override in overrides.values()]
    metric = config.metric or BY_DEFAULT[0]  # of which more is better, as of the other
    command = [f"metric={metric}", *(line for line in lines if key_of(line) not in DISPLAY_KEYS)]
    with lock_run_folder(folder):
        check_unused_sweep(folder, sweeper.config)
        study = open_study(folder, options, GOALS[metric], command)
        write_text(folder / MULTIRUN, OmegaConf.to_yaml(sweeper.config))
    with SweepStop(folder) as stop:
        Search(folder, study, options, space, fixed, config).run(sweeper.launcher, stop)
    results = report_results(folder, config, stop.requested, study)
    if stop.requested:
        return STOPPED
    failed = any(trial.state.name == "FAIL" for trial in study.get_trials(deepcopy=False))
    return int(failed or results.failed(config.strict_checks))


@dataclass
class Search:
    """One command's work on a study that it may share with other commands."""

    folder: Path
    study: "Study"
    options: SearchConf
    space: dict[str, Override]
    fixed: list[str]
    config: Config
    worker: str = field(default_factory=lambda: f".worker-{uuid.uuid4().hex}")

    def run(self, launcher: Any, stop: SweepStop) -> None:
        """Run trials up to `n_trials`, those that other commands abandoned included."""
        trials = self.study.trials
        finished = sum(trial.state.is_finished() for trial in trials)
        left = [self.config] * max(self.options.n_trials - finished, 0)
        states = [job_state(self.folder / str(trial.number)) for trial in trials]
        space = {key: (override.input_line or "").partition("=")[2] for key, override in self.space.items()}
        lock = self.folder / self.worker
        with FileLock(lock):
            announce(self.folder, f"search of {self.options.n_trials} trials", space, states, left)
            launched = True
            while launched and not stop.requested and (jobs := self.next_jobs()):
                launched = launch(launcher, self.folder, jobs, stop)
                for job in jobs:
                    self.tell(job)
        lock.unlink(missing_ok=True)

    def next_jobs(self) -> list[Job]:
        """At most `n_jobs` trials: first those that other commands abandoned, then new ones."""
        with FileLock(self.folder / ".search"):
            running = [trial for trial in self.study.trials if trial.state.name == "RUNNING"]
            numbers = [t.number for t in running if is_abandoned(self.folder, t)][: self.options.n_jobs]
            while len(numbers) < self.options.n_jobs and len(self.study.trials) < self.options.n_trials:
                numbers.append(self.study.ask().number)
            for number in numbers:
                self.claim(number)
            jobs = [
                Job(trial.number, (*self.fixed, *(f"{key}={value}" for key, value in trial.params.items())))
                for trial in self.study.trials
            ]
            write_jobs(self.folder, jobs, list(self.space))
        return [jobs[number] for number in numbers]

    def claim(self, number: int) -> None:
        """Mark a trial as this command's, and save in its folder what its job needs to report and to be pruned.

        What it tries is drawn here too: of a trial whose command was killed half of it may be missing.
        """
        from optuna.trial import Trial

        trial_id, options = self.study.trials[number]._trial_id, self.options
        trial = Trial(self.study, trial_id)
        trial.set_user_attr(WORKER, self.worker)
        for key, override in self.space.items():
            trial._suggest(key, distribution(override))  # or what it has
        folder = self.folder / str(number)
        folder.mkdir(exist_ok=True)
        if options.prune:
            names = ("storage", "prune", "n_startup_trials", "n_warmup_steps")
            pruning = {name: getattr(options, name) for name in names}
            write_json(folder / "trial.json", {"study": self.study.study_name, "trial": trial_id, **pruning})

    def tell(self, job: Job) -> None:
        """Tell Optuna how a trial ended; one that was stopped, or that the disk ended, stays open, for sweep=FOLDER."""
        from optuna.trial import TrialState

        result = read_result(self.folder, job)
        value = result.value(deciding_metric(self.config.metric, [result.summary]))
        if result.status == "done" and value is not None:
            self.study.tell(job.number, value, skip_if_finished=True)
        elif result.status in ("done", "failed", "pruned") and not is_disk_error(RunError(result.reason)):
            state = TrialState.PRUNED if result.status == "pruned" else TrialState.FAIL
            self.study.tell(job.number, state=state, skip_if_finished=True)
